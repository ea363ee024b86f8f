"""The log of each stage: what it printed in the pipeline's last runs, and the steps that it
logged.
"""

import re
from collections import deque
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from pipeline.files.file_tail import FileTail
from pipeline.files.text import printable
from pipeline.project.logs.run_log import COLUMNS, LOSS

# bytes of a log per read: of a stage that prints 100 MB only the end is shown
MAX_READ = 256 * 1024
MAX_LINES = 2000  # of a stage, and as many steps
MAX_LENGTH = 2000  # characters of a line
ALL = ""  # the key of the whole log
# what dvc prints before a stage's output
STARTS = re.compile(r"Running stage '(?:[^':]*:)?(\w+)':")
OF_DVC = re.compile(
    r"(Updating|Generating) lock file |Use `dvc push`|Stage '.*' didn't change, skipping$|\s*$"
)
ESCAPES = re.compile(
    r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[@-Z\\-_])"
)  # of a terminal: CSI, OSC, others


def shown_line(line: str) -> str:
    """A line as a terminal shows it: what follows its last carriage return, without escape
    sequences.
    """
    return printable(
        ESCAPES.sub("", line.rstrip("\r").rpartition("\r")[2][:MAX_LENGTH])
    ).expandtabs()


class StageLogs:
    """The lines of the pipeline's log by stage. A stage that the last run left out keeps what it
    printed before.
    """

    def __init__(self, *logs: Path) -> None:
        self._tails = [
            FileTail(log, lambda _: shown_line, header=False, latest=MAX_READ) for log in logs
        ]
        self._lines: dict[str, deque[str]] = {}
        self._stage = ALL  # whose output is read

    def read(self, stages: Collection[str]) -> bool:
        """Read what is new; whether there is any."""
        changed = False
        for tail in self._tails:
            if not tail.changed():
                continue
            chunk = tail.read()
            if chunk.change:
                self._stage = ALL
                self._lines.pop(ALL, None)
            for line in chunk.rows:
                self._add(line, stages)
            changed = changed or bool(chunk.rows or chunk.change)
        return changed

    def _add(self, line: str, stages: Collection[str]) -> None:
        start = STARTS.fullmatch(line)
        if start and start[1] in stages:
            self._stage = start[1]
            self._lines[self._stage] = deque(maxlen=MAX_LINES)
        elif self._stage != ALL and not OF_DVC.match(line):
            self._lines[self._stage].append(line)
        self._lines.setdefault(ALL, deque(maxlen=MAX_LINES)).append(line)

    def lines(self, stage: str) -> list[str]:
        """The last lines of a stage, or of the whole log."""
        return [*self._lines.get(stage, ())]


class LoggedStep(NamedTuple):
    """A line of loss.csv."""

    step: int
    epoch: int
    loss: float
    learning_rate: float
    grad_norm: float

    def line(self, width: int) -> str:
        """`step 120   epoch 20  loss 0.1141`, and more where there is room."""
        text = f"step {self.step:<5} epoch {self.epoch:<3} loss {self.loss:.4g}"
        more = f"learning rate {self.learning_rate:<8.4g} gradient {self.grad_norm:.4g}"
        return f"{text:<36} {more}" if width >= 80 else text


class StepLog:
    """The last steps in a run folder's loss.csv."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._tail = FileTail(folder / LOSS, lambda _: _parse_step, header=False, latest=MAX_READ)
        self.steps: deque[LoggedStep] = deque(maxlen=MAX_LINES)

    def read(self) -> bool:
        """Read what is new; whether there is any."""
        if not self._tail.changed():
            return False
        chunk = self._tail.read()
        if chunk.change:
            self.steps.clear()
        self.steps += chunk.rows
        return bool(chunk.rows or chunk.change)


def _parse_step(line: str) -> LoggedStep:
    """Raises ValueError for the header, and for the rest of a line."""
    values = dict(zip(COLUMNS, line.split(","), strict=False))
    if len(values) < len(COLUMNS):
        raise ValueError(line)
    numbers = (float(values[name]) for name in LoggedStep._fields[2:])
    return LoggedStep(int(values["step"]), int(values["epoch"]), *numbers)
