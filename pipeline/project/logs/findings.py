"""What was tried on this machine and did not work, and what is slower because of it: said once in a process."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from pipeline.errors import first_line


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
    """Log it, which stderr shows, unless it is `held`. An error is recorded by its type and the first line of it."""
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
        _held.remove(found)
