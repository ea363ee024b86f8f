"""Which adapter of a sweep to take: by its held-out loss, and by how far it went from the base."""

from collections.abc import Mapping
from math import isfinite, isnan, nan
from typing import Any

from pipeline.errors import UserError
from pipeline.project.logs.run_log import DIVERGED

Rows = Mapping[str, Mapping[str, Any]]  # adapter → its row of sweep.json


def loss_of(row: Mapping[str, Any]) -> float | None:
    """The held-out loss, without an evaluation set the training loss.

    None of an adapter that diverged, and of one that halving stopped: its settings would train to the end.
    """
    loss = row["final_loss"] if row["eval_loss"] is None else row["eval_loss"]
    return None if loss is None or not isfinite(loss) or row["state"] == DIVERGED or row.get("dropped") else loss


def pareto(rows: Rows) -> set[str]:
    """The adapters that no other beats: none has a lower loss without a larger divergence, or the reverse."""
    points = {
        name: (loss, row["divergence"])
        for name, row in rows.items()
        if (loss := loss_of(row)) is not None and row.get("divergence") is not None
    }
    return {
        name
        for name, own in points.items()
        if not any(other != own and other[0] <= own[0] and other[1] <= own[1] for other in points.values())
    }


def choose(rows: Rows, max_divergence: float | None = None) -> str:
    """The adapter with the lowest loss, among those that diverge from the base by at most `max_divergence`.

    Raises UserError if there is none, or if divergence was not measured.
    """
    losses = {name: loss for name, row in rows.items() if (loss := loss_of(row)) is not None}
    if max_divergence is not None:
        divergences = {name: float(rows[name].get("divergence", nan)) for name in losses}
        if any(map(isnan, divergences.values())):
            raise UserError(
                "--max-divergence needs the divergence from the base, which was not measured. Set evaluate.old_data, "
                "or finetune_sweep.old_data, to a file of texts."
            )
        losses = {name: loss for name, loss in losses.items() if divergences[name] <= max_divergence}
        if not losses:
            least = min(divergences, key=divergences.__getitem__)
            raise UserError(
                f"--max-divergence {max_divergence:g}: no adapter is that close to the base. The closest is {least}, "
                f"{divergences[least]:.4g}. Raise it."
            )
    if not losses:
        raise UserError("No adapter of the sweep has a finite loss. Lower the learning rates.")
    return min(losses, key=losses.__getitem__)
