"""The check of a merge: how many times each matrix received its update.

It is measured on the written files, not on the way there: a block at a wrong place, or one written
twice, shows too. What it found is stored in the folder's certificate.json.
"""

from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pipeline.errors import UserError
from pipeline.files.base_model import tensor_locations
from pipeline.project.runner import Event, Note
from pipeline.weights.blocks import DTYPES, Rows, map_in_threads, read_blocks
from pipeline.weights.edits import Update
from pipeline.weights.merge_plan import MergePlan

SAMPLES = 2  # blocks of a large matrix that are read again, or up to twice as many
NOTE_BELOW = 0.9  # share of an update that must survive rounding; below it a note is shown
RATIO_TOLERANCE = 1e-3  # on top of rounding; an update merged twice has ratio 2


def check_merge(
    plan: MergePlan, written: Callable[[str], "Written"], fp32: str
) -> Generator[Event, None, dict[str, Any]]:
    """Check what was `written` against the plan; returns entries for certificate.json.

    `fp32`: the option that writes the merge in fp32. Raises UserError if a matrix did not receive
    its update exactly once.
    """
    measured = update_ratios(plan, written)
    for name, (ratio, rounding) in measured.items():
        if ratio is not None and not abs(ratio - 1) <= RATIO_TOLERANCE + rounding:
            raise UserError(
                f"merge rejected: {name} received {ratio:.4f} times its update, not once. Please "
                "report this."
            )
    ratios = {name: ratio.value for name, ratio in measured.items()}
    # less than half the distance of two 16-bit numbers rounds to nothing
    retained = [ratio for ratio in ratios.values() if ratio is not None]
    if retained and min(retained) < NOTE_BELOW:
        yield Note(
            f"merge: the update is so small that rounding leaves {min(retained):.0%} to "
            f"{max(retained):.0%} of it in the merged weights. Write them in fp32 ({fp32}), or "
            "serve the adapter without merging."
        )
    return {"delta_ratios": ratios}


def describe(check: Mapping[str, Any]) -> Iterator[str]:
    """What the check of a merge proves, in words."""
    ratios = [ratio for ratio in check.get("delta_ratios", {}).values() if ratio is not None]
    if ratios:
        yield (
            f"{len(ratios)} matrices hold their update {min(ratios):.4f} to {max(ratios):.4f} times"
        )
    if "max_logit_difference" in check:
        yield f"largest logit difference {check['max_logit_difference']:.1e}"


class Written(NamedTuple):
    """A written matrix."""

    eps: float  # the relative rounding of its values
    blocks: Iterator[Rows]  # as `read_blocks` samples them


def written_matrices(out: Path) -> Callable[[str], Written]:
    """Reads the matrices of the checkpoint `out` by stored name."""
    locations = tensor_locations(out)

    def read(name: str) -> Written:
        location = locations[name]
        return Written(torch.finfo(DTYPES[location.info.dtype]).eps, read_blocks(location, SAMPLES))

    return read


class UpdateRatio(NamedTuple):
    """⟨W' − W, Δ⟩ / ⟨Δ, Δ⟩ for the update Δ, LoRA's s·BA, and how far rounding may move it."""

    value: float | None  # 1 if merged once, 0 if lost, 2 if twice; None if Δ is 0
    rounding: float  # the deviation from 1 that rounding W' to its dtype can cause


@torch.no_grad()
def update_ratios(plan: MergePlan, written: Callable[[str], Written]) -> dict[str, UpdateRatio]:
    """The ratio of every matrix that LoRA or DoRA changed, by stored module name.

    A faulty merge affects a whole matrix, not single rows, so only `SAMPLES` or more evenly spread
    blocks of a large matrix are read again. Reading all of them would take as long as the merge
    itself.
    """
    updates = {name: edit for name, edit in plan.edits.items() if isinstance(edit, Update)}

    def ratio_of(name: str) -> UpdateRatio:
        update, after = updates[name].with_norms(plan.blocks(name)), written(name)
        dot = weight = size = 0.0
        for (rows, old), (_, new) in zip(plan.blocks(name, SAMPLES), after.blocks, strict=True):
            block_dot, block_size = update.dot_products(old.float(), new.float(), rows)
            dot, size = dot + block_dot, size + block_size
            weight += float(torch.linalg.vector_norm(old, dtype=torch.float32)) ** 2
        # rounding moves each weight by up to eps·|W|, which counts against an update of norm √size
        rounding = after.eps * (weight / max(size, 1e-60)) ** 0.5
        return UpdateRatio(dot / size if size else None, rounding)

    ratios = map_in_threads(ratio_of, updates)
    return {
        name.removesuffix(".weight"): ratio for name, ratio in zip(updates, ratios, strict=True)
    }
