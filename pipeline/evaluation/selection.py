"""Which adapter of a sweep to take: by its held-out loss, and by how far it went from the base."""

from collections.abc import Mapping
from functools import partial
from math import isfinite, isnan, log, nan
from typing import Any

from pipeline.errors import UserError
from pipeline.project.logs.run_log import DIVERGED
from pipeline.project.params.schema import Section, ValueSource, check_value, hints

Rows = Mapping[str, Mapping[str, Any]]  # adapter → its row of sweep.json


def loss_of(row: Mapping[str, Any]) -> float | None:
    """The held-out loss, without an evaluation set the training loss.

    None of an adapter that diverged, and of one that halving stopped: its settings would train to
    the end.
    """
    loss = row["final_loss"] if row["eval_loss"] is None else row["eval_loss"]
    return (
        None
        if loss is None or not isfinite(loss) or row["state"] == DIVERGED or row.get("dropped")
        else loss
    )


def pareto(rows: Rows) -> set[str]:
    """The adapters that no other beats: none has a lower loss without a larger divergence, or the
    reverse.
    """
    points = {
        name: (loss, row["divergence"])
        for name, row in rows.items()
        if (loss := loss_of(row)) is not None and row.get("divergence") is not None
    }
    return {
        name
        for name, own in points.items()
        if not any(
            other != own and other[0] <= own[0] and other[1] <= own[1] for other in points.values()
        )
    }


def choose(rows: Rows, max_divergence: float | None = None) -> str:
    """The adapter with the lowest loss, among those that diverge from the base by at most
    `max_divergence`.

    Raises UserError if there is none, or if divergence was not measured.
    """
    losses = {name: loss for name, row in rows.items() if (loss := loss_of(row)) is not None}
    if max_divergence is not None:
        divergences = {name: float(rows[name].get("divergence", nan)) for name in losses}
        if any(map(isnan, divergences.values())):
            raise UserError(
                "--max-divergence needs the divergence from the base, which was not measured. Set "
                "evaluate.old_data, "
                "or finetune_sweep.old_data, to a file of texts."
            )
        losses = {
            name: loss for name, loss in losses.items() if divergences[name] <= max_divergence
        }
        if not losses:
            least = min(divergences, key=divergences.__getitem__)
            raise UserError(
                f"--max-divergence {max_divergence:g}: no adapter is that close to the base. The "
                f"closest is {least}, "
                f"{divergences[least]:.4g}. Raise it."
            )
    if not losses:
        raise UserError("No adapter of the sweep has a finite loss. Lower the learning rates.")
    return min(losses, key=losses.__getitem__)


def beyond(
    rows: Rows, best: str, grid: Any, settings: type[Section]
) -> dict[str, tuple[str, list[Any]]]:
    """Swept key → "lowest" or "highest", and values to go on with, where the best adapter has the
    last number tried.

    `settings`: the section whose keys are swept.

    Left out: a key that may go no further, such as rank 1; the seed, whose numbers have no order;
    what was drawn from the middle of a range, of which the last number is chance.
    """
    searched = [grid] if isinstance(grid, Mapping) else grid
    ranges = {
        key: options
        for each in searched
        for key, options in each.items()
        if isinstance(options, Mapping)
    }
    found: dict[str, tuple[str, list[Any]]] = {}
    for key, value in rows[best]["values"].items():
        tried = sorted(
            {row["values"][key] for row in rows.values() if _is_number(row["values"].get(key))}
        )
        if key == "seed" or len(tried) < 2 or value not in (tried[0], tried[-1]):
            continue
        if key in ranges and not _is_near_end(value, **ranges[key]):
            continue
        edge, near = ("lowest", tried[1]) if value == tried[0] else ("highest", tried[-2])
        further = [
            *dict.fromkeys([value, *filter(partial(_is_valid, settings, key), _steps(near, value))])
        ]
        if len(further) > 1:
            found[key] = edge, further
    return found


def _is_near_end(value: float, low: float, high: float, **scale: bool) -> bool:
    """Whether a number is in the outer tenths of a range."""
    if scale["log"]:
        value, low, high = log(value), log(low), log(high)
    return not 0.1 < (value - low) / (high - low) < 0.9


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _steps(near: Any, value: Any) -> list[Any]:
    """The two numbers that go on from `near` to `value` and beyond, by the same factor."""
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
