"""The log of each stage: what it printed in the pipeline's last runs, the steps that it logged, the
memory that it predicted for itself.
"""

import re
from collections import defaultdict, deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import NamedTuple

from pipeline.calc.settings import CONTEXT
from pipeline.files.file_tail import FileTail
from pipeline.files.text import printable
from pipeline.project.logs.run_log import (
    COLUMNS,
    LOSS,
    TELEMETRY,
    TELEMETRY_COLUMNS,
    parse_telemetry,
)
from pipeline.project.logs.run_state import Journal
from pipeline.views.stages import StageState

# bytes of a log per read: of a stage that prints 100 MB only the end is shown
MAX_READ = 256 * 1024
MAX_LINES = 2000  # of a stage, and as many steps
MAX_LENGTH = 2000  # characters of a line
WIDE = 80  # cells from which a step is shown with all its values
ALL = ""  # the key of the whole log
# what dvc prints before a stage's output
STARTS = re.compile(r"Running stage '(?:[^':]*:)?(\w+)':")
OF_DVC = re.compile(
    r"(Updating|Generating) lock file |Use `dvc push`|Stage '.*' didn't change, skipping$|\s*$"
)
ESCAPES = re.compile(
    r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[@-Z\\-_])"
)  # of a terminal: CSI, OSC, others
TELEMETRY_END = 1024  # bytes: several lines of telemetry
_NOTE = re.compile(r"([\d.]+) (GiB|MiB|KiB|B) of tensors (predicted|measured) at the peak")
_UNITS = {"GiB": 2**30, "MiB": 2**20, "KiB": 2**10, "B": 1}


class LoggedStep(NamedTuple):
    """A line of loss.csv."""

    step: int
    epoch: int
    loss: float
    learning_rate: float
    grad_norm: float

    @lru_cache(maxsize=2 * MAX_LINES)  # noqa: B019  # a tuple of numbers
    def line(self, width: int) -> str:
        """`step 120   epoch 20  loss 0.1141`, and more where there is room."""
        text = f"step {self.step:<5} epoch {self.epoch:<3} loss {self.loss:.4g}"
        more = f"learning rate {self.learning_rate:<8.4g} gradient {self.grad_norm:.4g}"
        return f"{text:<36} {more}" if width >= WIDE else text


@dataclass(frozen=True)
class StageLog:
    """What is known of a stage's last run."""

    stage: str = ALL
    printed: Sequence[str] = ()
    steps: Sequence[LoggedStep] = ()

    def lines(self, state: StageState | None, width: int) -> list[str]:
        """What it printed, with its notes and steps after the command, or at the end while it runs;
        of ALL, what was printed alone.
        """
        if self.stage == ALL:
            return [*self.printed]
        notes = state.run.notes if state and state.run else []
        logged = [f"… {note.removeprefix(f'{self.stage}: ')}" for note in notes]
        logged += [step.line(width) for step in self.steps]

        # What was printed after the steps, the result or an error, ends the log.
        at = len(self.printed)
        if not state or state.state != "running":
            at = int("".join(self.printed[:1]).startswith("> "))
        return [*self.printed[:at], *logged, *self.printed[at:]]


class StageLogs:
    """Reads the pipeline's logs, the older first, and those of one stage's steps.

    A stage that the last run left out keeps what it printed before. Threads may share it.
    """

    def __init__(self, *logs: Path) -> None:
        self._tails = [
            FileTail(log, lambda _: shown_line, header=False, latest=MAX_READ) for log in logs
        ]
        self._lines = defaultdict[str, deque[str]](lambda: deque(maxlen=MAX_LINES))
        self._stage = ALL  # whose output is read
        self._steps = _steps_of(Path())
        self._logged = deque[LoggedStep](maxlen=MAX_LINES)
        self._lock = Lock()

    def read(self, stage: str, folder: Path, stages: Collection[str]) -> StageLog:
        """Read what is new, and return what there is of a stage with this run folder; of ALL, the
        whole log.
        """
        with self._lock:
            for tail in self._tails:
                self._read_printed(tail, stages)
            if self._steps.path.parent != folder:
                self._steps = _steps_of(folder)
                self._logged.clear()
            chunk = self._steps.read()
            if chunk.change:
                self._logged.clear()
            self._logged += chunk.rows
            return StageLog(stage, [*self._lines[stage]], [*self._logged])

    def _read_printed(self, tail: FileTail[str], stages: Collection[str]) -> None:
        if not tail.changed():
            return
        chunk = tail.read()
        if chunk.change:
            self._stage = ALL
            self._lines[ALL].clear()
        for line in chunk.rows:
            start = STARTS.fullmatch(line)
            if start and start[1] in stages:
                self._stage = start[1]
                self._lines[self._stage].clear()
            elif self._stage != ALL and not OF_DVC.match(line):
                self._lines[self._stage].append(line)
            self._lines[ALL].append(line)


def shown_line(line: str) -> str:
    """A line as a terminal shows it: what follows its last carriage return, without escape
    sequences.
    """
    last = line.rstrip("\r").rpartition("\r")[2]
    return printable(ESCAPES.sub("", last[:MAX_LENGTH])).expandtabs()


def _steps_of(folder: Path) -> FileTail[LoggedStep]:
    return FileTail(folder / LOSS, lambda _: _parse_step, header=False, latest=MAX_READ)


def _parse_step(line: str) -> LoggedStep:
    """Raises ValueError for the header, and for the rest of a line."""
    values = dict(zip(COLUMNS, line.split(","), strict=False))
    if len(values) < len(COLUMNS):
        raise ValueError(line)
    numbers = (float(values[name]) for name in LoggedStep._fields[2:])
    return LoggedStep(int(values["step"]), int(values["epoch"]), *numbers)


class Prediction(NamedTuple):
    """Bytes of tensors at the peak of a step (0: not known), and the peak of the whole process on
    the CPU.
    """

    predicted: int
    measured: int = 0
    resident: int = 0
    device: str = ""

    @property
    def on_gpu(self) -> int:
        """Bytes that are predicted for each GPU of the run, with CUDA's context; 0 if it does not
        run on one.
        """
        return self.predicted + CONTEXT if self.device == "cuda" else 0

    @property
    def of_process(self) -> int:
        """Bytes that are predicted for the process: beside the tensors it holds libraries. 0 until
        that is measured.
        """
        if self.device == "cuda" or not (self.predicted and self.measured):
            return 0
        return self.resident - self.measured + self.predicted


def read_prediction(folder: Path, run: Journal | None) -> Prediction | None:
    """What a stage's run folder says. Its telemetry is written in blocks; until the first, its
    notes say it.
    """
    for path in (folder / TELEMETRY, *folder.glob(f"*/{TELEMETRY}")):
        if prediction := _last_line(path):
            return prediction
    found = {
        match[3]: round(float(match[1]) * _UNITS[match[2]])
        for match in map(_NOTE.search, run.notes if run else ())
        if match
    }
    return (
        Prediction(found["predicted"], found.get("measured", 0)) if "predicted" in found else None
    )


def _last_line(path: Path) -> Prediction | None:
    """The last complete line of a telemetry file, or None if it has no prediction."""
    try:
        with path.open("rb") as file:
            file.seek(max(file.seek(0, 2) - TELEMETRY_END, 0))
            *_, line, _ = file.read().decode(errors="replace").split("\n")
        telemetry, device = (
            parse_telemetry(line),
            line.split(",")[TELEMETRY_COLUMNS.index("device")],
        )
    except (OSError, ValueError):
        return None
    if not telemetry.predicted:
        return None
    return Prediction(telemetry.predicted, telemetry.measured, telemetry.resident, device)
