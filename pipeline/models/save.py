"""Read and write checkpoint files: safetensors, and whole models through transformers.

A checkpoint is loaded completely or not at all, silently, and written with the same bytes on every
machine.
"""

import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.errors import FULL, UserError, first_line, is_out_of_memory
from pipeline.files.artifact import read_json, write_json
from pipeline.files.base_model import CODE, TOKENIZER, TensorLocation
from pipeline.files.safetensors_file import as_os_error, shapes

CONFIG, WEIGHTS, GENERATION = "config.json", "model.safetensors", "generation_config.json"
# Fixed tables that older versions of transformers stored beside the weights; the model computes
# them.
HARMLESS = re.compile(r"rotary_emb\.inv_freq$|\.attn\.(masked_)?bias$|^rope_freqs\.weight$")
OF_THIS_MACHINE = re.compile(r"name_or_path$|^is_local$|^local_files_only$")
ONE_FILE = 2**60  # bytes per shard: never split
AGAIN = "Copy it again, or choose another base"


def save_tensors(path: Path, tensors: Mapping[str, Tensor], library: str = "pt") -> None:
    """Write a safetensors file with the metadata of PEFT and transformers, or MLX's.

    Raises OSError on a full disk.
    """
    # Copied to the CPU: a checkpoint must also be saved when the device's memory is full.
    copies = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}
    with as_os_error(path):
        save_file(copies, path, metadata={"format": library})
        path.chmod(path.parent.stat().st_mode & 0o666)  # safetensors lets only its owner read it


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file. Raises UserError if it cannot be read."""
    shapes(path)  # rejects a damaged file with a clearer reason than safetensors gives
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read: {error}. Create or copy it again.") from None


def read_rows(location: TensorLocation, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """Rows `start` to `stop` of a stored tensor of that dtype; nothing else is read.

    Raises UserError if the file was truncated.
    """
    rows, *rest = location.info.shape
    size = location.info.size // rows
    data = bytearray((stop - start) * size)
    with location.file.open("rb") as file:
        file.seek(location.info.start + start * size)
        if file.readinto(data) != len(data):
            raise UserError(
                f"{location.file} was truncated while it was read. Create or copy it again."
            )
    return torch.frombuffer(data, dtype=dtype).view(stop - start, *rest)


def load_strict(
    folder: Path, name: str, trust_remote_code: bool = False, hint: str = AGAIN, **how: Any
) -> Any:
    """The causal language model in `folder`, in evaluation mode; errors call it `name`.

    `how` goes to transformers.

    Raises UserError if weights are missing or left over. No pickle is read, and a model's own code
    runs only if it is trusted.
    """
    from transformers import AutoModelForCausalLM

    with quiet(), reported(name, trust_remote_code, hint):
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are rejected below, by name
            **how,
        )
    # transformers fills missing weights at random, so that the model would run, and answer nonsense
    unexpected = [name for name in report["unexpected_keys"] if not HARMLESS.search(name)]
    wrong = {
        "missing from the weights": report["missing_keys"],
        "not part of the model": unexpected,
        "of another shape than config.json gives": [
            str(key[0]) for key in report["mismatched_keys"]
        ],
    }
    problems = []
    for problem, tensors in wrong.items():
        first, *others = sorted(tensors) or [""]
        if others:
            problems.append(f"{first} and {len(others)} more are {problem}")
        elif first:
            problems.append(f"{first} is {problem}")
    problems += report["error_msgs"]
    if problems:
        raise UserError(
            f"{name} has other weights than its config.json describes: {'; '.join(problems)}. "
            "Copy both again, or name a causal language model."
        )
    return model.eval()


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy the tokenizer files of `source` into `folder`."""
    for pattern in TOKENIZER:
        for path in source.glob(pattern):
            shutil.copyfile(path, folder / path.name)


def save_checkpoint(model: Any, folder: Path, generation: str | None) -> None:
    """Write config.json, one model.safetensors and the model's own code.

    `generation`: the text of generation_config.json; None: there is none. Raises OSError on a full
    disk.
    """
    from transformers import GenerationConfig

    # the model's own may fail today's validation: `generation` replaces it
    model.generation_config = GenerationConfig()
    with quiet(), as_os_error(folder / WEIGHTS):
        model.save_pretrained(folder, max_shard_size=ONE_FILE)
    if generation is None:
        (folder / GENERATION).unlink(missing_ok=True)
    else:
        (folder / GENERATION).write_text(generation, encoding="utf-8")
    clean(folder / CONFIG)
    mode = (folder / CONFIG).stat().st_mode
    # transformers leaves the mode of a temporary file, readable by its owner only
    (folder / WEIGHTS).chmod(mode)


def generation_of(folder: Path) -> str | None:
    """The text of generation_config.json, if there is one."""
    path = folder / GENERATION
    return path.read_text(encoding="utf-8") if path.is_file() else None


def rope_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary settings of a config by the names that transformers 4, mlx-lm and others read.

    transformers 5 writes them as `rope_parameters` alone. Programs that do not know it take their
    own defaults, and answer differently without a word. {} if layers have different ones: those
    never had such names.
    """
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict) or "rope_theta" not in rope:
        return {}
    top = {key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope}
    scaling = {key: value for key, value in rope.items() if key not in top}
    if scaling.get("rope_type", "default") != "default":
        top["rope_scaling"] = scaling
    return top


def clean(path: Path) -> None:
    """Remove from a config what names this machine, and a reference to code that was not copied.

    Rotary settings get their former names too.
    """
    old = read_json(path, "Import it again")
    new = {key: value for key, value in old.items() if not OF_THIS_MACHINE.search(key)}
    new |= rope_settings(new)
    if not any(path.parent.glob(CODE)):
        new.pop("auto_map", None)
    if new != old:
        write_json(path, new)


@contextmanager
def reported(name: str, trusted: bool, hint: str = AGAIN) -> Iterator[None]:
    """Raise what a library or a model's own code raises as one UserError.

    A full disk or memory stays what it is.
    """
    try:
        yield
    except Exception as error:
        is_full = isinstance(error, OSError) and error.errno in FULL
        if isinstance(error, UserError) or is_full or is_out_of_memory(error):
            raise
        because = first_line(error).rstrip(".")
        if "trust_remote_code" in str(error) and not trusted:
            because = "it needs code that comes with it"
            hint = (
                "If you have read and trust it, set import.trust_remote_code: true, or pass "
                "--trust-remote-code"
            )
        raise UserError(f"{name} cannot be opened: {because}. {hint}.") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' progress bars and warnings; errors are still raised."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
