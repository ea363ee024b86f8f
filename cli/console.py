"""stdout carries results, stderr carries progress and messages."""

import json
import sys
from collections.abc import Generator, Sequence
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from pipeline.runner import Event, Note

stdout = Console(highlight=False)
stderr = Console(stderr=True, highlight=False)

Result = TypeVar("Result")


def print_json(value: Any) -> None:
    """One JSON document and nothing else."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[str] = ()) -> Table:
    """A plain table; `right` names the columns of numbers."""
    built = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1))
    for column in columns:
        number = column in right
        built.add_column(column, justify="right" if number else "left", overflow="fold", no_wrap=number)
    for row in rows:
        built.add_row(*map(Text, row))
    return built


def bar(share: float, width: int = 20) -> str:
    """A bar of eighth blocks for a share of 1."""
    eighths = round(share * width * 8)
    return str("█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8]).strip()


def follow(events: Generator[Event, None, Result], title: str) -> Result:
    """Show notes, and a progress bar with loss and ETA on a terminal, until `events` returns."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[text]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as progress:
        task: TaskID | None = None
        while True:
            try:
                event = next(events)
            except StopIteration as stop:
                result: Result = stop.value
                return result
            if isinstance(event, Note):
                stderr.print(event.text, markup=False)
            elif task is None:
                task = progress.add_task(title, total=event.total, completed=event.done, text=event.text)
            else:
                progress.update(task, completed=event.done, text=event.text)
