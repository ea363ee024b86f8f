"""The log and the telemetry of one curve, read as they grow."""

import asyncio
from collections import deque
from dataclasses import dataclass
from math import isfinite

from pipeline.project.logs.run_log import TELEMETRY_COLUMNS
from pipeline.project.logs.runs import LogFiles
from tui.screens.curves.series import HELD_OUT, Log, parse_step, step_parser
from tui.services.csv_tail import Change, CsvTail

RECENT = 200  # steps from which the ETA is estimated


@dataclass(frozen=True)
class Telemetry:
    """A line of telemetry.csv: seconds since the start of its process; sizes in bytes (0: not measured)."""

    step: int
    seconds: float
    tokens_per_second: float
    resident: int
    predicted: int
    measured: int


def parse_telemetry(line: str) -> Telemetry:
    """A line of telemetry.csv. Raises ValueError."""
    step, seconds, speed, resident, _, predicted, measured = line.split(",")[: len(TELEMETRY_COLUMNS)]
    return Telemetry(int(step), float(seconds), float(speed), int(resident), int(predicted), int(measured))


class CurveLog:
    """Everything read of one curve. `outcome`: how a sweep's adapter ended before the others, if it did."""

    def __init__(self, files: LogFiles, smoothing: float) -> None:
        self.name, self.log, self.smoothing = files.name, Log(smoothing), smoothing
        self.change: Change = ""
        self.outcome = ""
        self.recent: deque[Telemetry] = deque(maxlen=RECENT)
        self._loss_tail = CsvTail(files.loss, parse_step, step_parser)
        self._telemetry_tail = CsvTail(files.telemetry, parse_telemetry) if files.telemetry else None

    def changed(self) -> bool:
        """Whether `read` has something to read."""
        return self._loss_tail.changed()

    async def read(self) -> None:
        """Read all new rows, yielding to the event loop after every chunk."""
        more = True
        while more:
            chunk = self._loss_tail.read()
            if chunk.change:
                self.change, self.log = chunk.change, Log(self.smoothing)
            self.log.extend(chunk.rows)
            more = chunk.more
            await asyncio.sleep(0)

    def telemetry_changed(self) -> bool:
        """Whether `read_telemetry` has something to read."""
        return self._telemetry_tail is not None and self._telemetry_tail.changed()

    async def read_telemetry(self) -> None:
        """Read all new telemetry, yielding to the event loop after every chunk."""
        more = self._telemetry_tail is not None
        while more and self._telemetry_tail is not None:
            chunk = self._telemetry_tail.read()
            if chunk.change:
                self.recent.clear()
            for line in chunk.rows:
                if self.recent and line.seconds < self.recent[-1].seconds:
                    self.recent.clear()  # resumed by another process, whose clock starts at 0
                self.recent.append(line)
            more = chunk.more
            await asyncio.sleep(0)

    def smooth(self, strength: float) -> None:
        self.smoothing = strength
        self.log.smooth(strength)

    @property
    def skipped(self) -> int:
        """Number of lines that are not valid rows of this log."""
        return self._loss_tail.skipped + self.log.foreign

    def held_out(self, lowest: bool) -> float | None:
        """The last loss on held-out examples, or the `lowest` (early stopping keeps that one); None if not measured."""
        values = self.log.series[HELD_OUT].y
        loss = min(values) if lowest and values else values[-1] if values else None
        return loss if loss is not None and isfinite(loss) else None
