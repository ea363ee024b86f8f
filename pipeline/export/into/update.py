"""What of an update survives rounding: stored codes before and after, and what they stand for."""

from typing import Any, NamedTuple

from torch import Tensor


class Stored(NamedTuple):
    """A quantized matrix."""

    codes: Tensor | None  # (O, I); None where their layout is not known
    values: Tensor  # (O, I)


def survival(weight: Tensor, merged: Tensor, before: Stored, after: Stored) -> dict[str, Any]:
    """How W + Δ is stored, `after`, and how W is, `before`; shares are None where Δ or a step is 0.

    `contained`: ⟨Q(W + Δ) − W, Δ⟩ / ⟨Δ, Δ⟩. `lost`: ‖Q(W + Δ) − Q(W) − Δ‖ / ‖Δ‖. `share_of_step`:
    rms(Δ) / rms(Q(W) − W).
    """
    update = (merged - weight).double()
    size, step = float(update.norm()), float((before.values - weight).norm())
    result: dict[str, Any] = {"codes_changed": None, "rows_changed": None}
    if before.codes is not None and after.codes is not None:
        changed = before.codes != after.codes
        result["codes_changed"] = float(changed.double().mean())
        result["rows_changed"] = float(changed.any(1).double().mean())
    dot = float(((after.values - weight) * update).sum())
    off = float((after.values.double() - before.values - update).norm())
    return result | {
        "contained": dot / size**2 if size else None,
        "lost": off / size if size else None,
        "share_of_step": size / step if step else None,
    }
