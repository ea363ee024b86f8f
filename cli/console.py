"""stdout carries results, stderr carries progress and messages."""

import json
import os
import re
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, JustifyMethod, RenderableType
from rich.measure import Measurement
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from pipeline.files.text import OBEYED, duration, printable

if TYPE_CHECKING:
    from pipeline.inference.score import Cost
    from pipeline.project.runner import Event

Result = TypeVar("Result")
NARROW = 20  # columns of a text that may be wrapped or shortened
_ESCAPED = {code: f"\\u{code:04x}" for code in OBEYED}


class _Console(Console):
    """Prints signs in place of characters that a terminal would obey.

    Names of folders, params and answers come from others.
    """

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else printable(text), style, control)


def _terminal_environment() -> dict[str, str]:
    """The environment without an unusable size, such as the COLUMNS=0 of some CI systems."""
    sizes = {name: os.environ.get(name, "") for name in ("COLUMNS", "LINES")}
    least = {"COLUMNS": NARROW, "LINES": 1}
    unusable = [
        name
        for name, text in sizes.items()
        if not re.fullmatch("[0-9]{1,9}", text) or int(text) < least[name]
    ]
    return {name: value for name, value in os.environ.items() if name not in unusable}


# `:name:` in a text stays as it is: it is no emoji
stdout, stderr = (
    _Console(stderr=error, highlight=False, emoji=False, _environ=_terminal_environment())
    for error in (False, True)
)


def print_line(text: str, style: str | None = None) -> None:
    """A line of the result: never wrapped, so that paths can be copied, and never markup."""
    stdout.print(text, style=style, markup=False, soft_wrap=True)


def print_note(text: str) -> None:
    """A message beside the result, as a line on stderr."""
    stderr.print(text, markup=False, soft_wrap=True)


@contextmanager
def noting_replaced(out: Path) -> Iterator[None]:
    """Around what writes a folder: says afterwards if it replaced an earlier result there."""
    replaced = out.is_dir() and any(out.iterdir())
    yield
    if replaced:
        print_note(f"{out}: the earlier result there is replaced.")


def print_json(value: Any) -> None:
    """One JSON document on stdout; what a terminal would obey is escaped, nothing is lost."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False).translate(_ESCAPED) + "\n")


def print_table(
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    right: Sequence[str] = (),
    optional: Sequence[str] = (),
) -> None:
    """`table` on stdout."""
    stdout.print(table(columns, rows, right=right, optional=optional))


def print_costs(costs: "Mapping[str, Cost]") -> None:
    """A row for each model, compared with the first; nothing without models."""
    if costs:
        columns = ("model", "loss", "right", f"KL to {next(iter(costs))}")
        rows = [
            (name, f"{c.loss:.4f}", f"{c.right:.1%}", f"{c.divergence:.4f}")
            for name, c in costs.items()
        ]
        print_table(columns, rows, right=columns[1:])


class _Column(NamedTuple):
    """A column's cells. At the width `most` no cell wraps; at `least`, texts wrap or are cut."""

    heading: str
    cells: Sequence[str]
    is_number: bool

    @property
    def most(self) -> int:
        return max(map(_width, (self.heading, *self.cells)))

    @property
    def least(self) -> int:
        if self.is_number:
            return self.most
        return max(_width(self.heading), min(self.most, NARROW))


def table(
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    right: Sequence[str] = (),
    optional: Sequence[str] = (),
) -> RenderableType:
    """A table for the terminal's width; `right` names columns of numbers, which are never cut.

    A heading may have two lines. Where the columns do not fit, texts wrap between words and longer
    words are shortened in the middle, and `optional` columns are left out, the first of them first;
    what still does not fit goes on below, as a table that begins with the same columns.
    """
    # Signs are replaced before widths are measured: an escape character takes no column, but its
    # picture takes one.
    printed = (map(printable, row) for row in (columns, *rows))
    by_column = zip(*printed, strict=True)
    every = [
        _Column(heading, cells, name in right)
        for name, (heading, *cells) in zip(columns, by_column, strict=True)
    ]
    room = stdout.width
    for name in optional:
        if sum(column.least + 1 for column in every) - 1 <= room:
            break
        every = [column for column in every if column.heading != name]
    gap = 2 if sum(column.most + 2 for column in every) - 2 <= room else 1
    # Every part begins with the first column, and with further texts that say which row it is, up
    # to a third.
    lead = 1
    while (
        lead < len(every)
        and not every[lead].is_number
        and sum(column.least for column in every[: lead + 1]) <= room // 3
    ):
        lead += 1
    parts = [every[:lead]]
    for column in every[lead:]:
        needed = sum(part.least + gap for part in (*parts[-1], column)) - gap
        if len(parts[-1]) > lead and needed > room:
            parts.append(every[:lead])
        parts[-1].append(column)
    return Group(*(_part(part, gap) for part in parts))


