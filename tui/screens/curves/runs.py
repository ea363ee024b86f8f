"""The runs of the curves screen: which exist, everything read of them as it grows, which are drawn, and how."""

import asyncio
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

from pipeline.errors import UserError
from pipeline.files.file_tail import Change, FileTail, file_stamp
from pipeline.project.logs import run_state
from pipeline.project.logs.run_log import (
    COLUMNS,
    DIVERGED,
    STOPPED,
    TABLE,
    Sample,
    Telemetry,
    in_units,
    parse_sample,
    parse_telemetry,
    read_run_outcomes,
    step_parser,
)
from pipeline.project.logs.run_state import Journal
from pipeline.project.logs.runs import LogFiles, Run, discover_runs, stamp
from pipeline.project.stage_graph import OTHER_LOOKS, Look, other_look
from pipeline.workbench import GRAPH, open_project
from tui.screens.curves.series import FACTS, HELD_OUT, Log
from tui.widgets.line_chart import Curve, Range
from tui.widgets.text import duration

RECENT = 200  # steps from which the ETA is estimated
STATE_TEXT = {"done": "finished", "stopped": "stopped", "failed": "failed"}
DIED = "the process died (no error recorded). Run again to resume from the last checkpoint"
MAX_NAMES = 2  # adapters named in a list of those that ended
POINTED = Look("#FFFFFF", "☆")  # look of the highlighted adapter; drawn black on a light background


class CurveLog:
    """Everything read of one curve. `outcome`: how a sweep's adapter ended before the others, if it did."""

    def __init__(self, files: LogFiles, smoothing: float) -> None:
        self.name, self.log = files.name, Log(smoothing)
        self.change: Change = ""
        self.outcome = ""
        self.recent: deque[Telemetry] = deque(maxlen=RECENT)
        self.loss = FileTail(files.loss, step_parser)
        self.telemetry = FileTail(files.telemetry, lambda _: parse_telemetry) if files.telemetry else None
        self.samples = FileTail(files.samples, lambda _: parse_sample, header=False)
        self.answers: list[Sample] = []

    def changed(self) -> bool:
        return self.loss.changed() or self.samples.changed()

    def answers_at(self, step: float | None) -> list[Sample]:
        """The newest answers, or those at a step or before it."""
        steps = (sample.step for sample in reversed(self.answers))
        last = next((number for number in steps if step is None or number <= step), None)
        return [sample for sample in self.answers if sample.step == last]

    async def read(self) -> None:
        async for part in self.samples.chunks():
            if part.change:
                self.answers = []
            self.answers += part.rows
        async for chunk in self.loss.chunks():
            if chunk.change:
                self.change, self.log = chunk.change, Log(self.log.smoothing)
            self.log.extend(chunk.rows)

    async def read_telemetry(self) -> None:
        if self.telemetry is None:
            return
        async for chunk in self.telemetry.chunks():
            if chunk.change:
                self.recent.clear()
            for line in chunk.rows:
                if self.recent and line.seconds < self.recent[-1].seconds:
                    self.recent.clear()  # resumed by another process, whose clock starts at 0
                self.recent.append(line)


