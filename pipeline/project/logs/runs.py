"""What a training run leaves: its settings, and a log for each of its curves."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.files.text import natural_sort_key
from pipeline.project.logs.run_log import LOSS, SAMPLES, TELEMETRY


@dataclass(frozen=True)
class LogFiles:
    """The log of one curve, and its telemetry if that is read too; the files may be missing."""

    name: str  # the adapter's in a sweep, else empty
    loss: Path
    telemetry: Path | None

    @property
    def samples(self) -> Path:
        return self.loss.with_name(SAMPLES)


@dataclass(frozen=True)
class Run:
    """One training run: one curve, or one per adapter of a sweep."""

    stage: str
    label: str
    log_folder: Path  # with the logs: the run folder, an artifact, or the cache's copy of one
    curves: tuple[LogFiles, ...]
    folder: Path | None  # the run folder of the stage's last run, which may still be running
    params: Mapping[str, Any]  # the settings it ran with, as in JSON
    when: float  # the logs' last change in seconds since the epoch
    sweeps: bool = False
    # its artifact's key in the cache, and the digest of the artifact's contents; "" without one
    key: str = ""
    digest: str = ""
    names: tuple[str, ...] = ()  # that --name gave it
    # the steps whose models its artifact keeps, and the best of them, if they were evaluated
    checkpoints: tuple[int, ...] = ()
    best: int | None = None
    units: Mapping[int, Path] = field(default_factory=dict)  # of a fleet, by number: their folders

    @property
    def name(self) -> str:
        """Its names in one text; empty without one."""
        return ", ".join(self.names)

    def curve_label(self, curve: str) -> str:
        """The label of one of its curves, unique among all runs, after the run's own name."""
        label = f"{self.name}: {self.label}" if self.name else self.label
        return f"{label}, {curve}" if curve else label


def curves(folder: Path, sweeps: bool, telemetry: bool = True) -> tuple[LogFiles, ...]:
    """The curves with logs in `folder`: one, or one per adapter of a sweep."""
    folders = [folder]
    if sweeps:
        logs = folder.glob(f"[!.]*/{LOSS}")
        folders = sorted((log.parent for log in logs), key=lambda path: natural_sort_key(path.name))
    return tuple(
        LogFiles("" if at == folder else at.name, at / LOSS, at / TELEMETRY if telemetry else None)
        for at in folders
    )
