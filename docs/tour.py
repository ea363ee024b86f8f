"""`python -m docs.tour`: the outputs in docs/tutorials/document.md, renewed by running its commands.

A test runs them too, and compares what they print with what the page shows.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PAGE = Path(__file__).with_name("tutorials") / "document.md"
BLOCK = re.compile(r"^```console\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Typed(NamedTuple):
    """A command as it is typed, and what it prints."""

    command: str
    output: str


def typed(page: str) -> Iterator[Typed]:
    """Every command of the page, in order: a line that begins with $, and what follows up to the next."""
    for block in BLOCK.findall(page):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, output = part.partition("\n")
            yield Typed(command, output)


def run(command: str, folder: Path) -> str:
    """What a command prints in a terminal of 80 columns, notes and progress left out. Raises CalledProcessError."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    terminal = {"COLUMNS": "80", "TERMINAL_WIDTH": "80", "NO_COLOR": "1", "_TYPER_FORCE_DISABLE_TERMINAL": "1"}
    done = subprocess.run(
        ["bash", "-euc", command],
        cwd=folder,
        env={**os.environ, **terminal, "PATH": path},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return "".join(f"{line.rstrip()}\n" for line in done.stdout.splitlines())


def renewed(page: str, folder: Path) -> str:
    """The page with what its commands print now."""

    def block(match: re.Match[str]) -> str:
        parts = [f"$ {one.command}\n{run(one.command, folder)}" for one in typed(match[0])]
        return f"```console\n{''.join(parts)}```"

    return BLOCK.sub(block, page)


if __name__ == "__main__":
    PAGE.write_text(renewed(PAGE.read_text(encoding="utf-8"), PAGE.parents[2] / "document"), encoding="utf-8")
