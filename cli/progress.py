"""Show the events of a stage on stderr: notes as lines, progress as a bar."""

from collections.abc import Generator
from typing import TypeVar

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from cli.console import stderr
from pipeline.project.runner import Event, Note

Result = TypeVar("Result")


def follow(events: Generator[Event, None, Result], title: str, quiet: bool = False) -> Result:
    """Show notes, and on a terminal a progress bar with loss and ETA. Returns what `events` returns.

    `quiet`: without the routine notes.
    """
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
                if not (quiet and event.routine):
                    stderr.print(event.text, markup=False)
            elif task is None:
                task = progress.add_task(title, total=event.total, completed=event.done, text=event.text)
            else:
                progress.update(task, completed=event.done, text=event.text)
