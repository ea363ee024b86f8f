"""native.c as a library: compiled on first use for this CPU, and kept in the user's cache folder.

Without a compiler, without a folder that only the user can write to, or with LORA_NATIVE_KERNELS=0,
plain torch computes the same. Compiling takes 0.6 s, once per machine; loading it 1 ms
(torch.compile takes 1.4 s to import alone). With all kernels together, a LoRA step of SmolLM2-135M
in bf16 takes 1/1.24 of the time and 0.76 × the memory beyond the model, a step of 8 adapters on
MiniGPT 1/1.6 of the time (CPU seconds of one thread, in turns).
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.files.digest_cache import cache_home
from pipeline.models.device import processor_facts
from pipeline.models.kernels import uses_cpu_kernels
from pipeline.project.probes import PLAIN, record

SWITCH = "LORA_NATIVE_KERNELS"  # environment variable; 0: plain torch
SOURCE = Path(__file__).with_name("native.c")
# Not -ffast-math: it would flush denormal numbers in the whole process.
FLAGS = ["-O3", "-march=native", "-fopenmp", "-fPIC", "-fno-math-errno", "-fno-strict-aliasing"]
LANES = 16  # sizes of rows must be multiples of it
COLUMNS = 32  # of a panel of a product's right side
SCRATCH = 1024  # floats of a thread's tiles
Q8_BLOCK = 32  # weights of one scale in llama.cpp's q8_0
PATIENCE = 60  # seconds for the compiler
_P, _L, _F = ctypes.c_void_p, ctypes.c_long, ctypes.c_float


class AttentionShape(ctypes.Structure):
    """`Shape` of native.c."""

    _fields_ = [
        *((name, _L) for name in ("q_token", "q_head", "k_token", "k_head", "v_token", "v_head")),
        *((name, _L) for name in ("sequences", "H", "G", "K")),
        ("scale", _F),
    ]


class BlockShape(ctypes.Structure):
    """`Block` of native.c; pointers are those of `data_ptr`."""

    _fields_ = [
        *((name, _L) for name in ("L", "rows", "D", "F", "H", "R", "sequences")),
        ("scale", _F),
        ("eps", _F * 2),
        ("frozen", _P * 16),
        ("factors", _P * 8),
        ("steps", _L * 8),
        ("starts", _P),
    ]


class LowRank(ctypes.Structure):
    """`LowRank` of native.c."""

    _fields_ = [("A", _P), ("B", _P), ("rank", _L), ("scale", _F)]


class Part(ctypes.Structure):
    """`Part` of native.c."""

    _fields_ = [
        *(("weight", _P), ("bias", _P), ("outputs", _L)),
        *(("updates", _P), ("codes", _P), ("scales", _P)),
    ]


class LlamaBlock(ctypes.Structure):
    """`LlamaBlock` of native.c."""

    _fields_ = [
        *((name, _P) for name in ("norm", "feed_norm", "q_norm", "k_norm")),
        ("parts", Part * 7),
        *((name, _P) for name in ("keys", "values")),
        *((name, _F) for name in ("eps", "feed_eps", "head_eps", "scale")),
        ("window", _L),
    ]


class LlamaStep(ctypes.Structure):
    """`LlamaStep` of native.c."""

    _fields_ = [
        *((name, _L) for name in ("rows", "D", "F", "G", "R", "K", "page", "pages")),
        *((name, _L) for name in ("room_step", "threads")),
        *((name, _P) for name in ("blocks", "tables", "lengths", "cos", "sin", "x", "normed")),
        *((name, _P) for name in ("qkv", "attended", "projected", "gate_up", "hidden", "down")),
        *((name, _P) for name in ("packed", "room", "low")),
        ("low_step", _L),
    ]


_ARGUMENTS: dict[str, list[Any]] = {
    "rms_norm_forward": [_P] * 6 + [_L, _L, _F, _F],
    "rms_norm_backward": [_P] * 6 + [_L, _L, _F],
    "swiglu_forward": [_P] * 3 + [_L],
    "swiglu_backward": [_P] * 5 + [_L],
    "rotate": [_P] * 4 + [_L, _L, _L, _F],
    "cross_entropy": [_P] * 4 + [_L, _L],
    "attention_forward": [_P] * 7,
    "attention_backward": [_P] * 11,
    "low_rank_forward": [_P] * 5,
    "low_rank_backward": [_P] * 7,
    "use_tiles": [ctypes.c_int],
    "linear_forward": [_P] * 7 + [_L] * 4,
    "llama_steps": [_P, _L, _L],
}


@cache
def native() -> Any:
    """The library's functions, or None."""
    if os.environ.get(SWITCH) == "0" or os.name != "posix":
        return None
    try:
        library = ctypes.CDLL(str(_compiled()))
        for name, arguments in _ARGUMENTS.items():
            getattr(library, name).argtypes = arguments
    except (OSError, AttributeError, subprocess.SubprocessError) as error:
        record("the kernels of native.c", error, PLAIN)
        return None
    return library


