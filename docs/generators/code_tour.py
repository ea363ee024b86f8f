"""docs/explanation/code-tour.md: the line numbers of its links into the source. Its text is written
by hand.
"""

import re
from functools import cache
from pathlib import Path

PAGE = Path(__file__).parents[1] / "explanation/code-tour.md"
LINK = re.compile(r"\[`([\w.]+)`\]\(([\w./-]+\.py)#L\d+\)")


@cache
def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def line_of(path: Path, name: str) -> int:
    """The line that defines `name` in a source file, counted from 1. Raises ValueError if no line
    does.
    """
    start = 0
    for part in name.split("."):  # a method: after its class
        defines = re.compile(rf"\s*(?:(?:async )?def|class) {part}\b|{part}(?:: .*)? = ")
        lines = enumerate(_lines(path)[start:], start)
        start = next((number for number, line in lines if defines.match(line)), -1)
        if start < 0:
            raise ValueError(f"{PAGE.name}: {path.name} does not define {name}")
    return start + 1


def pages() -> dict[str, str]:
    def renewed(link: re.Match[str]) -> str:
        name, path = link.groups()
        return f"[`{name}`]({path}#L{line_of(PAGE.parent / path, name)})"

    return {"explanation/code-tour.md": LINK.sub(renewed, PAGE.read_text(encoding="utf-8"))}
