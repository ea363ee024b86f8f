"""The exceptions that end a command early on purpose, and messages for a lack of libraries, memory
or disk space.
"""

import errno
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

# lack of space, as opposed to faulty input
FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


# Exit codes of a unit of a fleet, by which its engine goes on; elsewhere they are 1. sysexits calls
# them EX_TEMPFAIL and EX_OSERR.
AGAIN, NO_MEMORY = 75, 71
LONGEST_MESSAGE = 2_000  # characters of a line
# Characters that a terminal executes instead of showing: C0 and C1 control characters, DEL and
# bidirectional controls; and those that end a line. C0 characters have a Unicode control picture.
CONTROL = {code: chr(0x2400 + code) for code in range(32)} | {0x7F: "␡"}
CONTROL |= dict.fromkeys(
    (*range(0x80, 0xA0), 0x2028, 0x2029, *range(0x202A, 0x202F), *range(0x2066, 0x206A)), "\ufffd"
)


class UserError(Exception):
    """An error that the user can fix. The exit code is 1.

    The message says what is wrong and what to do next; each argument is one of its lines. It may
    quote names and values of files from elsewhere. Signs replace control characters in them, and
    line breaks that would fake a second message; an ellipsis replaces the middle of a long line.
    """

    unit_code = 1  # the exit code in a unit of a fleet

    def __init__(self, *lines: str) -> None:
        super().__init__(*map(_one_line, lines))

    def __str__(self) -> str:
        return "\n".join(self.args)


def _one_line(text: str) -> str:
    if len(text) > LONGEST_MESSAGE:
        text = f"{text[: LONGEST_MESSAGE - 501]}…{text[-500:]}"  # the next step is at the end
    return text if text.isprintable() else text.translate(CONTROL)


class Lost(UserError):
    """A process or a machine that the run needs is gone: the same command goes on."""

    unit_code = AGAIN


class OutOfMemory(UserError):
    """Memory ran out, on any device: less work at once would fit."""

    unit_code = NO_MEMORY


class Interrupted(Exception):
    """A signal stopped the work between two steps. The exit code is 128 + signal.

    `message` says after which step. `resumes`: whether the same command goes on from there.
    """

    def __init__(self, signal_number: int, message: str, resumes: bool = True) -> None:
        super().__init__(message)
        self.signal_number, self.resumes = signal_number, resumes


