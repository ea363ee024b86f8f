"""One run that is looked at: its curves as they grow, what its telemetry, its journal and its table of ends say."""

from collections.abc import Iterator
from math import isfinite

from pipeline.project.logs import run_state
from pipeline.project.logs.run_log import in_units
from pipeline.project.logs.run_state import Journal
from pipeline.project.logs.runs import Run
from pipeline.project.params.grid import DIVERGED, STOPPED, TABLE, read_run_outcomes
from tui.screens.curves.curve_log import CurveLog, Telemetry
from tui.screens.curves.series import HELD_OUT, Log
from tui.services.csv_tail import Change

WORDS = {"done": "finished", "stopped": "stopped", "failed": "failed"}
DIED = "its process ended without a word; started again, it goes on from its last checkpoint"
NAMED = 2  # adapters that are named where several have ended


class RunView:
    """A run and all that was read of it so far: a trace for each of its curves, by name."""

    def __init__(self, run: Run, smoothing: float) -> None:
        self.smoothing = smoothing
        self.journal: Journal | None = None
        self.alive = False
        self.traces: dict[str, CurveLog] = {}
        self._ends: tuple[int, ...] = ()  # of the table of ends, as it was read
        self.renew(run)
        self.best = next(iter(self.traces.values()))

    def renew(self, run: Run) -> None:
        """The same run, which may have other curves by now."""
        self.run, known = run, self.traces
        self.traces = {files.name: known.get(files.name) or CurveLog(files, self.smoothing) for files in run.curves}
        self.best = next(iter(self.traces.values()))

    @property
    def log(self) -> Log:
        """The run's only log, or that of a sweep's best adapter."""
        return self.best.log

    @property
    def logs(self) -> list[Log]:
        return [trace.log for trace in self.traces.values()]

    def changed(self) -> bool:
        """Whether there is something to `read`."""
        return any(trace.changed() for trace in self.traces.values()) or self._leader.measured()

    async def read(self) -> None:
        """Read all that is new, giving way to the screen after every piece; telemetry of one curve for all."""
        for trace in self.traces.values():
            if trace.changed():
                await trace.read()
        await self._leader.measure()
        self._choose()

    def smooth(self, strength: float) -> None:
        self.smoothing = strength
        for trace in self.traces.values():
            trace.smooth(strength)

    def look(self) -> bool:
        """Read the journal again, and how adapters ended; whether they say something new."""
        before = self.journal, self.alive
        folder = self.run.folder
        self.journal = run_state.read(folder) if folder else None
        self.alive = bool(folder and self.journal and self.journal.state == "running" and run_state.alive(folder))
        return self._look_at_ends() or before != (self.journal, self.alive)

    def _look_at_ends(self) -> bool:
        try:
            stat = (self.run.log_folder / TABLE).stat() if self.run.sweeps else None
        except OSError:
            stat = None
        now = (stat.st_ino, stat.st_mtime_ns, stat.st_size) if stat else ()
        if now == self._ends:
            return False
        self._ends, found = now, read_run_outcomes(self.run.log_folder)
        for name, trace in self.traces.items():
            trace.end = end if (end := found.get(name, "")) in (DIVERGED, STOPPED) else ""
        self._choose()
        return True

    # Which of its curves stand for it

    @property
    def _leader(self) -> CurveLog:
        """The first that still goes on: what its telemetry says of the process is so for all."""
        traces = list(self.traces.values())
        return next((trace for trace in traces if not trace.end), traces[0])

    def _choose(self) -> None:
        self.best = min(self.traces.values(), key=self._rank)

    def _rank(self, trace: CurveLog) -> tuple[bool, float]:
        loss = self.loss_of(trace)[1]
        return trace.end == DIVERGED, loss if loss is not None and isfinite(loss) else float("inf")

    def loss_of(self, trace: CurveLog) -> tuple[str, float | None]:
        """What adapters are compared by, and its name: the loss on held-out examples where there is one."""
        held_out = trace.held_out(least=bool(self.run.params.get("patience")))
        if held_out is not None:
            return "held out", held_out
        return "loss", trace.log.settled(self.alive and not trace.end)

    # What there is to say

    @property
    def change(self) -> Change:
        return next((trace.change for trace in self.traces.values() if trace.change), "")

    @property
    def state(self) -> str:
        """live, finished, stopped, failed or died; and whether the log was cut back, replaced or is gone."""
        if self.journal is None:
            word = "last run" if self.run.folder else "finished"
        else:
            word = WORDS.get(self.journal.state) or ("live" if self.alive else "died")
        return f"{word}, {self.change}" if self.change else word

    @property
    def step(self) -> int:
        """The last step that any of its curves has."""
        return max((int(log.steps[-1]) for log in self.logs if log.steps), default=0)

    @property
    def eta(self) -> float | None:
        """Seconds to the last step at the speed of the last RECENT steps; None if the run is not going on."""
        recent = self._leader.recent
        if not self.alive or self.journal is None or len(recent) < 2:
            return None
        first, last = recent[0], recent[-1]
        if last.step <= first.step:
            return None
        left = max(self.journal.total - max(last.step, self.step), 0)
        return left * (last.seconds - first.seconds) / (last.step - first.step)

    def facts(self) -> list[str]:
        """What there is to say of the run, in words, the most important first."""
        facts = [self.state]
        if step := self.step:
            facts.append(f"{step:,}/{self.journal.total if self.journal and self.journal.total else step:,}")
            facts += self._adapters() if self.run.sweeps else self._curve()
        if recent := self._leader.recent:
            facts += _measured(recent[-1], sum(not trace.end for trace in self.traces.values()))
        if (eta := self.eta) is not None:
            facts.append(f"{duration(eta)} left")
        if skipped := sum(trace.skipped for trace in self.traces.values()):
            facts.append(f"{skipped:,} foreign lines skipped")
        if why := self._why():
            facts.append(why)
        return facts

    def _curve(self) -> Iterator[str]:
        yield f"loss {self.log.columns['loss'][-1]:.4g}"
        for name, words in ((HELD_OUT, "held out"), ("divergence", "divergence")):
            if values := self.log.series[name].y:
                yield f"{words} {values[-1]:.4g}"
        if flat := self.log.flat(self.alive):
            yield f"» flat from epoch {flat[0]:.0f}"

    def _adapters(self) -> Iterator[str]:
        word, loss = self.loss_of(self.best)
        if loss is not None and self.best.end != DIVERGED:
            yield f"best {self.best.name}: {word} {loss:.4g}"
        for end in (DIVERGED, STOPPED):
            if names := [trace.name for trace in self.traces.values() if trace.end == end]:
                more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
                yield f"{len(names)} {end}: {', '.join(names[:NAMED])}{more}"

    def facts_of(self, trace: CurveLog) -> list[str]:
        """The same for one adapter of a sweep."""
        word, loss = self.loss_of(trace)
        facts = [] if loss is None else [f"{word} {loss:.4g}"]
        if trace.end:
            facts.append(f"{'diverged' if trace.end == DIVERGED else 'stopped'} after {len(trace.log.steps):,}")
        return facts

    def _why(self) -> str:
        if self.journal is None:
            return ""
        return self.journal.message or (DIED if self.state.startswith("died") else "")


def _measured(last: Telemetry, adapters: int) -> list[str]:
    found = [f"{f'{adapters} × ' if adapters > 1 else ''}{last.tokens_per_second:,.0f} tok/s"]
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
