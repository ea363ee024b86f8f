"""One curve that is looked at: its log as it grows, and what its telemetry says."""

import asyncio
from collections import deque
from dataclasses import dataclass
from math import isfinite

from pipeline.project.logs.run_log import TELEMETRY_COLUMNS
from pipeline.project.logs.runs import LogFiles
from tui.screens.curves.series import HELD_OUT, Log, parse_step, step_parser
from tui.services.csv_tail import Change, CsvTail

RECENT = 200  # steps over which the speed for the ETA is taken


@dataclass(frozen=True)
class Telemetry:
    """A line of telemetry.csv: seconds since its process began, and bytes (0: not measured)."""

    step: int
    seconds: float
    tokens_per_second: float
    resident: int
    predicted: int
    measured: int


def parse_telemetry(line: str) -> Telemetry:
    """Raises ValueError."""
    step, seconds, speed, resident, _, predicted, measured = line.split(",")[: len(TELEMETRY_COLUMNS)]
    return Telemetry(int(step), float(seconds), float(speed), int(resident), int(predicted), int(measured))


class CurveLog:
    """All that was read of one curve so far. `end` says how a sweep's adapter ended before the others, if it did."""

    def __init__(self, files: LogFiles, smoothing: float) -> None:
        self.name, self.log, self.smoothing = files.name, Log(smoothing), smoothing
        self.change: Change = ""
        self.end = ""
        self.recent: deque[Telemetry] = deque(maxlen=RECENT)
        self._loss = CsvTail(files.loss, parse_step, step_parser)
        self._telemetry = CsvTail(files.telemetry, parse_telemetry) if files.telemetry else None

    def changed(self) -> bool:
        """Whether there is something to `read`."""
        return self._loss.changed()

    async def read(self) -> None:
        """Read all that is new, giving way to the screen after every piece."""
        more = True
        while more:
            piece = self._loss.read()
            if piece.change:
                self.change, self.log = piece.change, Log(self.smoothing)
            self.log.extend(piece.rows)
            more = piece.more
            await asyncio.sleep(0)

    def measured(self) -> bool:
        """Whether there is something to `measure`."""
        return self._telemetry is not None and self._telemetry.changed()

    async def measure(self) -> None:
        """The same for the telemetry."""
        more = self._telemetry is not None
        while more and self._telemetry is not None:
            lines = self._telemetry.read()
            if lines.change:
                self.recent.clear()
            for line in lines.rows:
                if self.recent and line.seconds < self.recent[-1].seconds:
                    self.recent.clear()  # another process goes on: its clock begins again
                self.recent.append(line)
            more = lines.more
            await asyncio.sleep(0)

    def smooth(self, strength: float) -> None:
        self.smoothing = strength
        self.log.smooth(strength)

    @property
    def skipped(self) -> int:
        """Lines that are not this log's."""
        return self._loss.skipped + self.log.foreign

    def held_out(self, least: bool) -> float | None:
        """The last loss on held-out examples, or the `least`, at which training ended; None if none was measured."""
        values = self.log.series[HELD_OUT].y
        found = min(values) if least and values else values[-1] if values else None
        return found if found is not None and isfinite(found) else None
