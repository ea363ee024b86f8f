"""Tokens as people can read them in a cell of a table, and names in the order that people expect."""

import re

SIGNS = {" ": "␣", "\n": "⏎", "\t": "⇥"}


def visible(token: str) -> str:
    """A token in which no white space or control character goes unseen."""
    shown = (SIGNS.get(c) or (c if c.isprintable() else repr(c)[1:-1]) for c in token)
    return "".join(shown) or "∅"


def in_order(name: str) -> list[str | float]:
    """Sorts names by the numbers in them: rank-2 before rank-16, lr-1e-05 before lr-0.001."""
    parts = re.split(r"(\d+(?:\.\d+)?(?:e[+-]?\d+)?)", name)
    return [float(part) if number % 2 else part for number, part in enumerate(parts)]
