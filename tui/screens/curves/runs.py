"""A run and everything read of it as it grows: its curves, its state, how fast it is."""

import time
from math import isfinite

from pipeline.files.file_tail import Change, FileTail, file_stamp
from pipeline.project.logs import run_state
from pipeline.project.logs.run_log import (
    DIVERGED,
    STOPPED,
    TABLE,
    Sample,
    Telemetry,
    parse_sample,
    parse_telemetry,
    read_run_outcomes,
    step_parser,
)
from pipeline.project.logs.run_state import Journal
from pipeline.project.logs.runs import LogFiles, Run
from pipeline.stages.registry import GRAPH
from tui.screens.curves.metrics import COST, HELD_OUT
from tui.screens.curves.series import MIN_STEPS, Cost, Log, Series

STATES = {"done": "finished", "stopped": "stopped", "failed": "failed"}
# seconds, and steps at the usual pace, without a new step after which no end is foretold
STALLED = 30.0, 10.0


class CurveLog:
    """Everything read of one curve. `outcome`: how a sweep's adapter ended before the others, if it
    did.
    """

    def __init__(self, files: LogFiles, smoothing: float) -> None:
        self.name, self.log, self.cost = files.name, Log(smoothing), Cost(smoothing)
        self.change: Change = ""
        self.outcome = ""
        self.answers: list[Sample] = []
        self._loss = FileTail(files.loss, step_parser)
        self._samples = FileTail(files.samples, lambda _: parse_sample, header=False)
        self._telemetry = (
            FileTail(files.telemetry, lambda _: parse_telemetry) if files.telemetry else None
        )

    @property
    def skipped(self) -> int:
        """Lines that are none of this log."""
        return self._loss.skipped + self.log.foreign

    def series(self, name: str) -> Series:
        return self.cost.series[name] if name in COST else self.log.series[name]

    def smooth(self, strength: float) -> None:
        self.log.smooth(strength)
        self.cost.smooth(strength)

    def changed(self, telemetry: bool) -> bool:
        return any(
            tail.changed()
            for tail in (self._loss, self._samples, self._telemetry if telemetry else None)
            if tail
        )

    def answers_at(self, step: float | None) -> list[Sample]:
        """The newest answers, or those at a step or before it."""
        steps = (sample.step for sample in reversed(self.answers))
        last = next((number for number in steps if step is None or number <= step), None)
        return [sample for sample in self.answers if sample.step == last]

    async def read(self, telemetry: bool) -> None:
        """Read all new rows; yields to the event loop after every chunk."""
        async for part in self._samples.chunks():
            if part.change:
                self.answers = []
            self.answers += part.rows
        rows: list[Telemetry] = []
        # before the steps that it tells of, which are then all there
        if self._telemetry and telemetry:
            async for piece in self._telemetry.chunks():
                if piece.change:
                    self.cost, rows = Cost(self.log.smoothing), []
                rows += piece.rows
        async for chunk in self._loss.chunks():
            if chunk.change:
                self.change, self.log = chunk.change, Log(self.log.smoothing)
            self.log.extend(chunk.rows)
        self.cost.extend(rows, self.log)


