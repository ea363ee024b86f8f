"""What a sweep measured: its table, as plain values."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.evaluation.comparison import (
    MISSING,
)
from pipeline.evaluation.selection import beyond, choose, loss_of, pareto
from pipeline.files.artifact import read_json, read_manifest, sealed_digest
from pipeline.inference.catalog import Measurements, measured
from pipeline.project.logs.run_log import TABLE
from pipeline.project.stage_graph import ARTIFACTS, Project
from pipeline.views.evaluations import KEPT

SWEEP = "finetune_sweep"


@dataclass(frozen=True)
class Trial:
    """An adapter of a sweep, and what was measured of it.

    `loss`: None if it diverged or the search stopped it. `front`: no other has a better loss or
    divergence and is worse in neither. `kept`: the share of old answers that an evaluation of
    exactly these weights measured.
    """

    name: str
    path: Path
    base: Path
    values: Mapping[str, Any]  # swept key → its value
    loss: float | None
    divergence: float | None
    kept: float | None
    trainable: int
    state: str
    front: bool
    best: bool

    @property
    def run(self) -> str:
        """The run of its training."""
        return f"{SWEEP}/{self.name}"


@dataclass(frozen=True)
class Sweep:
    """A sweep as its sweep.json has it.

    `keys`: those in which its adapters differ. `held_out`: whether the losses are of held-out data.
    """

    trials: Sequence[Trial]
    keys: Sequence[str]
    held_out: bool
    # such as `learning_rate highest`: where the best has the last value tried
    edges: Sequence[str] = ()

    @property
    def diverges(self) -> bool:
        """Whether the divergence from the base was measured."""
        return any(trial.divergence is not None for trial in self.trials)


def read_sweep(project: Project) -> Sweep | None:
    """The project's sweep; None if it has none. Raises UserError for a file that holds something
    else.
    """
    folder = project.artifact(SWEEP)
    path = folder / TABLE
    if not path.is_file():
        return None
    rows = read_json(path, "Run `lora finetune sweep` again")
    try:
        front, measurements = pareto(rows), measured([project.root / ARTIFACTS])
        try:
            best = choose(rows)
        except UserError:  # no loss is finite
            best = ""
        trials = [
            Trial(
                name=name,
                path=folder / Path(name).name,  # a name from a file must not lead elsewhere
                base=project.artifact("expand_vocab"),
                values=dict(row["values"]),
                loss=loss_of(row),
                divergence=_finite(row.get("divergence")),
                kept=_kept(folder / Path(name).name, measurements),
                trainable=int(row["trainable"]),
                state="dropped" if row.get("dropped") else str(row["state"]),
                front=name in front,
                best=name == best,
            )
            for name, row in rows.items()
        ]
        held_out = any(row["eval_loss"] is not None for row in rows.values())
    except (KeyError, TypeError, AttributeError, ValueError):
        raise UserError(f"{path} holds no sweep. Run `lora finetune sweep` again.") from None
    edges: list[str] = []
    # stays empty if the manifest does not tell what was searched, or no adapter has a loss
    with suppress(UserError, KeyError, TypeError, ValueError, AttributeError):
        grid = read_manifest(folder)["params"]["grid"]
        found = beyond(rows, best, grid, type(project.params.finetune_lora))
        edges = [f"{key} {edge}" for key, (edge, _) in found.items()]
    names = dict.fromkeys(key for trial in trials for key in trial.values)
    keys = [key for key in names if len({repr(trial.values.get(key)) for trial in trials}) > 1]
    return Sweep(trials, keys, held_out, edges)


def _kept(adapter: Path, measurements: Measurements) -> float | None:
    try:
        return KEPT[0].of(measurements[sealed_digest(read_manifest(adapter))])
    except (UserError, KeyError, TypeError, AttributeError):  # it diverged, or was not evaluated
        return None


def _finite(value: Any) -> float | None:
    return float(value) if value is not None and isfinite(value) else None


def value_text(value: Any) -> str:
    """A value of a grid: numbers in four digits, lists and mappings in their words."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return " ".join(map(value_text, value))
    if isinstance(value, Mapping):
        return " ".join(f"{key}={value_text(item)}" for key, item in value.items())
    return MISSING if value is None else str(value)
