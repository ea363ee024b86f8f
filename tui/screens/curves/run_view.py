"""A run as the curves screen shows it: its curves, telemetry, run state and, for a sweep, outcomes of its adapters."""

from collections.abc import Iterator
from math import isfinite

from pipeline.project.logs import run_state
from pipeline.project.logs.outcomes import DIVERGED, STOPPED, TABLE, read_run_outcomes
from pipeline.project.logs.run_log import in_units
from pipeline.project.logs.run_state import Journal
from pipeline.project.logs.runs import Run
from tui.screens.curves.curve_log import CurveLog, Telemetry
from tui.screens.curves.series import HELD_OUT, Log
from tui.services.csv_tail import Change

STATE_TEXT = {"done": "finished", "stopped": "stopped", "failed": "failed"}
DIED = "the process died (no error recorded). Run again to resume from the last checkpoint"
MAX_NAMES = 2  # adapters named in a list of those that ended


class RunView:
    """A run and everything read of it, with a CurveLog for each of its curves, by name."""

    def __init__(self, run: Run, smoothing: float) -> None:
        self.smoothing = smoothing
        self.journal: Journal | None = None
        self.alive = False
        self.curve_logs: dict[str, CurveLog] = {}
        self._outcomes_stamp: tuple[int, ...] = ()  # inode, mtime and size of the outcomes file, when last read
        self.update(run)
        self.best = next(iter(self.curve_logs.values()))

    def update(self, run: Run) -> None:
        """Update to a later state of the run, which may have more curves."""
        self.run, previous = run, self.curve_logs
        self.curve_logs = {
            files.name: previous.get(files.name) or CurveLog(files, self.smoothing) for files in run.curves
        }
        self.best = next(iter(self.curve_logs.values()))

    @property
    def log(self) -> Log:
        """The log of the run, or of a sweep's best adapter."""
        return self.best.log

    @property
    def logs(self) -> list[Log]:
        return [curve_log.log for curve_log in self.curve_logs.values()]

    def changed(self) -> bool:
        """Whether `read` has something to read."""
        return (
            any(curve_log.changed() for curve_log in self.curve_logs.values())
            or self._telemetry_source.telemetry_changed()
        )

    async def read(self) -> None:
        """Read all new rows, and the telemetry of one curve for all; yields to the event loop after every chunk."""
        for curve_log in self.curve_logs.values():
            if curve_log.changed():
                await curve_log.read()
        await self._telemetry_source.read_telemetry()
        self._select_best()

    def smooth(self, strength: float) -> None:
        self.smoothing = strength
        for curve_log in self.curve_logs.values():
            curve_log.smooth(strength)

    def poll_state(self) -> bool:
        """Read the run state and the outcomes of adapters again. Returns whether they changed."""
        before = self.journal, self.alive
        folder = self.run.folder
        self.journal = run_state.read(folder) if folder else None
        self.alive = bool(folder and self.journal and self.journal.state == "running" and run_state.alive(folder))
        return self._read_outcomes() or before != (self.journal, self.alive)

    def _read_outcomes(self) -> bool:
        try:
            stat = (self.run.log_folder / TABLE).stat() if self.run.sweeps else None
        except OSError:
            stat = None
        now = (stat.st_ino, stat.st_mtime_ns, stat.st_size) if stat else ()
        if now == self._outcomes_stamp:
            return False
        self._outcomes_stamp, outcomes = now, read_run_outcomes(self.run.log_folder)
        for name, curve_log in self.curve_logs.items():
            curve_log.outcome = outcome if (outcome := outcomes.get(name, "")) in (DIVERGED, STOPPED) else ""
        self._select_best()
        return True

    # Which curve represents the run

    @property
    def _telemetry_source(self) -> CurveLog:
        """The first curve that is still training: its telemetry describes the process, so it holds for all."""
        curve_logs = list(self.curve_logs.values())
        return next((curve_log for curve_log in curve_logs if not curve_log.outcome), curve_logs[0])

    def _select_best(self) -> None:
        self.best = min(self.curve_logs.values(), key=self._rank)

    def _rank(self, curve_log: CurveLog) -> tuple[bool, float]:
        loss = self.loss_of(curve_log)[1]
        return curve_log.outcome == DIVERGED, loss if loss is not None and isfinite(loss) else float("inf")

    def loss_of(self, curve_log: CurveLog) -> tuple[str, float | None]:
        """The loss by which adapters are compared, and its name: on held-out examples if measured."""
        held_out = curve_log.held_out(lowest=bool(self.run.params.get("patience")))
        if held_out is not None:
            return "held out", held_out
        return "loss", curve_log.log.final_loss(self.alive and not curve_log.outcome)

    # Status

    @property
    def change(self) -> Change:
        return next((curve_log.change for curve_log in self.curve_logs.values() if curve_log.change), "")

    @property
    def state(self) -> str:
        """live, finished, stopped, failed, died or last run; and whether the log was restarted, replaced or is gone."""
        if self.journal is None:
            text = "last run" if self.run.folder else "finished"
        else:
            text = STATE_TEXT.get(self.journal.state) or ("live" if self.alive else "died")
        return f"{text}, {self.change}" if self.change else text

    @property
    def step(self) -> int:
        """The last step of any of its curves."""
        return max((int(log.steps[-1]) for log in self.logs if log.steps), default=0)

    @property
    def eta(self) -> float | None:
        """Seconds to the last step, at the speed of the last RECENT steps; None if it is not running."""
        recent = self._telemetry_source.recent
        if not self.alive or self.journal is None or len(recent) < 2:
            return None
        first, last = recent[0], recent[-1]
        if last.step <= first.step:
            return None
        left = max(self.journal.total - max(last.step, self.step), 0)
        return left * (last.seconds - first.seconds) / (last.step - first.step)

    def facts(self) -> list[str]:
        """The status of the run as short texts, the most important first."""
        facts = [self.state]
        if step := self.step:
            facts.append(f"{step:,}/{self.journal.total if self.journal and self.journal.total else step:,}")
            facts += self._sweep_facts() if self.run.sweeps else self._curve_facts()
        if recent := self._telemetry_source.recent:
            facts += _format_telemetry(recent[-1], sum(not curve_log.outcome for curve_log in self.curve_logs.values()))
        if (eta := self.eta) is not None:
            facts.append(f"{duration(eta)} left")
        if skipped := sum(curve_log.skipped for curve_log in self.curve_logs.values()):
            facts.append(f"{skipped:,} foreign lines skipped")
        if reason := self._failure_reason():
            facts.append(reason)
        return facts

    def _curve_facts(self) -> Iterator[str]:
        yield f"loss {self.log.columns['loss'][-1]:.4g}"
        for name, label in ((HELD_OUT, "held out"), ("divergence", "divergence")):
            if values := self.log.series[name].y:
                yield f"{label} {values[-1]:.4g}"
        if flat := self.log.flat(self.alive):
            yield f"» flat from epoch {flat[0]:.0f}"

    def _sweep_facts(self) -> Iterator[str]:
        name, loss = self.loss_of(self.best)
        if loss is not None and self.best.outcome != DIVERGED:
            yield f"best {self.best.name}: {name} {loss:.4g}"
        for outcome in (DIVERGED, STOPPED):
            if names := [curve_log.name for curve_log in self.curve_logs.values() if curve_log.outcome == outcome]:
                more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
                yield f"{len(names)} {outcome}: {', '.join(names[:MAX_NAMES])}{more}"

    def facts_of(self, curve_log: CurveLog) -> list[str]:
        """The status of one adapter of a sweep as short texts."""
        name, loss = self.loss_of(curve_log)
        facts = [] if loss is None else [f"{name} {loss:.4g}"]
        if curve_log.outcome:
            facts.append(
                f"{'diverged' if curve_log.outcome == DIVERGED else 'stopped'} after {len(curve_log.log.steps):,}"
            )
        return facts

    def _failure_reason(self) -> str:
        if self.journal is None:
            return ""
        return self.journal.message or (DIED if self.state.startswith("died") else "")


def _format_telemetry(last: Telemetry, adapters: int) -> list[str]:
    facts = [f"{f'{adapters} × ' if adapters > 1 else ''}{last.tokens_per_second:,.0f} tok/s"]
    if last.predicted:
        measured = in_units(last.measured) if last.measured else "not yet"
        facts.append(f"{in_units(last.predicted)} predicted, {measured} measured")
    facts.append(f"process {in_units(last.resident)}")
    return facts


def duration(seconds: float) -> str:
    """1:05:09, 5:09 or 0:09."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