@cache
def uses_tiles() -> bool:
    """Whether the library multiplies by AMX."""
    library = native()
    return library is not None and bool(library.use_tiles(1))


def call(function: str, *arguments: Any) -> Any:
    """Call a function of the library, with the addresses of tensors."""
    values = [x.data_ptr() if isinstance(x, Tensor) else x for x in arguments]
    return getattr(native(), function)(*values)


def linear_forward(
    x: Tensor, outputs: int, bias: Tensor | None, weight: Tensor | None, *q8: Tensor | None
) -> Tensor:
    """Wx + b in bf16 (..., O). A row's bits do not depend on the other rows.

    W is `weight`, or in its place the codes and scales of a `Q8Linear`.
    """
    rows, inputs = x.numel() // x.shape[-1], x.shape[-1]
    threads = torch.get_num_threads()
    out = x.new_empty(*x.shape[:-1], outputs)
    scratch = 2 * SCRATCH + LANES * inputs  # of a thread
    room = x.new_empty(threads * scratch + room_of(rows, inputs))
    sizes = (rows, inputs, outputs, threads)
    call("linear_forward", weight, bias, *(q8 or (None, None)), x.contiguous(), out, room, *sizes)
    return out


def room_of(rows: int, inputs: int) -> int:
    """Numbers in bf16 for a product's x (rows, inputs): as `pack` and as `q8_split` store it."""
    packed = -(-rows // LANES) * LANES * inputs
    return packed + rows * inputs + rows * inputs // Q8_BLOCK * 4


def supports(*tensors: Tensor, lanes: int = LANES, dtype: torch.dtype = torch.bfloat16) -> bool:
    """Whether the library computes with these tensors, in rows of a multiple of `lanes`."""
    for x in tensors:
        has_numbers = type(x) in (Tensor, torch.nn.Parameter)  # a fake tensor has none
        if not has_numbers or x.dtype != dtype or x.shape[-1] % lanes:
            return False
        if not uses_cpu_kernels(x.device):
            return False
    return native() is not None


def _compiled() -> Path:
    """The library's file. Raises OSError or SubprocessError where there can be none."""
    compiler = shutil.which("cc")
    if compiler is None:
        raise FileNotFoundError("cc")
    flags = [*FLAGS]
    if platform.machine() in ("x86_64", "AMD64"):
        flags.append("-mprefer-vector-width=512")
    stat = Path(compiler).resolve().stat()
    built_by = repr((compiler, stat.st_size, stat.st_mtime_ns, flags, _cpu()))
    digest = hashlib.sha256(SOURCE.read_bytes() + built_by.encode()).hexdigest()
    folder = cache_home() / "lora-workbench" / "native"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = folder / f"{digest[:32]}.so"
    _refuse_writable(folder)
    if not path.exists():
        # beside its place and then renamed: two processes may compile at once
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            unit, new = Path(scratch, "native.o"), Path(scratch, "native.so")
            # linked without -fopenmp: its symbols are then those of torch's own OpenMP, whose
            # threads it shares
            compiling = [*flags, "-c", str(SOURCE), "-o", str(unit)]
            linking = ["-shared", str(unit), "-o", str(new), "-lm"]
            for arguments in (compiling, linking):
                command = [compiler, *arguments]
                subprocess.run(command, check=True, capture_output=True, timeout=PATIENCE)
            new.chmod(0o700)
            new.replace(path)
    _refuse_writable(path)
    return path


def _refuse_writable(path: Path) -> None:
    """Raises PermissionError if others could have written what would be loaded."""
    stat = path.lstat()
    if stat.st_uid != os.getuid() or stat.st_mode & 0o022:
        raise PermissionError(str(path))


def _cpu() -> str:
    """What -march=native depends on."""
    facts = {
        line for line in processor_facts() if line.startswith(("model name", "flags", "Features"))
    }
    return "\n".join([platform.machine(), platform.processor(), *sorted(facts)])
