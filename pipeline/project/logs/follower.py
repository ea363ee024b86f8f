"""Trackers follow a run's logs from a process of their own, which the training neither waits for
nor hears of.

A tracker that is missing, crashes, hangs or is killed leaves the run as it is: it only reads files.
What it has sent is written down beside its runs, so that a run which resumes is continued in it and
no step is sent twice.
"""

import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import Any

from pipeline.errors import UserError, install_command
from pipeline.files.artifact import write_file
from pipeline.files.file_tail import FileTail, file_stamp
from pipeline.files.locks import Lock
from pipeline.files.text import printable
from pipeline.files.worker import python_module
from pipeline.project.cache import SHORT_KEY
from pipeline.project.logs import run_state
from pipeline.project.logs.run_log import (
    Sample,
    Step,
    Telemetry,
    parse_sample,
    parse_telemetry,
    step_parser,
)
from pipeline.project.logs.runs import LogFiles, curves
from pipeline.project.logs.trackers import TRACKERS, TrackedRun, Tracker

POLL = 1.0  # seconds between two looks at the logs
# seconds that a tracker may take for one batch, or to finish, before its process is killed
PATIENCE = 300
MAX_PARAMS, MAX_TEXT = 200, 500  # of the params that a tracker is told, and characters of one
START = {"attempt": 1, "sending": 0}
QUIET = {  # libraries that would call home, or ask
    "DO_NOT_TRACK": "1",
    "DVC_NO_ANALYTICS": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "WANDB_ERROR_REPORTING": "false",
    "GRADIO_ANALYTICS_ENABLED": "False",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}


@dataclass(frozen=True)
class Followed:
    """A run to follow. `started`: when its process did, which tells it from another run in the same
    run folder.

    `artifact`: the folder with its logs once it is done. `out`: where the tracker keeps its runs;
    empty: its own place in the project. A run that is sent later has no `run` and no `started`.
    """

    root: str
    stage: str
    sweeps: bool
    key: str
    params: Mapping[str, Any]
    artifact: str
    run: str = ""
    started: float = 0.0
    out: str = ""


