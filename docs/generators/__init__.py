"""Pages that are generated from the code: a file for each kind, with `pages() -> {path below docs:
text}`.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

DOCS = Path(__file__).parents[1]


def generated() -> Mapping[Path, str]:
    """Every generated page with its text."""
    modules = [import_module(f"{__name__}.{each.name}") for each in iter_modules(__path__)]
    return {DOCS / path: text for module in modules for path, text in module.pages().items()}


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """The lines of a table."""
    yield from (f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))
    yield ""


def cell(text: str) -> str:
    """A text for a cell of a table: in one line, and nothing in it ends the cell."""
    text = " ".join(text.split()).replace("|", r"\|")
    return re.sub(r"(`[^`]*`)|<", lambda match: match[1] or "&lt;", text)  # <tool> is no HTML
