"""stdout carries results, stderr carries progress and messages."""

import json
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderHook, RenderResult
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from pipeline.files.text import OBEYED, printable


class _Printable:
    """What it holds, but for what a terminal would obey: names of folders, params and answers come from others."""

    def __init__(self, held: ConsoleRenderable) -> None:
        self.held = held

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for text, style, control in console.render(self.held, options):
            yield Segment(text if control else printable(text), style, control)


class _Hook(RenderHook):
    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        return [_Printable(one) for one in renderables]


def _console(*, stderr: bool = False) -> Console:
    made = Console(stderr=stderr, highlight=False)
    made.push_render_hook(_Hook())
    return made


stdout, stderr = _console(), _console(stderr=True)
_ESCAPED = {code: f"\\u{code:04x}" for code in OBEYED}


def print_json(value: Any) -> None:
    """One JSON document and nothing else; what a terminal would obey is escaped in it, and nothing is lost."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False).translate(_ESCAPED) + "\n")


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[str] = ()) -> Table:
    """A plain table; `right` names the columns of numbers, which stay on one line where the terminal is wide enough."""
    built = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1))
    widths = [max(map(len, cells)) + 2 for cells in zip(columns, *rows, strict=True)]
    needed = sum(width if column in right else min(width, 8) for column, width in zip(columns, widths, strict=True))
    for column in columns:
        number = column in right
        whole = number and needed <= stdout.width  # else digits go on below: a cut number would be a wrong one
        built.add_column(column, justify="right" if number else "left", overflow="fold", no_wrap=whole)
    for row in rows:
        built.add_row(*(Text(printable(cell)) for cell in row))  # before widths are measured: a sign takes a column
    return built


def bar(share: float, width: int = 20) -> str:
    """A bar of eighth blocks for a share of 1."""
    eighths = round(share * width * 8)
    return str("█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8]).strip()