class Follower:
    """The process in which one tracker follows one run."""

    def __init__(self, name: str, followed: Followed) -> None:
        self.name = name
        module = TRACKERS[name]
        folder = Path(followed.out) if followed.out else Path(followed.root, module.FOLDER)
        shown = followed.out or module.FOLDER
        self.view = module.VIEW.format(folder=shown)
        self.log = _states(name, followed) / f"{followed.stage}.log"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        # the same code as here, whatever lies in the project's folder
        code = str(Path(__file__).parents[3])
        path = os.pathsep.join(filter(None, (code, os.environ.get("PYTHONPATH"))))
        # a pipe could fill up, if nobody reads it
        with tempfile.TemporaryFile() as given, self.log.open("wb") as log:
            given.write(json.dumps(asdict(followed)).encode())
            given.seek(0)
            self.process = subprocess.Popen(
                python_module(__name__, name),
                cwd=followed.root,
                env={**QUIET, **os.environ, "PYTHONPATH": path},
                stdin=given,
                stdout=log,
                stderr=subprocess.STDOUT,
                # Ctrl+C is for the training: the tracker then reads how it ended
                start_new_session=True,
            )
        # leaves no zombie while a run goes on
        threading.Thread(target=self.process.wait, daemon=True).start()

    def wait(self, seconds: float | None = None) -> bool:
        """Whether it has ended, at the latest after so many seconds."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def problem(self) -> str:
        """Why it failed; empty if it did not."""
        if not self.process.returncode:
            return ""
        if self.process.returncode < 0:
            return f"killed by signal {-self.process.returncode}"
        lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return printable(lines[-1])[:MAX_TEXT] if lines else f"exit code {self.process.returncode}"


def check(names: Iterator[str] | list[str] | tuple[str, ...], key: str = "report_to") -> None:
    """Raises UserError for a name that no tracker has."""
    if unknown := [name for name in names if name not in TRACKERS]:
        raise UserError(
            f"{key} must name trackers of {', '.join(TRACKERS)}, got {unknown[0]!r}. Change it."
        )


def missing(name: str) -> str:
    """What to install for a tracker; empty if it is there."""
    library = TRACKERS[name].LIBRARY
    return (
        ""
        if find_spec(library)
        else f"{library} is not installed. Run `{install_command('trackers')}`"
    )


def _states(name: str, followed: Followed) -> Path:
    """The folder of the files that say what a tracker was sent, and what its process printed."""
    return Path(followed.out) if followed.out else Path(followed.root, "runs", name)


# In the tracker's own process


class Feed:
    """One curve's logs, and the run of the tracker that they are sent to, which is opened for the
    first line.
    """

    def __init__(self, name: str, module: Any, followed: Followed, files: LogFiles) -> None:
        self._module, self._followed, self._curve = module, followed, files.name
        self._run = _name(f"{followed.stage}-{followed.key[:SHORT_KEY]}", files.name)
        self._path = _states(name, followed) / f".{self._run.replace('/', '.')}.json"
        self._state = _read_state(self._path)
        if self._state["sending"]:
            # The tracker was killed amid a batch, and may have any part of it: a run of its own
            # gets all of it once.
            self._state = {"attempt": self._state["attempt"] + 1, "sending": 0}
        self._tracker: Tracker | None = None
        self.read_from(files, followed.started)

    def read_from(self, files: LogFiles, since: float = 0.0) -> None:
        """Read `files` from now on, which have the same lines.

        A file that was last written before `since` is another run's.
        """
        self._since = since
        steps = FileTail(files.loss, lambda header: partial(_read_step, step_parser(header)))
        samples: FileTail[Sample] = FileTail(files.samples, lambda _: parse_sample, header=False)
        self._tails: dict[str, FileTail[Any]] = {"loss": steps, "samples": samples}
        if files.telemetry:
            self._tails["telemetry"] = FileTail(files.telemetry, lambda _: parse_telemetry)

    def send(self, is_ours: Callable[[], bool]) -> None:
        """Send the lines that are new. `is_ours`: whether the logs were this run's while they were
        read.
        """
        for name, tail in self._tails.items():
            more = tail.changed() and _written(tail.path) > self._since
            while more:
                chunk = tail.read()
                if not is_ours():
                    return
                more = chunk.more
                last = self._state.get(name, 0)
                # a resumed run writes the same lines again
                rows = [row for row in chunk.rows if row.step > last]
                if rows:
                    self._tracker = self._tracker or self._open()
                    self._write_state(sending=1)
                    _send(self._tracker, rows)
                    self._write_state(sending=0, **{name: rows[-1].step})

    def finish(self, state: str) -> None:
        if self._tracker:
            self._tracker.finish(state)

    def _open(self) -> Tracker:
        followed, attempt = self._followed, self._state["attempt"]
        folder = Path(followed.out) if followed.out else Path(followed.root, self._module.FOLDER)
        run = TrackedRun(
            project=_name(Path(followed.root).name) or "lora",
            place=_name(followed.stage, self._curve),
            name=f"{self._run}.{attempt}" if attempt > 1 else self._run,
            params=dict(_flat(followed.params)),
            folder=folder,
            is_new=self._state.keys() <= START.keys(),
        )
        opened: Tracker = self._module.Tracker(run)
        return opened

    def _write_state(self, **changes: int) -> None:
        self._state |= changes
        write_file(self._path, json.dumps(self._state))


def _send(tracker: Tracker, rows: list[Any]) -> None:
    for step, same in groupby(rows, lambda row: row.step):
        of_step = list(same)
        if isinstance(of_step[0], Sample):
            shown = [
                Sample(step, *(printable(text or "") for text in sample[1:])) for sample in of_step
            ]
            tracker.log_text(step, shown)
        elif values := _values(of_step[-1]):
            tracker.log(step, values)
    tracker.flush()


def _read_step(parse: Callable[[str], Any], line: str) -> Step:
    return Step(*parse(line))


def _values(row: Step | Telemetry) -> dict[str, float]:
    """Names as the Trainer of transformers has them: train/loss, eval/loss. Only finite values."""
    if isinstance(row, Telemetry):
        named = {
            "system/tokens_per_second": row.tokens_per_second,
            "system/process_memory_bytes": row.resident,
            "system/tensor_memory_bytes": row.measured,
        }
    else:
        values = {
            key: value for key, value in vars(row).items() if key != "step" and value is not None
        }
        named = {
            f"eval/{k[5:]}" if k.startswith("eval_") else f"train/{k}": value
            for k, value in values.items()
        }
    return {key: float(value) for key, value in named.items() if math.isfinite(value)}


def _name(*parts: str) -> str:
    """Names joined by /, each without characters that a tracker or a terminal takes amiss."""
    return "/".join(re.sub(r"[^\w.=+~-]+", "_", part).strip(".") for part in parts if part)


def _flat(params: Mapping[str, Any]) -> Iterator[tuple[str, bool | int | float | str]]:
    """Numbers as they are, all else as a text of one line."""
    for key, value in list(params.items())[:MAX_PARAMS]:
        plain = isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value))
        text = (
            value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
        )
        yield _name(key), value if plain else printable(" ".join(text.split()))[:MAX_TEXT]


def _written(path: Path) -> float:
    """When a file was last written, in seconds since the epoch; 0 if there is none."""
    stamp = file_stamp(path)
    return stamp[-1] / 1e9 if stamp else 0.0


def _read_state(path: Path) -> dict[str, int]:
    """What a tracker was sent: the last step of each log; whether a batch was begun and not ended;
    how many runs.
    """
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        return START | {str(name): int(step) for name, step in state.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return dict(START)


def follow(name: str, followed: Followed) -> None:
    """Send a run to a tracker until it has ended. Killed by SIGALRM if the tracker hangs."""
    module = TRACKERS[name]
    folder, artifact = Path(followed.run), Path(followed.artifact)
    feeds: dict[str, Feed] = {}

    def is_ours() -> bool:
        journal = run_state.read(folder)
        return journal is not None and journal.started == followed.started

    def send(folder: Path, is_ours: Callable[[], bool]) -> None:
        for files in curves(folder, followed.sweeps):
            if files.name not in feeds:
                feeds[files.name] = Feed(name, module, followed, files)
            feeds[files.name].send(is_ours)

    state = "done"
    while followed.started:
        signal.alarm(PATIENCE)  # its default action needs no turn of a thread that hangs
        journal = run_state.read(folder)
        goes_on = (
            is_ours()
            and journal is not None
            and journal.state == "running"
            and run_state.alive(folder)
        )
        # after the look at the state: a run that had ended by then writes nothing more
        send(folder, is_ours)
        if journal is not None and is_ours():
            state = "failed" if journal.state == "running" else journal.state  # its process died
        if not goes_on:
            break
        time.sleep(POLL)
    # no limit for a run that is sent later: its user waits for it, and can interrupt it
    signal.alarm(PATIENCE if followed.started else 0)
    # another run has the run folder, or there is none: the logs are in the artifact
    if not (followed.started and is_ours()) and artifact.is_dir():
        for files in curves(artifact, followed.sweeps):
            if files.name in feeds:
                feeds[files.name].read_from(files)
        send(artifact, lambda: True)
    for feed in feeds.values():
        feed.finish(state)


def main() -> None:
    """`python -m pipeline.project.logs.follower NAME`, with what to follow as JSON on stdin."""
    name, followed = sys.argv[1], Followed(**json.load(sys.stdin))
    os.nice(10)  # the cores are the training's
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    with Lock(_states(name, followed) / f".{followed.stage}.lock") as lock:
        # if a run resumes at once, the follower of the last one first reads how that ended
        lock.acquire()
        try:
            follow(name, followed)
        except UserError as error:
            sys.exit(str(error))


if __name__ == "__main__":
    main()
