"""One run that is looked at: its log as it grows, what its telemetry and its journal say."""

import asyncio
from collections import deque
from dataclasses import dataclass

from pipeline import journal
from pipeline.curves import Run
from pipeline.journal import Journal
from pipeline.metrics import TELEMETRY_COLUMNS, in_units
from tui.follow import Change, Tail
from tui.series import HELD_OUT, Log, parse_step, step_parser

RECENT = 200  # steps over which the speed for the ETA is taken
WORDS = {"done": "finished", "stopped": "stopped", "failed": "failed"}
DIED = "its process ended without a word; started again, it goes on from its last checkpoint"


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


class Watched:
    """A run and all that was read of it so far."""

    def __init__(self, run: Run, smoothing: float) -> None:
        self.run, self.log, self.smoothing = run, Log(smoothing), smoothing
        self.change: Change = ""
        self.journal: Journal | None = None
        self.alive = False
        self._loss = Tail(run.loss, parse_step, step_parser)
        self._telemetry = Tail(run.telemetry, parse_telemetry) if run.telemetry else None
        self._recent: deque[Telemetry] = deque(maxlen=RECENT)

    def changed(self) -> bool:
        """Whether there is something to `read`."""
        return self._loss.changed() or (self._telemetry is not None and self._telemetry.changed())

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
        more = self._telemetry is not None
        while more and self._telemetry is not None:
            lines = self._telemetry.read()
            if lines.change:
                self._recent.clear()
            for line in lines.rows:
                if self._recent and line.seconds < self._recent[-1].seconds:
                    self._recent.clear()  # another process goes on: its clock begins again
                self._recent.append(line)
            more = lines.more
            await asyncio.sleep(0)

    def smooth(self, strength: float) -> None:
        self.smoothing = strength
        self.log.smooth(strength)

    def look(self) -> bool:
        """Read the journal again; whether it says something new."""
        before = self.journal, self.alive
        folder = self.run.folder
        self.journal = journal.read(folder) if folder else None
        self.alive = bool(folder and self.journal and self.journal.state == "running" and journal.alive(folder))
        return before != (self.journal, self.alive)

    @property
    def state(self) -> str:
        """live, finished, stopped, failed or died; and whether the log was cut back, replaced or is gone."""
        if self.journal is None:
            word = "last run" if self.run.folder else "finished"
        else:
            word = WORDS.get(self.journal.state) or ("live" if self.alive else "died")
        return f"{word}, {self.change}" if self.change else word

    @property
    def eta(self) -> float | None:
        """Seconds to the last step at the speed of the last RECENT steps; None if the run is not going on."""
        if not self.alive or self.journal is None or len(self._recent) < 2:
            return None
        first, last = self._recent[0], self._recent[-1]
        if last.step <= first.step:
            return None
        left = max(self.journal.total - max(last.step, int(self.log.steps[-1]) if self.log.steps else 0), 0)
        return left * (last.seconds - first.seconds) / (last.step - first.step)

    def facts(self) -> list[str]:
        """What there is to say of the run, in words, the most important first."""
        steps, facts = self.log.steps, [self.state]
        if steps:
            total = self.journal.total if self.journal and self.journal.total else int(steps[-1])
            facts.append(f"{steps[-1]:,.0f}/{total:,}")
            facts.append(f"loss {self.log.columns['loss'][-1]:.4g}")
        for name, words in ((HELD_OUT, "held out"), ("divergence", "divergence")):
            if values := self.log.series[name].y:
                facts.append(f"{words} {values[-1]:.4g}")
        if flat := self.log.flat(self.alive):
            facts.append(f"» flat from epoch {flat[0]:.0f}")
        if self._recent:
            facts += _measured(self._recent[-1])
        if (eta := self.eta) is not None:
            facts.append(f"{duration(eta)} left")
        if skipped := self._loss.skipped + self.log.foreign:
            facts.append(f"{skipped:,} foreign lines skipped")
        if why := self._why():
            facts.append(why)
        return facts

    def _why(self) -> str:
        if self.journal is None:
            return ""
        return self.journal.message or (DIED if self.state.startswith("died") else "")


def _measured(last: Telemetry) -> list[str]:
    found = [f"{last.tokens_per_second:,.0f} tok/s"]
    if last.predicted:
        measured = in_units(last.measured) if last.measured else "not yet"
        found.append(f"{in_units(last.predicted)} predicted, {measured} measured")
    found.append(f"process {in_units(last.resident)}")
    return found


def duration(seconds: float) -> str:
    """1:05:09, 5:09 or 0:09."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
