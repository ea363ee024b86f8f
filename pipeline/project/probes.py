"""Probes: a faster path is taken only where it computes, with this model on this device, what the
plain one does.

What was tried and did not work is not lost: it is said once in a process, with what is slower
because of it.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

from pipeline.errors import first_line, is_out_of_memory

Result = TypeVar("Result")
PLAIN = "plain torch computes it, more slowly"  # what follows where a fused part is not taken
AGREEMENT = {2: 0.05}  # a row's relative distance, by the bytes of a number
NOISE = 3  # times the distance that rounding was seen to make
CLOSER = 2  # times nearer to right than to wrong


class Finding(NamedTuple):
    """What was tried, what it said, and what is slower because of it."""

    tried: str
    said: str
    slower: str

    def __str__(self) -> str:
        return f"{self.tried}: {self.said}; {self.slower}"


_logged: list[Finding] = []
_held: list[list[Finding]] = []  # where they go instead, the innermost last


def record(tried: str, said: str | BaseException, slower: str) -> None:
    """Log it, which stderr shows, unless it is `held`. An error is recorded by its type and the
    first line of it.
    """
    said = f"{type(said).__name__}: {first_line(said)}" if isinstance(said, BaseException) else said
    finding = Finding(tried, said, slower)
    told = _held[-1] if _held else _logged
    if finding not in told:
        told.append(finding)
        if told is _logged:
            logging.getLogger(__name__).warning("%s", finding)


@contextmanager
def held() -> Iterator[list[Finding]]:
    """Inside the block new findings go to this list: a run writes them into its log."""
    found = list[Finding]()
    _held.append(found)
    try:
        yield found
    finally:
        _held[:] = [one for one in _held if one is not found]


def attempt(tried: str, slower: str, compute: Callable[[], Result]) -> Result | None:
    """What it computes; None where it raises, and then it is recorded what is `slower` without it.

    Raises what it raised if memory ran out: that says nothing of the path.
    """
    try:
        return compute()
    # of a model that takes no segments, of a kernel that does not run here
    except Exception as error:
        if is_out_of_memory(error):
            raise
        record(tried, error, slower)
        return None


def computes(
    tried: str,
    slower: str,
    compute: Callable[[], Any],
    *,
    right: Callable[[], Any],
    again: Callable[[], Any],
    wrong: Callable[[], Any],
) -> bool:
    """Whether `compute` gives the rows (..., D), a tensor, that `right` gives; it is recorded if
    not.

    `again`: the same as `right` beside other rows, whose products may have another kernel: it shows
    how far rounding goes, which no fixed tolerance knows: over 36 blocks in bf16, one unit in the
    last place becomes 3% to 10%. `wrong`: what a model gives that does not do what was tried.
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
    record(
        tried, f"its numbers differ by {distance:.2g}, where {allowed:.2g} may be rounding", slower
    )
    return False


def _farthest(rows: Any, expected: Any) -> float:
    """The largest relative distance of a row."""
    expected = expected.float()
    sizes = expected.norm(dim=-1).clamp_min(2**-126)  # a row may be zero
    return float(((rows.float() - expected).norm(dim=-1) / sizes).max())
