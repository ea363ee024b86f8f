"""Which adapter of a sweep to take: by its held-out loss and its divergence from the base."""

from collections.abc import Mapping
from math import isfinite, isnan, log, nan
from typing import Any

from pipeline.errors import UserError
from pipeline.project.logs.run_log import DIVERGED
from pipeline.project.params.schema import Section, ValueSource, check_value, hints

Rows = Mapping[str, Mapping[str, Any]]  # adapter → its row of sweep.json


def loss_of(row: Mapping[str, Any]) -> float | None:
    """The held-out loss; without an evaluation set, the training loss.

    None for an adapter that diverged, and for one that halving stopped early.
    """
    loss = row["final_loss"] if row["eval_loss"] is None else row["eval_loss"]
    if row["state"] == DIVERGED or row.get("dropped") or loss is None or not isfinite(loss):
        return None
    return float(loss)


def pareto(rows: Rows) -> set[str]:
    """The adapters that no other beats: better in loss or divergence, and not worse in either."""
    points: dict[str, tuple[float, float]] = {}
    for name, row in rows.items():
        loss, divergence = loss_of(row), row.get("divergence")
        if loss is not None and divergence is not None:
            points[name] = loss, divergence

    def is_beaten(point: tuple[float, float]) -> bool:
        loss, divergence = point
        return any(
            other != point and other[0] <= loss and other[1] <= divergence
            for other in points.values()
        )

    return {name for name, point in points.items() if not is_beaten(point)}


def choose(rows: Rows, max_divergence: float | None = None) -> str:
    """The adapter with the lowest loss whose divergence from the base is at most `max_divergence`.

    Raises UserError if there is none, or if divergence was not measured.
    """
    every = {name: loss_of(row) for name, row in rows.items()}
    losses = {name: loss for name, loss in every.items() if loss is not None}
    if not losses:
        raise UserError("No adapter of the sweep has a finite loss. Lower the learning rates.")
    if max_divergence is not None:
        divergences = {name: float(rows[name].get("divergence", nan)) for name in losses}
        if any(map(isnan, divergences.values())):
            raise UserError(
                "--max-divergence needs the divergence from the base, which was not measured. Set "
                "evaluate.old_data, or finetune_sweep.old_data, to a file of texts."
            )
        losses = {
            name: loss for name, loss in losses.items() if divergences[name] <= max_divergence
        }
        if not losses:
            least = min(divergences, key=divergences.__getitem__)
            raise UserError(
                f"--max-divergence {max_divergence:g}: no adapter is that close to the base. The "
                f"closest is {least}, {divergences[least]:.4g}. Raise it."
            )
    return min(losses, key=losses.__getitem__)


def beyond(
    rows: Rows, best: str, grid: Any, settings: type[Section]
) -> dict[str, tuple[str, list[Any]]]:
    """Swept keys whose best value is the lowest or highest tried, and values to try beyond it.

    Key → "lowest" or "highest", and these values. `settings`: the section whose keys are swept.
    Left out: a key that can go no further, such as rank 1; the seed, whose numbers have no order;
    a number drawn from the middle of a range, which is the last only by chance.
    """
    ranges: dict[str, Any] = {}
    for searched in [grid] if isinstance(grid, Mapping) else grid:
        ranges |= {key: span for key, span in searched.items() if isinstance(span, Mapping)}

    edges: dict[str, tuple[str, list[Any]]] = {}
    for key, value in rows[best]["values"].items():
        values = {row["values"].get(key) for row in rows.values()} if _is_number(value) else ()
        tried = sorted(filter(_is_number, values))
        if key == "seed" or len(tried) < 2 or value not in (tried[0], tried[-1]):
            continue
        if key in ranges and not _is_near_end(value, **ranges[key]):
            continue
        edge, near = ("lowest", tried[1]) if value == tried[0] else ("highest", tried[-2])
        further = [
            number
            for number in dict.fromkeys(_steps(near, value))
            # a rounded step may lead back
            if (number - value) * (value - near) > 0 and _is_valid(settings, key, number)
        ]
        if further:
            edges[key] = edge, [value, *further]
    return edges


def _is_near_end(value: float, low: float, high: float, **scale: bool) -> bool:
    """Whether a number is in the outer tenths of a range."""
    if scale["log"]:
        value, low, high = log(value), log(low), log(high)
    return not 0.1 < (value - low) / (high - low) < 0.9


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _steps(near: Any, value: Any) -> list[Any]:
    """The next two numbers after `near` and `value`, by the factor between them."""
    ratio = value / near if near and value else 0
    numbers = [value * ratio, value * ratio**2] if ratio else [value + (value - near)]
    if isinstance(value, int):
        return [round(number) for number in numbers]
    return [float(f"{number:.2g}") for number in numbers]


def _is_valid(settings: type[Section], key: str, value: Any) -> bool:
    try:
        check_value(hints(settings)[key], value, key, ValueSource(""))
    except UserError:
        return False
    return True
