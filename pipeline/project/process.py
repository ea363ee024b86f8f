"""What this process was told: its rank, by torchrun's variables, and its device, by name.

`pipeline/models/device.py` decides what that device is on this machine. `--device` wins over the
environment's LORA_DEVICE, that over `device:` of the params file. The option is put into the
environment, where the processes that this one starts find it: torchrun's workers, the stages of
`dvc repro`, the terminal app's engine. It is no setting of a stage, so it is in no cache key: what
one device made is a result for all.
"""

import gc
import os
import re
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from pipeline.errors import UserError

WORK = "LORA_WORK"  # environment variable of a unit of a fleet: its folder
MOST_PROCESSES = 2**20
USUAL = gc.get_threshold()
POSTPONED = 1_000_000  # objects; torch, transformers and a model's classes make 700,000


def postpone_collection() -> None:
    """Let Python import without looking for garbage, which takes a seventh of that time."""
    gc.set_threshold(POSTPONED)


def resume_collection() -> None:
    """After `postpone_collection`, look for garbage as usual, but not in what was imported.

    To be called before a model is built: what is there now is never looked through again, and a
    model whose modules refer to each other could not be freed.
    """
    if gc.get_threshold()[0] == POSTPONED:
        gc.freeze()
        gc.set_threshold(*USUAL)


def exit_code(error: UserError | type[UserError]) -> int:
    """That of a process which ends with this error."""
    return error.unit_code if WORK in os.environ else 1


class ProcessRank(NamedTuple):
    """`rank` of `world_size` processes, `local_rank` of `local_world_size` on this machine."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int

    @property
    def is_main_process(self) -> bool:
        """Whether this is rank 0, which writes files and prints."""
        return self.rank == 0

    @property
    def reports_errors(self) -> bool:
        """Whether this is the first process on its machine, which says there why a run ends."""
        return self.local_rank == 0


def world() -> ProcessRank:
    """This process's rank; rank 0 of 1 without torchrun. Raises UserError for wrong variables."""
    size = _number("WORLD_SIZE", 1, least=1)
    rank = _number("RANK", 0, below=size)
    local_size = _number("LOCAL_WORLD_SIZE", size, least=1, below=size + 1)
    return ProcessRank(rank, size, _number("LOCAL_RANK", rank, below=local_size), local_size)


def _number(variable: str, default: int, least: int = 0, below: int = MOST_PROCESSES) -> int:
    """The value of an environment variable of torchrun's."""
    text = os.environ.get(variable, "").strip()
    number = int(text) if re.fullmatch(r"[0-9]{1,9}", text) else -1
    if text and not least <= number < below:
        raise UserError(
            f"{variable} must be a whole number from {least} to {below - 1}, got {text!r}. "
            "torchrun sets it: start with it, or unset the variable."
        )
    return number if text else default


def open_streams() -> None:
    """Open the null device in place of a standard stream that is closed, as by `<&-`.

    The next file that is opened would get its number, and what is printed would go into that file.
    """
    for number, (name, mode) in enumerate({"stdin": "r", "stdout": "w", "stderr": "w"}.items()):
        try:
            os.fstat(number)
        except OSError:
            # it gets the lowest number that is free
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
            stream = os.fdopen(number, mode, encoding="utf-8", closefd=False)
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)


def require_current_folder() -> None:
    """Raises UserError if the current folder was removed: no library loads there."""
    try:
        Path.cwd()
    except FileNotFoundError:
        raise UserError(
            "The current folder was removed. Change to one that exists, such as by `cd ~`."
        ) from None


def hangs_up() -> bool:
    """Whether this process ends with its terminal: not under nohup, which ignores SIGHUP."""
    return signal.getsignal(signal.SIGHUP) != signal.SIG_IGN


VARIABLE = "LORA_DEVICE"
AUTO = "auto"
RULE = "auto, cpu, cuda, cuda:N or mps"


class DeviceSetting(NamedTuple):
    """A name as it was given, right or wrong, and what gave it."""

    name: str
    source: str


_of_params: DeviceSetting | None = None  # of the project that was opened last
_by_option = False


def is_valid(name: str) -> bool:
    """Whether `name` keeps to RULE."""
    # torch refuses a leading zero, and takes cuda:256 for cuda:0
    return re.fullmatch(r"auto|cpu|mps|cuda(:(0|[1-9][0-9]?))?", name) is not None


def ask(name: str) -> None:
    """The value of `--device`, for this process and those that it starts."""
    global _by_option
    os.environ[VARIABLE], _by_option = name, True


def prefer(name: str, source: str) -> None:
    """The value of `device:` in the params file `source`."""
    global _of_params
    _of_params = DeviceSetting(name, f"device in {source}")


def asked() -> DeviceSetting:
    """The setting that counts; its name is AUTO if there is none."""
    global _of_params
    if name := os.environ.get(VARIABLE):
        return DeviceSetting(name, "--device" if _by_option else VARIABLE)
    if _of_params is None:
        _of_params = _of_current_folder()
    return _of_params


def environment() -> dict[str, str]:
    """The environment for a process that opens no project, and so cannot read `device:` itself."""
    name = asked().name
    return dict(os.environ) if name == AUTO else {**os.environ, VARIABLE: name}


def _of_current_folder() -> DeviceSetting:
    """The setting for commands that open no project, which a wrong params file does not concern."""
    from pipeline.files import strict_yaml

    with suppress(OSError, ValueError):
        tree = strict_yaml.load(Path("params.yaml").read_text(encoding="utf-8"))
        if isinstance(tree, dict) and "device" in tree:
            return DeviceSetting(str(tree["device"]), "device in params.yaml")
    return DeviceSetting(AUTO, "the default")
