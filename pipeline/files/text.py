"""Text as people can read it: tokens in a cell of a table, what others wrote on a terminal, names in order."""

import re

SIGNS = {" ": "␣", "\n": "⏎", "\t": "⇥"}
# What a terminal obeys instead of showing it: C0 and C1 control characters, DEL, and those that turn the direction of
# text. A C0 character has a picture; newline and tab stay.
PICTURES = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"} | {0x7F: "␡"}
OBEYED = PICTURES | dict.fromkeys((*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)), "\ufffd")


def printable(text: str) -> str:
    """`text` without anything that a terminal would obey: an escape sequence becomes ␛ and the letters after it."""
    return text.translate(OBEYED)


def escape_whitespace(token: str) -> str:
    """A token in which no white space or control character goes unseen."""
    shown = (SIGNS.get(c) or (c if c.isprintable() else repr(c)[1:-1]) for c in token)
    return "".join(shown) or "∅"


def natural_sort_key(name: str) -> list[str | float]:
    """Sorts names by the numbers in them: rank-2 before rank-16, lr-1e-05 before lr-0.001."""
    parts = re.split(r"(\d+(?:\.\d+)?(?:e[+-]?\d+)?)", name)
    return [float(part) if number % 2 else part for number, part in enumerate(parts)]