class RunView:
    """A run, its state and everything read of it, with a CurveLog for each of its curves, by name."""

    def __init__(self, run: Run, smoothing: float) -> None:
        self.journal: Journal | None = None
        self.alive = False
        self.curve_logs: dict[str, CurveLog] = {}
        self._outcomes_stamp: tuple[int, ...] | None = None  # of the outcomes file, when last read
        self.update(run, smoothing)

    def update(self, run: Run, smoothing: float) -> None:
        """Update to a later state of the run, which may have more curves."""
        self.run, previous = run, self.curve_logs
        self.curve_logs = {files.name: previous.get(files.name) or CurveLog(files, smoothing) for files in run.curves}
        self._select_best()

    @property
    def log(self) -> Log:
        """The log of the run, or of a sweep's best adapter."""
        return self.best.log

    @property
    def logs(self) -> list[Log]:
        return [curve_log.log for curve_log in self.curve_logs.values()]

    def adapter_key(self, curve_log: CurveLog) -> str:
        """A unique key for an adapter of a sweep; empty for a run that is not a sweep."""
        return str(self.run.log_folder / curve_log.name) if curve_log.name else ""

    @property
    def _telemetry_source(self) -> CurveLog:
        """The first curve that is still training: its telemetry describes the process, so it holds for all."""
        curve_logs = list(self.curve_logs.values())
        return next((curve_log for curve_log in curve_logs if not curve_log.outcome), curve_logs[0])

    def changed(self) -> bool:
        """Whether `read` has something to read."""
        telemetry = self._telemetry_source.telemetry
        logs = (curve_log.changed() for curve_log in self.curve_logs.values())
        return any(logs) or (telemetry is not None and telemetry.changed())

    async def read(self) -> None:
        """Read all new rows, and the telemetry of one curve for all; yields to the event loop after every chunk."""
        for curve_log in self.curve_logs.values():
            if curve_log.changed():
                await curve_log.read()
        await self._telemetry_source.read_telemetry()
        self._select_best()

    def poll_state(self) -> bool:
        """Read the run state and the outcomes of adapters again. Returns whether they changed."""
        before = self.journal, self.alive
        folder = self.run.folder
        self.journal = run_state.read(folder) if folder else None
        self.alive = bool(folder and self.journal and self.journal.state == "running" and run_state.alive(folder))
        now = file_stamp(self.run.log_folder / TABLE) if self.run.sweeps else None
        if now == self._outcomes_stamp:
            return before != (self.journal, self.alive)
        self._outcomes_stamp, outcomes = now, read_run_outcomes(self.run.log_folder)
        for name, curve_log in self.curve_logs.items():
            curve_log.outcome = outcome if (outcome := outcomes.get(name, "")) in (DIVERGED, STOPPED) else ""
        self._select_best()
        return True

    def _select_best(self) -> None:
        """The curve that represents the run: that of the lowest loss; a diverged one or a NaN is never better."""

        def rank(curve_log: CurveLog) -> tuple[bool, float]:
            loss = self.loss_of(curve_log)[1]
            return curve_log.outcome == DIVERGED, loss if loss is not None and isfinite(loss) else float("inf")

        self.best = min(self.curve_logs.values(), key=rank)

    def loss_of(self, curve_log: CurveLog) -> tuple[str, float | None]:
        """The loss by which adapters are compared, and its name: on held-out examples if measured.

        With early stopping (`patience`) it is the lowest, as the checkpoint of that one is kept, else the last.
        """
        if values := curve_log.log.series[HELD_OUT["loss"]].y:
            held_out = min(values) if self.run.params.get("patience") else values[-1]
            if isfinite(held_out):
                return "held out", held_out
        return "loss", curve_log.log.final_loss(self.alive and not curve_log.outcome)

    @property
    def state(self) -> str:
        """live, finished, stopped, failed, died or last run; and whether the log was restarted, replaced or is gone."""
        if self.journal is None:
            text = "last run" if self.run.folder else "finished"
        else:
            text = STATE_TEXT.get(self.journal.state) or ("live" if self.alive else "died")
        change = next((curve_log.change for curve_log in self.curve_logs.values() if curve_log.change), "")
        return f"{text}, {change}" if change else text

    def facts(self) -> list[str]:
        """The status of the run as short texts, the most important first."""
        facts = [self.state]
        step = max((int(log.steps[-1]) for log in self.logs if log.steps), default=0)
        total = self.journal.total if self.journal else 0
        if step:
            facts.append(f"{step:,}/{total or step:,}")
            facts += self._sweep_facts() if self.run.sweeps else self._curve_facts()
        if recent := self._telemetry_source.recent:
            first, last = recent[0], recent[-1]
            adapters = sum(not curve_log.outcome for curve_log in self.curve_logs.values())
            facts.append(f"{f'{adapters} × ' if adapters > 1 else ''}{last.tokens_per_second:,.0f} tok/s")
            if last.predicted:
                measured = in_units(last.measured) if last.measured else "not yet"
                facts.append(f"{in_units(last.predicted)} predicted, {measured} measured")
            facts.append(f"process {in_units(last.resident)}")
            if self.alive and self.journal and last.step > first.step:
                per_step = (last.seconds - first.seconds) / (last.step - first.step)
                facts.append(f"{duration(max(total - max(last.step, step), 0) * per_step)} left")
        if skipped := sum(log.loss.skipped + log.log.foreign for log in self.curve_logs.values()):
            facts.append(f"{skipped:,} foreign lines skipped")
        if self.journal:
            facts.append(self.journal.message or (DIED if self.state.startswith("died") else ""))
        return [fact for fact in facts if fact]

    def _curve_facts(self) -> Iterator[str]:
        yield f"loss {self.log.columns['loss'][-1]:.4g}"
        for name, label in FACTS.items():
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
            end = "diverged" if curve_log.outcome == DIVERGED else "stopped"
            facts.append(f"{end} after {len(curve_log.log.steps):,}")
        return facts


