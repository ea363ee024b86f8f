"""Readable text: sizes, tokens in table cells, untrusted text on a terminal, sorted names."""

import re
from collections.abc import Iterable

from pipeline.errors import CONTROL

SIGNS = {" ": "␣", "\n": "⏎", "\t": "⇥"}
OBEYED = {code: sign for code, sign in CONTROL.items() if chr(code) not in "\n\t\u2028\u2029"}


def printable(text: str) -> str:
    """`text` without control characters but newline and tab, such as ␛ for an escape."""
    return text.translate(OBEYED)


def escape_whitespace(token: str) -> str:
    """A token with visible signs for white space and control characters."""
    shown = (SIGNS.get(c) or (c if c.isprintable() else repr(c)[1:-1]) for c in token)
    return "".join(shown) or "∅"


def abbreviate_repr(value: object, limit: int = 60) -> str:
    """The repr of a value for an error message: at most `limit` characters and an ellipsis."""
    try:
        text = repr(value)
    except Exception:  # a number of more than 4,300 digits, or code of others
        text = f"a value of type {type(value).__name__}"
    return text if len(text) <= limit else f"{text[:limit]}…"


def join_texts(texts: Iterable[str]) -> str:
    """The texts as one. Between two of them is a space, unless one has white space there."""
    joined = ""
    for text in filter(None, texts):
        if joined and not joined[-1].isspace() and not text[0].isspace():
            joined += " "
        joined += text
    return joined


def natural_sort_key(name: str) -> list[str | float]:
    """A key that sorts names by the numbers in them: rank-2 before rank-16."""
    parts = re.split(r"(\d+(?:\.\d+)?(?:e[+-]?\d+)?)", name)
    return [float(part) if number % 2 else part for number, part in enumerate(parts)]


def counted(count: int, noun: str) -> str:
    """1 unit, 2 units."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def duration(seconds: float) -> str:
    """A time in two digits: 45 s, 1.5 min, 12 h."""
    size, unit = next(
        (pair for pair in ((3600.0, "h"), (60.0, "min")) if seconds >= pair[0]), (1.0, "s")
    )
    return f"{seconds / size:.{1 if seconds / size < 10 else 0}f} {unit}"


def in_units(size: int) -> str:
    """Format bytes in the largest suitable binary unit, such as 1.21 MiB."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if size >= unit:
            return f"{size / unit:.2f} {name}"
    return f"{size} B"
