"""`runs/STAGE/run.json`: the state and progress of a stage's run, for other processes to watch."""

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec

from pipeline.errors import Interrupted, explain
from pipeline.files import locks
from pipeline.files.artifact import write_file

JOURNAL, LOCK, SETTINGS = "run.json", "lock", "settings.json"
PAUSE = 0.2  # seconds between two writes of progress
WARM_UP = 2.0  # seconds before a rate counts
MAX_NOTES = 20
MAX_MESSAGE = 500  # characters of a message on a full disk
State = Literal["running", "done", "stopped", "failed"]


@dataclass(frozen=True)
class Journal:
    """One run of a stage. Times are seconds since the epoch."""

    state: State
    pid: int
    started: float
    done: int = 0  # of `total` units of work
    total: int = 0
    first: int = 0  # units that were done at `since`, when it started or resumed
    since: float = 0.0
    text: str = ""
    message: str = ""
    notes: list[str] = field(default_factory=list)
    ended: float = 0.0  # 0 while it runs, and if it died
    rate: float = 0.0  # units of work per second lately; 0 in the first seconds
    past: float = 0.0  # units of work per second of the run before; 0 if there was none
    host: str = ""  # whose process `pid` is; empty in journals of earlier versions

    @property
    def process(self) -> locks.Holder:
        return locks.Holder(self.pid, self.host)

    @property
    def seconds(self) -> float | None:
        """How long it took; None if it runs or died."""
        return self.ended - self.started if self.ended else None

    @property
    def eta(self) -> float | None:
        """Estimated seconds to the end; None while nothing is known to estimate it from."""
        left = self.total - self.done
        if not self.total or not (self.rate > 0 or self.past > 0):
            return None
        if not (self.rate > 0 and self.past > 0):
            return left / max(self.rate, self.past)
        # The first units say little: a library warms up, and those of a study differ. So this run's
        # rate counts by the share of units that are done.
        share = self.done / self.total
        return share * (left / self.rate) + (1 - share) * (left / self.past)

    @property
    def pace(self) -> float:
        """Units of work per second over all of the run, or of the one before if it did nothing."""
        done, seconds = self.done - self.first, (self.ended or self.since) - self.since
        return done / seconds if done > 0 and seconds > 0 else self.past


def read(folder: Path) -> Journal | None:
    """The journal of a run folder, or None if there is no readable one."""
    try:
        return msgspec.json.decode((folder / JOURNAL).read_bytes(), type=Journal)
    except (OSError, ValueError):
        return None


def alive(folder: Path) -> bool:
    """Whether a process, here or on another machine, holds the run folder's lock."""
    return locks.is_held(folder / LOCK)


class Writer:
    """Writes a run's journal. If it cannot be written, the stage continues without."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / JOURNAL
        before = read(folder)
        past = before.pace if before else 0.0
        self._journal = Journal("running", os.getpid(), time.time(), past=past, host=locks.host())
        self._next = 0.0  # when progress is written again
        # two moments, and what was done then: the rate is that since the earlier one
        self._earlier = self._later = (0.0, 0)
        self.change()

    def change(self, **values: Any) -> None:
        """Update the journal and write it immediately."""
        self._journal = replace(self._journal, **values)
        try:
            write_file(self._path, [_encode(self._journal)])
        except OSError:
            # On a full disk, write into the old file's block, as there is no room for a new file.
            # Notes are dropped, so that one block is enough. A reader may see no journal at this
            # moment.
            short = replace(self._journal, notes=[], message=self._journal.message[:MAX_MESSAGE])
            with suppress(OSError), self._path.open("rb+", buffering=0) as file:
                file.write(_encode(short))
                file.truncate()

    def note(self, text: str) -> None:
        self.change(notes=[*self._journal.notes, text][-MAX_NOTES:])

    def progress(self, done: int, total: int, text: str) -> None:
        """Write the progress, at most every `PAUSE` seconds: a step may take a millisecond."""
        now = time.time()
        # the work starts, or another kind of work does
        if total != self._journal.total or done < self._journal.done:
            self._journal = replace(self._journal, first=done, since=now)
            self._earlier = self._later = (now, done)
        if now < self._next and done != total:
            return
        self._next = now + PAUSE
        elapsed = now - self._journal.since
        # so that the earlier moment is a quarter to a half of the elapsed time ago
        if now - self._later[0] > max(WARM_UP, elapsed / 4):
            self._earlier, self._later = self._later, (now, done)
        then, done_then = self._earlier
        rate = (done - done_then) / (now - then) if elapsed >= WARM_UP else 0.0
        self.change(done=done, total=total, text=text, rate=rate)


def _encode(journal: Journal) -> bytes:
    """The journal's JSON. A path in its texts may not be UTF-8: ? stands for such bytes."""
    return json.dumps(asdict(journal), ensure_ascii=False).encode(errors="replace")


class Settings(NamedTuple):
    """The params of a run's stage, and the key of the artifact that they make."""

    key: str
    params: Mapping[str, Any]


def write_settings(folder: Path, **moments: Settings) -> None:
    """Keep the settings of a moment: `run`, of the logs; `made`, of the artifact in place.

    If that fails, the stage continues without.
    """
    before = {"run": read_settings(folder, "run"), "made": read_settings(folder, "made")}
    document = {
        name: settings._asdict() for name, settings in {**before, **moments}.items() if settings
    }
    with suppress(OSError):
        write_file(folder / SETTINGS, json.dumps(document, ensure_ascii=False, indent=1) + "\n")


def read_settings(folder: Path, moment: Literal["run", "made"]) -> Settings | None:
    """The settings of a moment, or None if there are no readable ones."""
    try:
        settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))[moment]
        return Settings(str(settings["key"]), dict(settings["params"]))
    except (OSError, ValueError, TypeError, KeyError):
        return None


@contextmanager
def writing(folder: Path) -> Iterator[Writer]:
    """A writer whose journal records how the block ended: done, stopped or failed."""
    writer = Writer(folder)
    try:
        yield writer
    except (Interrupted, KeyboardInterrupt, GeneratorExit) as stop:
        writer.change(state="stopped", message=str(stop), ended=time.time())
        raise
    except BaseException as error:
        message = explain(error) if isinstance(error, OSError) else str(error)
        writer.change(state="failed", message=message or type(error).__name__, ended=time.time())
        raise
    writer.change(state="done", ended=time.time())
