"""stdout carries results, stderr carries progress and messages."""

import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from rich.cells import cell_len
from rich.console import (
    Console,
    ConsoleOptions,
    ConsoleRenderable,
    Group,
    JustifyMethod,
    RenderableType,
    RenderHook,
    RenderResult,
)
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


NARROW = 20  # columns of a text that may be wrapped or shortened
stdout, stderr = _console(), _console(stderr=True)
_ESCAPED = {code: f"\\u{code:04x}" for code in OBEYED}


def print_json(value: Any) -> None:
    """One JSON document and nothing else; what a terminal would obey is escaped in it, and nothing is lost."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False).translate(_ESCAPED) + "\n")


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[str] = ()) -> RenderableType:
    """A plain table for the terminal's width; `right` names the columns of numbers, which are never cut.

    A heading may have two lines. Where the columns do not fit, texts wrap between words and longer words are shortened
    in the middle; what still does not fit goes on below, as a table that begins with the same columns.
    """
    cells = [[printable(cell) for cell in row] for row in rows]  # before widths are measured: a sign takes a column
    natural = [max(map(_longest, column)) for column in zip(columns, *cells, strict=True)]
    least = [
        width if name in right else max(_longest(name), min(width, NARROW))
        for name, width in zip(columns, natural, strict=True)
    ]
    room = stdout.width
    gap = 2 if sum(natural) + 2 * (len(columns) - 1) <= room else 1
    lead = 1  # columns that every part begins with: the first, and further texts that say which row it is
    while lead < len(columns) and columns[lead] not in right and sum(least[: lead + 1]) <= room // 3:
        lead += 1
    parts = _blocks(least, lead, room, gap)
    return Group(*(_block(part, columns, cells, natural, least, right, gap) for part in parts))


def _blocks(least: Sequence[int], lead: int, room: int, gap: int) -> Iterator[list[int]]:
    """The columns' numbers, as many together as fit beside the `lead` first."""
    block = [*range(lead)]
    for number in range(lead, len(least)):
        if len(block) > lead and sum(least[n] + gap for n in (*block, number)) - gap > room:
            yield block
            block = [*range(lead)]
        block.append(number)
    yield block


def _block(
    chosen: Sequence[int],
    columns: Sequence[str],
    cells: Sequence[Sequence[str]],
    natural: Sequence[int],
    least: Sequence[int],
    right: Sequence[str],
    gap: int,
) -> Table:
    widths = {number: least[number] for number in chosen}
    spare = stdout.width - sum(widths.values()) - gap * (len(chosen) - 1)
    for number in chosen if spare < 0 else ():  # two columns and still too wide: texts give way down to their headings
        less = min(-spare, widths[number] - _longest(columns[number])) if columns[number] not in right else 0
        widths[number] -= less
        spare += less
    narrow = sorted(
        (number for number in chosen if least[number] < natural[number]), key=lambda number: natural[number]
    )
    for left, number in zip(range(len(narrow), 0, -1), narrow, strict=True):  # the spare room, in equal shares
        more = max(0, min(natural[number] - least[number], spare // left))
        widths[number] += more
        spare -= more
    built = Table(box=None, pad_edge=False, show_header=any(columns), header_style="bold", padding=(0, 1, 0, gap - 1))
    lines = max(columns[number].count("\n") for number in chosen)
    for number in chosen:
        justify: JustifyMethod = "right" if columns[number] in right else "left"
        heading = "\n" * (lines - columns[number].count("\n")) + columns[number]
        built.add_column(heading, justify=justify, width=widths[number], overflow="fold")
    for row in cells:
        built.add_row(*(Text(_fitted(row[number], widths[number])) for number in chosen))
    return built


def _longest(text: str) -> int:
    return max(map(cell_len, text.split("\n")))


def _fitted(text: str, width: int) -> str:
    """`text` with the words that are wider than `width` shortened in the middle."""
    return text if _longest(text) <= width else " ".join(_shortened(word, width) for word in text.split(" "))


def _shortened(word: str, width: int) -> str:
    half = (width - 1) // 2
    return word if len(word) <= width else f"{word[: width - 1 - half]}…{word[len(word) - half :]}"


def bar(share: float, width: int = 20) -> str:
    """A bar of eighth blocks for a share of 1."""
    eighths = round(share * width * 8)
    return str("█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8]).strip()
