"""What runs units. An engine is a file here with `ENGINE`, a class; `Engine` says what it has."""

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

from pipeline.extensions import Registry

if TYPE_CHECKING:
    from pipeline.fleet.run import FleetRun


class Queued(NamedTuple):
    """What an engine knows of a unit."""

    state: Literal["queued", "running", "stopped", "lost"]
    node: str = ""
    reason: str = ""  # why it waits or was stopped, in the engine's words


class Engine(Protocol):
    """Made with the cluster's settings. Errors are UserError, with the key of fleet.yaml."""

    def __init__(self, cluster: Any) -> None: ...

    def check(self) -> None:
        """Raises UserError if the engine is not here."""

    def submit(self, run: "FleetRun", numbers: Collection[int]) -> str:
        """Start these units, or put them into the queue; returns the job's name."""

    def states(self, run: "FleetRun", numbers: Collection[int]) -> Mapping[int, Queued]:
        """What is known of units that have not ended; those that nothing is known of are lost."""

    def cancel(self, run: "FleetRun", numbers: Collection[int]) -> None:
        """Stop these units. They write a checkpoint where they can."""


ENGINES = Registry[type[Engine]]("engine")
