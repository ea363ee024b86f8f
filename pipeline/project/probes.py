"""Probes: a faster path is taken only where it computes, on this device, what the plain one does.

What was tried and did not work is logged once in a process, with what is slower because of it.
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
    """A faster path that is not taken."""

    tried: str
    said: str  # why not
    slower: str  # what is slower because of it

    def __str__(self) -> str:
        return f"{self.tried}: {self.said}; {self.slower}"


_logged: list[Finding] = []
_held: list[list[Finding]] = []  # the lists that findings go to instead; the innermost is the last


def record(tried: str, said: str | BaseException, slower: str) -> None:
    """Log a path that is not taken, once: to stderr, or inside `held` to the list.

    `said`: why, or the error.
    """
    why = f"{type(said).__name__}: {first_line(said)}" if isinstance(said, BaseException) else said
    finding = Finding(tried, why, slower)
    findings = _held[-1] if _held else _logged
    if finding in findings:
        return
    findings.append(finding)
    if findings is _logged:
        logging.getLogger(__name__).warning("%s", finding)


@contextmanager
def held() -> Iterator[list[Finding]]:
    """Inside the block new findings go to this list: a run writes them into its log."""
    findings = list[Finding]()
    _held.append(findings)
    try:
        yield findings
    finally:
        # by identity: others may be equal
        _held[:] = [other for other in _held if other is not findings]


def attempt(tried: str, slower: str, compute: Callable[[], Result]) -> Result | None:
    """What `compute` returns; None if it raises an error, which is recorded.

    An error for lack of memory is raised: it says nothing of the path.
    """
    try:
        return compute()
    # a model may take no segments, a kernel may not run here
    except Exception as error:
        if is_out_of_memory(error):
            raise
        record(tried, error, slower)
        return None


def holds(tried: str, slower: str, check: Callable[[], bool]) -> bool:
    """Whether `check` is true of a faster path; else, and if it raises, that is recorded."""
    found = attempt(tried, slower, check)
    if found is False:
        record(tried, "its numbers are not those of plain torch", slower)
    return bool(found)


def computes(
    tried: str,
    slower: str,
    compute: Callable[[], Any],
    *,
    right: Callable[[], Any],
    again: Callable[[], Any],
    wrong: Callable[[], Any],
) -> bool:
    """Whether `compute` gives the rows (..., D) that `right` gives; it is recorded if not.

    `again`: the rows of `right`, computed beside other rows, for which products may take another
    kernel. It shows how far rounding goes. No fixed tolerance knows that: over 36 blocks in bf16,
    one unit in the last place becomes 3% to 10%. `wrong`: the rows of a model that does not do what
    was tried.
    """
    expected = right()
    rows = attempt(tried, slower, compute)
    if rows is None:
        return False
    distance, distance_of_wrong = _farthest(rows, expected), _farthest(wrong(), expected)
    allowed = AGREEMENT.get(expected.dtype.itemsize, 1e-3)
    if not distance <= allowed:  # or it is not a number
        allowed = max(allowed, NOISE * _farthest(again(), expected))
    allowed = min(allowed, distance_of_wrong / CLOSER)
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