class RunView:
    """A run, its state and everything read of it, with a CurveLog for each of its curves, by
    name.
    """

    def __init__(self, run: Run, smoothing: float) -> None:
        self.journal: Journal | None = None
        self.alive = False
        # share of the base's answers on old sentences, if an evaluation measured it
        self.kept: float | None = None
        self.curve_logs: dict[str, CurveLog] = {}
        self._outcomes_stamp: tuple[int, ...] | None = None  # of the outcomes file, when last read
        self.update(run, smoothing)

    def update(self, run: Run, smoothing: float) -> None:
        """Update to a later state of the run, which may have more curves."""
        self.run, previous = run, self.curve_logs
        self.curve_logs = {
            files.name: previous.get(files.name) or CurveLog(files, smoothing)
            for files in run.curves
        }
        self._select_best()

    @property
    def log(self) -> Log:
        """The log of the run, or of a sweep's best adapter."""
        return self.best.log

    @property
    def logs(self) -> list[Log]:
        return [curve_log.log for curve_log in self.curve_logs.values()]

    @property
    def name(self) -> str:
        """What it is called beside its line: its method, and the settings that differ from the
        current ones.
        """
        label = self.run.label.replace(
            self.run.stage, GRAPH.stages[self.run.stage].method or self.run.stage, 1
        )
        return " ".join(label.split())

    def adapter_key(self, curve_log: CurveLog) -> str:
        """A unique key for an adapter of a sweep; empty for a run that is not a sweep."""
        return str(self.run.log_folder / curve_log.name) if curve_log.name else ""

    @property
    def timed(self) -> CurveLog:
        """The first curve that is still training: its telemetry describes the process, so it holds
        for all.
        """
        curve_logs = list(self.curve_logs.values())
        return next((curve_log for curve_log in curve_logs if not curve_log.outcome), curve_logs[0])

    def changed(self) -> bool:
        """Whether `read` has something to read."""
        timed = self.timed
        return any(curve_log.changed(curve_log is timed) for curve_log in self.curve_logs.values())

    async def read(self) -> None:
        """Read all new rows; yields to the event loop after every chunk."""
        timed = self.timed
        for curve_log in self.curve_logs.values():
            if curve_log.changed(curve_log is timed):
                await curve_log.read(curve_log is timed)
        self._select_best()

    def poll_state(self) -> bool:
        """Read the run state and the outcomes of adapters again. Returns whether they changed, but
        for the progress.
        """
        before = self._condition
        folder = self.run.folder
        self.journal = run_state.read(folder) if folder else None
        self.alive = bool(
            folder and self.journal and self.journal.state == "running" and run_state.alive(folder)
        )
        now = file_stamp(self.run.log_folder / TABLE) if self.run.sweeps else None
        if now == self._outcomes_stamp:
            return before != self._condition
        self._outcomes_stamp, outcomes = now, read_run_outcomes(self.run.log_folder)
        for name, curve_log in self.curve_logs.items():
            curve_log.outcome = (
                outcome if (outcome := outcomes.get(name, "")) in (DIVERGED, STOPPED) else ""
            )
        self._select_best()
        return True

    @property
    def _condition(self) -> tuple[object, ...]:
        journal = self.journal
        return (
            (journal.state, journal.message, journal.total, self.alive)
            if journal
            else (None, "", 0, self.alive)
        )

    def _select_best(self) -> None:
        """The curve that represents the run: that of the lowest loss; a diverged one or a NaN is
        never better.
        """

        def rank(curve_log: CurveLog) -> tuple[bool, float]:
            loss = self.loss_of(curve_log)[1]
            return curve_log.outcome == DIVERGED, loss if loss is not None and isfinite(
                loss
            ) else float("inf")

        self.best = min(self.curve_logs.values(), key=rank)

    def loss_of(self, curve_log: CurveLog) -> tuple[str, float | None]:
        """The loss by which adapters are compared, and its name: on held-out examples if measured.

        With early stopping (`patience`) it is the lowest, as the checkpoint of that one is kept,
        else the last.
        """
        if values := curve_log.log.series[HELD_OUT["loss"]].y:
            held_out = min(values) if self.run.params.get("patience") else values[-1]
            if isfinite(held_out):
                return "held out", held_out
        return "loss", curve_log.log.final_loss(self.alive and not curve_log.outcome)

    @property
    def state(self) -> str:
        """running, finished, stopped, failed or died."""
        if self.journal is None:
            return "finished"
        return STATES.get(self.journal.state) or ("running" if self.alive else "died")

    @property
    def change(self) -> Change:
        """Whether the log was restarted, replaced or is gone while it was followed."""
        return next(
            (curve_log.change for curve_log in self.curve_logs.values() if curve_log.change), ""
        )

    @property
    def steps(self) -> tuple[int, int]:
        """Steps done and in all; 0 in all before a run that was resumed has told how many there
        are.
        """
        done = max((int(log.steps[-1]) for log in self.logs if log.steps), default=0)
        total = self.journal.total if self.journal else 0
        return done, max(total, done) if total or not self.alive else 0

    @property
    def seconds_left(self) -> float | None:
        """From the pace of the last steps; None while nothing can be said: at the start, or when no
        step comes.
        """
        pace, (done, total) = self.timed.cost.seconds_per_step or self._mean_pace, self.steps
        if not self.alive or not total or pace is None or not isfinite(pace):
            return None
        if self.quiet > max(STALLED[0], STALLED[1] * pace):
            return None
        return pace * max(total - done, 0)

    @property
    def _mean_pace(self) -> float | None:
        """Seconds a step since the run began or resumed: telemetry is written with a delay."""
        journal = self.journal
        if journal is None or not journal.since or journal.done - journal.first < MIN_STEPS:
            return None
        return max(time.time() - journal.since, 0.0) / (journal.done - journal.first)

    @property
    def quiet(self) -> float:
        """Seconds since its log grew."""
        stamps = (file_stamp(files.loss) for files in self.run.curves)
        return time.time() - max((stamp[-1] for stamp in stamps if stamp), default=0) / 1e9
