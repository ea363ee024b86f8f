"""Tokens as people can read them in a cell of a table."""

SIGNS = {" ": "␣", "\n": "⏎", "\t": "⇥"}


def visible(token: str) -> str:
    """A token in which no white space or control character goes unseen."""
    shown = (SIGNS.get(c) or (c if c.isprintable() else repr(c)[1:-1]) for c in token)
    return "".join(shown) or "∅"
