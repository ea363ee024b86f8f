"""`runs/STAGE/run.json`: the state and progress of a stage's run, for other processes to watch."""

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pipeline.errors import Interrupted, explain
from pipeline.files.artifact import write_file

JOURNAL, LOCK = "run.json", "lock"
PAUSE = 0.2  # seconds between two writes of progress
MAX_NOTES = 20
MAX_MESSAGE = 500  # characters of a message on a full disk
State = Literal["running", "done", "stopped", "failed"]


@dataclass(frozen=True)
class Journal:
    """One run of a stage. Times are seconds since the epoch; `first`: the step it started or resumed at, at `since`."""

    state: State
    pid: int
    started: float
    done: int = 0
    total: int = 0
    first: int = 0
    since: float = 0.0
    text: str = ""
    message: str = ""
    notes: list[str] = field(default_factory=list)

    @property
    def eta(self) -> float | None:
        """Estimated seconds to the end; None before the first step."""
        if self.done <= self.first or not self.total:
            return None
        return (time.time() - self.since) / (self.done - self.first) * (self.total - self.done)


def read(folder: Path) -> Journal | None:
    """The journal of a run folder, or None if there is no readable one."""
    try:
        return Journal(**json.loads((folder / JOURNAL).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def alive(folder: Path) -> bool:
    """Whether a process holds the run folder's lock."""
    try:
        with (folder / LOCK).open("rb") as file:
            pid = file.read(32)
            if not pid.isdigit():
                return False
            # Do not try the lock of a process that is gone (ProcessLookupError): a stage that starts at this moment
            # would have to wait. A process of another user (PermissionError) exists.
            with suppress(PermissionError):
                os.kill(int(pid), 0)
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except (OSError, OverflowError):  # OverflowError: a damaged file with a number that no process can have
        return False
    return False


class Writer:
    """Writes a run's journal. If it cannot be written, the stage continues without."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / JOURNAL
        self._journal = Journal("running", os.getpid(), time.time())
        self._next = 0.0
        self.change()

    def change(self, **values: Any) -> None:
        """Update the journal and write it immediately."""
        self._journal = replace(self._journal, **values)
        try:
            write_file(self._path, json.dumps(asdict(self._journal), ensure_ascii=False))
        except OSError:
            # On a full disk, write into the old file's block, as there is no room for a new file. Notes are dropped, so
            # that one block is enough. A reader may see no journal at this moment.
            short = replace(self._journal, notes=[], message=self._journal.message[:MAX_MESSAGE])
            with suppress(OSError), self._path.open("rb+", buffering=0) as file:
                file.write(json.dumps(asdict(short), ensure_ascii=False).encode())
                file.truncate()

    def note(self, text: str) -> None:
        self.change(notes=[*self._journal.notes, text][-MAX_NOTES:])

    def progress(self, done: int, total: int, text: str) -> None:
        """Write the progress, at most every `PAUSE` seconds: a step may take a millisecond."""
        now = time.time()
        if not self._journal.total:
            self._journal = replace(self._journal, first=done, since=now)
        if now >= self._next or done == total:
            self._next = now + PAUSE
            self.change(done=done, total=total, text=text)


@contextmanager
def writing(folder: Path) -> Iterator[Writer]:
    """A writer whose journal records how the block ended: done, stopped or failed."""
    writer = Writer(folder)
    try:
        yield writer
    except (Interrupted, KeyboardInterrupt, GeneratorExit) as stop:
        writer.change(state="stopped", message=str(stop))
        raise
    except BaseException as error:
        message = explain(error) if isinstance(error, OSError) else str(error)
        writer.change(state="failed", message=message or type(error).__name__)
        raise
    writer.change(state="done")