def _part(columns: Sequence[_Column], gap: int) -> Table:
    """Columns beside each other: Rich narrows the widest texts first."""
    has_heading = any(column.heading for column in columns)
    part = Table(
        box=None,
        pad_edge=False,
        show_header=has_heading,
        header_style="bold",
        padding=(0, 1, 0, gap - 1),
    )
    lines = max(column.heading.count("\n") for column in columns)
    for column in columns:
        heading = "\n" * (lines - column.heading.count("\n")) + column.heading
        justify: JustifyMethod = "right" if column.is_number else "left"
        part.add_column(_Cell(heading), justify=justify, no_wrap=column.is_number)
    for row in zip(*(column.cells for column in columns), strict=True):
        part.add_row(*map(_Cell, row))
    return part


class _Cell:
    """A text that wraps between words; in words that are too wide the middle is left out."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __rich_measure__(self, _console: Console, _options: ConsoleOptions) -> Measurement:
        width = _width(self.text)
        return Measurement(min(width, NARROW), width)

    def __rich_console__(self, _console: Console, options: ConsoleOptions) -> Iterator[Text]:
        yield Text(_shorten(self.text, options.max_width), overflow="fold")


def _width(text: str) -> int:
    return max(map(cell_len, text.split("\n")))


def _shorten(text: str, width: int) -> str:
    """`text` with the words that are wider than `width` shortened in the middle."""
    if _width(text) <= width:
        return text
    half = (width - 1) // 2
    # white space stays as it is
    words = (
        w if len(w) <= width else f"{w[: width - 1 - half]}…{w[len(w) - half :]}"
        for w in re.split(r"([ \n])", text)
    )
    return "".join(words)


def number(value: float | None, form: str = "") -> str:
    """A number for a table; a dash where there is none."""
    return "–" if value is None else format(value, form)


def duration_range(low: float, high: float) -> str:
    shortest, longest = duration(low), duration(high)
    return shortest if shortest == longest else f"{shortest} to {longest}"


def bar(share: float, width: int = 20) -> str:
    """A bar of eighth blocks for a share of 1."""
    eighths = round(share * width * 8)
    return str("█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8]).strip()


def follow(events: "Generator[Event, None, Result]", title: str, quiet: bool = False) -> Result:
    """Show a stage's events as `following` does. Returns what `events` returns."""
    from lora_workbench.api import play

    with following(title, quiet) as show:
        return play(events, show)


@contextmanager
def following(title: str, quiet: bool = False) -> "Iterator[Callable[[Event], None]]":
    """A function that shows events on stderr: notes, and on a terminal a progress bar.

    `quiet`: without the routine notes.
    """
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TaskID,
        TextColumn,
        TimeRemainingColumn,
    )

    from pipeline.project.runner import Note

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[text]}", markup=False),
        TimeRemainingColumn(),
    )
    tasks: list[TaskID] = []
    with Progress(
        *columns,
        console=stderr,
        transient=True,
        disable=not stderr.is_terminal,
        speed_estimate_period=3600,  # seconds: a step may take minutes
    ) as progress:

        def show(event: "Event") -> None:
            if isinstance(event, Note):
                if not (quiet and event.routine):
                    # a line of a log
                    stderr.print(event.text, markup=False, soft_wrap=not stderr.is_terminal)
            elif not tasks:
                task = progress.add_task(
                    title, total=event.total, completed=event.done, text=event.text
                )
                tasks.append(task)
            else:
                progress.update(tasks[0], total=event.total, completed=event.done, text=event.text)

        yield show
