"""Matches untrusted regular expressions with a time limit.

An adapter from elsewhere has patterns in its config, and `re` never ends on some of them, such as
(\w|.|_)*\d. The module `regex` matches the same and has a timeout.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from time import perf_counter
from typing import Any

from pipeline.errors import UserError

# seconds; one pattern for each of 700 modules, more than in any known adapter, takes 3
BUDGET = 10.0
LONGEST = 20_000  # characters; no budget limits the memory and time of compiling longer ones


@contextmanager
def one_budget(left: list[float] | None = None) -> Iterator[None]:
    """All matches inside the context share `BUDGET` seconds.

    Several contexts may share those in `left`; a nested context shares those of the outer one.
    """
    if _left.get() is not None:
        yield
        return
    token = _left.set([BUDGET] if left is None else left)
    try:
        yield
    finally:
        _left.reset(token)


# Seconds left, in a list, so that they can be counted down in place. Without a common budget, 700
# modules times a pattern's limit would be hours.
_left: ContextVar[list[float] | None] = ContextVar("seconds left", default=None)


def problem(pattern: str) -> str | None:
    """Why the pattern is not valid in `re`, which PEFT uses; None if it is valid."""
    if len(pattern) > LONGEST:
        return f"it has {len(pattern)} characters, more than {LONGEST}"
    # imported here: `lora calc` starts in a tenth of a second, and most settings have no pattern
    import regex

    try:
        re.compile(pattern)
        _compiled(pattern)
    except (re.error, regex.error, OverflowError) as error:
        return str(error)
    except RecursionError:
        return "it is nested too deeply"
    return None


def full_match(pattern: str, name: str, key: str) -> bool:
    """Whether the pattern matches the full name.

    Raises UserError, which names the setting `key`, when time is up.
    """
    return _within_budget("fullmatch", pattern, pattern, name, key) is not None


def end_match(pattern: str, name: str, key: str) -> bool:
    """Whether the pattern matches the name or its end after a dot, as PEFT's rank_pattern.

    Raises UserError when time is up.
    """
    return _within_budget("match", end_pattern(pattern), pattern, name, key) is not None


def search(pattern: str, text: str, key: str) -> bool:
    """Whether the pattern matches somewhere in the text. Raises UserError when time is up."""
    return (
        _within_budget("search", pattern, pattern, text, key, "an answer", "nested repetitions")
        is not None
    )


def end_pattern(pattern: str) -> str:
    """The pattern that `end_match` matches."""
    return rf"(.*\.)?({pattern})$"


def block_match(pattern: str, name: str, key: str) -> int | None:
    """The index of the module's block if the pattern matches the list, as PEFT's layers_pattern.

    Raises UserError when time is up.
    """
    match = _within_budget("match", block_pattern(pattern), pattern, name, key)
    # of `layers|h`, the first alternative has no number
    return None if match is None or match["block"] is None else int(match["block"])


def block_pattern(pattern: str) -> str:
    """The pattern that `block_match` matches.

    The first number in a name is the block, a later one an expert.
    """
    return rf"(?:^|.*?\.){pattern}\.(?P<block>\d+)\."


def _within_budget(
    method: str,
    anchored: str,
    original: str,
    name: str,
    key: str,
    against: str = "the model's modules",
    avoid: str = "nested repetitions, or list the module names",
) -> Any:
    left = _left.get() or [BUDGET]
    start = perf_counter()
    try:
        if left[0] <= 0:
            raise TimeoutError
        match = getattr(_compiled(anchored), method)(name, timeout=left[0])
    except TimeoutError:
        shown = original if len(original) <= 200 else f"{original[:200]}…"
        raise UserError(
            f"{key}: matching {shown!r} against {against} must take at most {BUDGET:g} s, but "
            f"takes longer. Avoid {avoid}."
        ) from None
    left[0] -= perf_counter() - start
    return match


@lru_cache(maxsize=8192)  # regex's own cache holds 500; every pattern is matched against every name
def _compiled(pattern: str) -> Any:
    import regex

    return regex.compile(pattern)