@dataclass(frozen=True)
class Line:
    """A curve to draw. If `dim`, it is drawn as a line only."""

    view: RunView
    curve_log: CurveLog
    look: Look
    dim: bool = False

    def curve(self, name: str, x: Range, columns: int) -> Curve:
        """The metric `name` in the range of steps `x`. Only the loss has evaluations and a flat mark."""
        log = self.curve_log.log
        points = log.series[name].visible(*x, columns)
        stray = self.curve_log.outcome == DIVERGED
        if name not in HELD_OUT or self.dim:
            return Curve(points, self.look.color, self.look.sign, dim=self.dim, stray=stray)
        flat = log.flat(self.view.alive and not self.curve_log.outcome) if name == "loss" else None
        held_out = log.series[HELD_OUT[name]].visible(*x, columns)
        return Curve(points, self.look.color, self.look.sign, flat[1] if flat else None, held_out, stray=stray)

    @property
    def label(self) -> str:
        """The label in a legend; empty for the dim curves of a sweep."""
        if self.dim:
            return ""
        flat = self.curve_log.log.flat(self.view.alive)
        return self.view.run.curve_label(self.curve_log.name) + (f", | flat from epoch {flat[0]:.0f}" if flat else "")


class Runs:
    """RunViews by the folder of their logs, the newest of a stage first."""

    def __init__(self, root: Path, params: Path, smoothing: float) -> None:
        self.root, self.params, self.smoothing = root, params, smoothing
        self.views: dict[str, RunView] = {}
        self.shown: set[str] = set()
        self.looks: dict[str, Look] = {}
        self.stamp: tuple[int, ...] | None = None  # of the folders when last searched
        self._live: set[str] = set()  # runs that were live most recently
        self._user_toggled = False  # the user has toggled a run: the default selection no longer applies

    def visible(self) -> list[tuple[str, RunView]]:
        return [(key, view) for key, view in self.views.items() if key in self.shown]

    def lines(self, pointed: str = "") -> list[Line]:
        """A line per visible curve. A sweep's are dim but for its best and the highlighted (`pointed`), drawn last."""
        lines = []
        for key, view in self.visible():
            for curve_log in view.curve_logs.values():
                is_pointed = bool(pointed) and view.adapter_key(curve_log) == pointed
                dim = not is_pointed and curve_log is not view.best
                lines.append(Line(view, curve_log, POINTED if is_pointed else self.looks[key], dim))
        return sorted(lines, key=lambda line: (not line.dim, line.look == POINTED))

    def has_values(self, name: str) -> bool:
        """Whether any visible run has values of a metric; all have those that are not optional."""
        return name in COLUMNS or any(log.series[name].y for _, view in self.visible() for log in view.logs)

    def has_answers(self) -> bool:
        """Whether any visible run has samples."""
        return any(curve.answers for _, view in self.visible() for curve in view.curve_logs.values())

    def toggle(self, key: str) -> None:
        self._user_toggled = True
        self.shown ^= {key}

    def smooth(self, smoothing: float) -> None:
        self.smoothing = smoothing
        for log in (log for view in self.views.values() for log in view.logs):
            log.smooth(smoothing)

    async def rediscover(self) -> bool:
        """Search for runs if the folders changed. Returns whether it searched."""
        try:
            project = open_project(self.params)
        except UserError:  # the pipeline screen reports it
            project = None
        now = stamp(self.root, self.params, project, GRAPH)
        if now == self.stamp:
            return False
        runs = await asyncio.to_thread(discover_runs, self.root, project, GRAPH)
        previous, self.views = self.views, {}
        for run in runs:
            view = previous.get(str(run.log_folder)) or RunView(run, self.smoothing)
            view.update(run, self.smoothing)
            self.views[str(run.log_folder)] = view
        self.stamp = now
        # The last run of a method gets the method's look; any other run keeps the first look that was free.
        for key, view in self.views.items():
            last = next(k for k, other_view in self.views.items() if other_view.run.stage == view.run.stage)
            if key == last and (look := GRAPH.stages[view.run.stage].look):
                self.looks[key] = look
            elif self.looks.get(key) in (None, *(stage.look for stage in GRAPH.stages.values())):
                taken = {self.looks[k] for k in self.views if k in self.looks}
                looks = map(other_look, range(OTHER_LOOKS))
                self.looks[key] = next((look for look in looks if look not in taken), other_look(len(taken)))
        return True

    def show_default(self) -> None:
        """Show the last run of each fine-tuning method; others only while one is live, or if there are no such runs."""
        if self._user_toggled:
            self.shown &= self.views.keys()
            return
        last: dict[str, str] = {}
        for key, view in self.views.items():
            last.setdefault(view.run.stage, key)
        methods = {key for stage, key in last.items() if stage.startswith("finetune_")}
        live = {key for key in last.values() if self.views[key].alive}
        self._live = live or self._live & self.views.keys()  # a run that ended stays until another is live
        self.shown = self._live if self._live - methods else methods or set(last.values())
