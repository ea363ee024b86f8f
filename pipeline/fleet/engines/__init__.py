"""What runs units. An engine is a file here with `ENGINE`, a class; `Engine` says what it has."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from pipeline.extensions import Registry


class Submission(Protocol):
    """What an engine reads of a run."""

    folder: Path
    cluster: str  # its name in fleet.yaml
    root: Path  # the project's folder
    jobs: list[tuple[str, list[int]]]  # what the engine named its jobs, with their units

    @property
    def name(self) -> str: ...

    def unit_folder(self, number: int) -> Path: ...


class Queued(NamedTuple):
    """What an engine knows of a unit."""

    state: Literal["queued", "running", "stopped", "no memory"]
    node: str = ""
    reason: str = ""  # why it waits or was stopped, in the engine's words


class Place(NamedTuple):
    """Where units run."""

    at_once: int  # units, at most
    device: str  # of a unit, in words
    memory: int = 0  # bytes that a unit has for its tensors; 0: not known
    is_shared: bool = False  # whether a unit alone would use what several share


class Engine(Protocol):
    """Made with a cluster's name and settings. Errors are UserError, with the key of fleet.yaml."""

    has_gangs: bool  # whether several machines run a unit together
    has_queue: bool  # whether units go on when the command that submitted them has ended
    unread: Collection[str]  # keys of fleet.yaml that would do nothing

    def __init__(self, name: str, cluster: Any) -> None: ...

    def check(self) -> None:
        """Raises UserError if the engine is not here."""

    def place(self) -> Place:
        """What its units get."""

    def submit(self, run: Submission, numbers: Collection[int]) -> str:
        """Start these units, or put them into the queue; returns the job's name."""

    def states(self, run: Submission, numbers: Collection[int]) -> Mapping[int, Queued]:
        """What is known of units that have not ended; those that nothing is known of are lost."""

    def cancel(self, run: Submission, numbers: Collection[int]) -> None:
        """Stop these units. They write a checkpoint where they can."""

    def follow(self, run: Submission, script: str) -> None:
        """Run a shell script once all jobs of the run have ended, in its queue."""


def place_of(cluster: Any, at_once: int, otherwise: str) -> Place:
    """What fleet.yaml gives a unit; `otherwise`: its device if that names none."""
    device = otherwise
    if cluster.gpus:
        device = f"{cluster.gpus} GPU{'s' * (cluster.gpus > 1)}"
    elif cluster.cpus:
        device = f"{cluster.cpus} core{'s' * (cluster.cpus > 1)}"
    memory = 0 if cluster.gpus or not cluster.memory else bytes_of(cluster.memory)
    return Place(at_once, device, memory)


def bytes_of(size: str) -> int:
    """Of a size as fleet.yaml has it, such as 32G."""
    power: int = 1024 ** (1 + "KMGT".index(size[-1]))
    return int(size[:-1]) * power


ENGINES = Registry[type[Engine]]("engine")
