"""One file a tracker, found by its name. Reading it imports nothing of the tracker's library.

A tracker's file has LIBRARY, the module that must be installed; FOLDER, where it keeps its runs,
relative to the project's; VIEW, what shows them; and a class Tracker.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pipeline.extensions import Registry
from pipeline.project.logs.run_log import Sample


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker is told of a run. Names and texts are printable, values are finite."""

    project: str
    place: str  # the stage, for a sweep stage/adapter
    name: str  # unique, and the same again when the run resumes
    params: Mapping[str, bool | int | float | str]
    folder: Path
    is_new: bool  # whether the tracker has nothing of it yet


class Tracker(Protocol):
    """A run as its tracker has it. A method may raise anything, or hang."""

    def __init__(self, run: TrackedRun) -> None: ...
    def log(self, step: int, values: Mapping[str, float]) -> None: ...
    def log_text(self, step: int, samples: Sequence[Sample]) -> None: ...
    def flush(self) -> None:
        """Called after every batch: whoever looks at the tracker now sees it."""

    def finish(self, state: str) -> None:
        """The run is done, stopped or failed."""


TRACKERS = Registry[Any]("tracker")  # name → module