# messages of CUDA, MPS and CPU, of CUDA's libraries, and of NCCL, which gives no reason
_OUT_OF_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "_STATUS_ALLOC_FAILED",
    "Failed to CUDA calloc",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on any device. Decided by the message, so that torch need not be
    imported.
    """
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)
    )


def first_line(error: BaseException) -> str:
    """The first line of an error's message, cut to 300 characters; its type if it has no message.

    After a colon the next line is part of it.
    """
    lines = str(error).split("\n") if str(error).strip() else [type(error).__name__]
    lines = [line.strip() for line in lines if line.strip()]
    return " ".join(lines[: 1 + lines[0].endswith(":")])[:300]


def path_problem(error: BaseException) -> UserError | None:
    """What the user can mend in what pathlib raises as RuntimeError; None for any other error."""
    text = str(error) if isinstance(error, RuntimeError) else ""
    # from Python 3.13 on, it is the system that reports a loop, as an OSError
    if text.startswith("Symlink loop from "):
        path = text.removeprefix("Symlink loop from ")
        return UserError(
            f"{path} is a loop of symbolic links, which leads to no file. Name another path."
        )
    if text.startswith("Could not determine home directory"):
        return UserError(
            "~ must be followed by / or by a user who has a home folder. Name the path without ~."
        )
    return None


def explain(error: OSError) -> str:
    """The message of an OSError, such as `No space left on device: PATH. Free some space.`

    The reason comes first: tables may cut the rest.
    """
    path = f": {error.filename}" if error.filename else ""
    return f"{error.strerror or error}{path}.{' Free some space.' if error.errno in FULL else ''}"


class Needs(NamedTuple):
    """What needs libraries of an extra: a command or a setting, such as `lora serve`."""

    extra: str
    libraries: tuple[str, ...]  # names of distributions, as in pyproject.toml
    without: str = ""  # what it does without them; empty: it ends with a UserError


_LLAMA_CPP = "llama-cpp-py-sync"
# the only list of what needs which extra: `lora doctor`, docs/reference/extras.md and error messages read this
OPTIONAL = {
    "base: MODEL.gguf": Needs("gguf", ("gguf", "sentencepiece", "protobuf", "accelerate")),
    "lora export --format gguf": Needs("gguf", ("gguf",)),
    "lora export --format gguf, compared": Needs(
        "llama-cpp", (_LLAMA_CPP,), "exports, and compares nothing"
    ),
    "lora export --quantize q4_k_m": Needs("llama-cpp", (_LLAMA_CPP,)),
    "lora export --format mlx, compared": Needs(
        "mlx", ("mlx-lm", "mlx"), "exports, and compares nothing"
    ),
    "lora merge --into q4_k_m, q8_0": Needs("llama-cpp", (_LLAMA_CPP,)),
    "lora merge --into nf4": Needs("qlora", ("bitsandbytes",)),
    "lora certify --in peft==0.18": Needs("certify", ("uv",), "takes a uv of the path"),
    "quantization: int8": Needs("qlora", ("bitsandbytes",)),
    "quantization: nf4, nf4-dq": Needs("qlora", ("bitsandbytes",), "quantizes more slowly"),
    "training on a CUDA GPU": Needs("gpu", ("liger-kernel", "bitsandbytes"), "trains more slowly"),
    "data: ORG/NAME": Needs("datasets", ("datasets",)),
    "search: optuna": Needs("optuna", ("optuna",)),
    "sampler: gp, qmc": Needs("optuna", ("scipy",)),
    "lora serve": Needs("serve", ("starlette", "uvicorn", "prometheus-client")),
    "response_format": Needs("serve", ("llguidance",)),
    "lora evaluate --harness": Needs("harness", ("lm-eval",)),
    "engine: ray": Needs("ray", ("ray",)),
    "lora-tui --web": Needs("web", ("textual-serve",)),
    **{
        f"report_to: {library}": Needs("trackers", (library,), "a note, and the run goes on")
        for library in ("tensorboard", "trackio", "wandb", "mlflow", "dvclive")
    },
}


def install_command(extra: str) -> str:
    """The command that installs an extra into this environment: of pipx, of uv, or any other."""
    name, prefix = f"'lora-workbench[{extra}]'", Path(sys.prefix)
    if (prefix / "pipx_metadata.json").exists():
        return f"pipx runpip lora-workbench install {name}"
    if (prefix / "uv-receipt.toml").exists():
        return f"uv pip install --python {prefix} {name}"
    return f"pip install {name}"


def missing_libraries(user: str) -> list[str]:
    """The libraries that a key of OPTIONAL needs and that are not installed."""
    missing = []
    for library in OPTIONAL[user].libraries:
        module = {"protobuf": "google.protobuf"}.get(library, library.replace("-", "_"))
        try:
            spec = find_spec(module)
        except ModuleNotFoundError:  # its parent package is missing
            spec = None
        if spec is None:
            missing.append(library)
    return missing


def require(user: str, subject: str = "", otherwise: str = "") -> None:
    """Raises UserError if a library is missing that a key of OPTIONAL needs.

    `subject` is the message's subject if not `user`; `otherwise`, how to do without, such as `or
    set …`.
    """
    if missing := missing_libraries(user):
        install = install_command(OPTIONAL[user].extra)
        raise UserError(
            f"{subject or user} needs {' and '.join(missing)}. Run `{install}`{otherwise}."
        )
