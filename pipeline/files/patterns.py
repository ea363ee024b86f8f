"""Regular expressions that others wrote, matched against the names of a model's modules within one budget of time.

`re` runs for ever on some of them, such as (\\w|.|_)*\\d; the module `regex` matches the same and can be stopped.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from time import perf_counter
from typing import Any

from pipeline.errors import UserError

BUDGET = 10.0  # seconds; a pattern for each of 700 modules takes 3, more than any adapter that is known
LONGEST = 20_000  # characters; compiling a longer one takes memory and time that no budget bounds


@contextmanager
def one_budget() -> Iterator[None]:
    """All matches while entered have `BUDGET` seconds together; entered again inside, those of the first time."""
    if _left.get() is not None:
        yield
        return
    token = _left.set([BUDGET])
    try:
        yield
    finally:
        _left.reset(token)


_left: ContextVar[list[float] | None] = ContextVar("seconds left", default=None)  # a list: it is counted down


def problem(pattern: str) -> str | None:
    """Why it is no regular expression, as `re` says it, whose grammar is PEFT's; None if it is one."""
    if len(pattern) > LONGEST:
        return f"it has {len(pattern)} characters, more than {LONGEST}"
    import regex  # most settings have no pattern, and `lora calc` starts in a tenth of a second

    try:
        re.compile(pattern)
        _compiled(pattern)
    except (re.error, regex.error, OverflowError) as error:
        return str(error)
    except RecursionError:
        return "it is nested too deeply"
    return None


def full_match(pattern: str, name: str, key: str) -> bool:
    """Whether it matches the whole name. Raises UserError with the setting's `key` if the budget is used up."""
    return _within_budget("fullmatch", pattern, pattern, name, key) is not None


def end_match(pattern: str, name: str, key: str) -> bool:
    """Whether it matches the end of the name, from a dot on, as PEFT's rank_pattern and alpha_pattern do. Raises
    UserError."""
    return _within_budget("match", end_of(pattern), pattern, name, key) is not None


def end_of(pattern: str) -> str:
    """The pattern that `end_match` matches."""
    return rf"(.*\.)?({pattern})$"


def block_match(pattern: str, name: str, key: str) -> int | None:
    """The number of the block that the module is in, if the pattern matches the list of blocks, as PEFT's
    layers_pattern does. Raises UserError."""
    found = _within_budget("match", block_of(pattern), pattern, name, key)
    return None if found is None else int(found["block"])


def block_of(pattern: str) -> str:
    """The pattern that `block_match` matches; the first number in a name is the block's, a later one an expert's."""
    return rf"(?:^|.*?\.){pattern}\.(?P<block>\d+)\."


def _within_budget(way: str, whole: str, written: str, name: str, key: str) -> Any:
    left = _left.get() or [BUDGET]
    start = perf_counter()
    try:
        if left[0] <= 0:
            raise TimeoutError
        found = getattr(_compiled(whole), way)(name, timeout=left[0])
    except TimeoutError:
        shown = written if len(written) <= 200 else f"{written[:200]}…"
        raise UserError(
            f"{key}: matching {shown!r} against the model's modules must take {BUDGET:g} s at most, and takes longer. "
            "Write it without a repetition inside another, or list the modules' names."
        ) from None
    left[0] -= perf_counter() - start
    return found


@lru_cache(maxsize=8192)  # regex's own keeps 500; each is asked of every name
def _compiled(pattern: str) -> Any:
    import regex

    return regex.compile(pattern)
