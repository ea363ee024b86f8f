"""Probes: a faster path is taken only where it computes, with this model on this device, what the plain one does."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from pipeline.errors import is_out_of_memory
from pipeline.project.logs.findings import record

Result = TypeVar("Result")
PLAIN = "plain torch computes it, more slowly"  # what follows where a fused part is not taken
AGREEMENT = {2: 0.05}  # a row's relative distance, by the bytes of a number
NOISE = 3  # times the distance that rounding was seen to make
CLOSER = 2  # times nearer to right than to wrong


def attempt(tried: str, slower: str, compute: Callable[[], Result]) -> Result | None:
    """What it computes; None where it raises, and then it is recorded what is `slower` without it.

    Raises what it raised if memory ran out: that says nothing of the path.
    """
    try:
        return compute()
    except Exception as error:  # of a model that takes no segments, of a kernel that does not run here
        if is_out_of_memory(error):
            raise
        record(tried, error, slower)
        return None


def computes(
    tried: str,
    slower: str,
    compute: Callable[[], Tensor],
    *,
    right: Callable[[], Tensor],
    again: Callable[[], Tensor],
    wrong: Callable[[], Tensor],
) -> bool:
    """Whether `compute` gives the rows (..., D) that `right` gives; it is recorded if not.

    `again`: the same as `right` beside other rows, which shows how far rounding takes it: no fixed tolerance holds for
    all, as products of another number of rows have other kernels, and 36 blocks in bf16 make 3% to 10% of one unit.
    `wrong`: what a model gives that does not do what was tried.
    """
    expected = right()
    found = attempt(tried, slower, compute)
    if found is None:
        return False
    distance, whole = (_farthest(rows, expected) for rows in (found, wrong()))
    allowed = AGREEMENT.get(expected.dtype.itemsize, 1e-3)
    if not distance <= allowed:  # or it is not a number
        allowed = max(allowed, NOISE * _farthest(again(), expected))
    allowed = min(allowed, whole / CLOSER)
    if distance <= allowed:
        return True
    record(tried, f"its numbers differ by {distance:.2g}, where {allowed:.2g} may be rounding", slower)
    return False


def _farthest(rows: Tensor, expected: Tensor) -> float:
    """The largest relative distance of a row."""
    expected = expected.float()
    sizes = expected.norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)  # a row may be zero
    return float(((rows.float() - expected).norm(dim=-1) / sizes).max())
