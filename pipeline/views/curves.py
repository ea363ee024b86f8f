"""Runs and their curves as they grow: what each logged so far, how it is doing, which are on."""

import asyncio
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import chain
from math import isfinite
from pathlib import Path

from pipeline.errors import UserError
from pipeline.files.artifact import MANIFEST
from pipeline.files.file_tail import Change, FileTail, file_stamp
from pipeline.files.text import in_units
from pipeline.fleet.states import joined, state_by_files
from pipeline.inference.catalog import measured
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
from pipeline.project.stage_graph import ARTIFACTS, RUNS, Look, Project
from pipeline.stages.registry import GRAPH, open_project
from pipeline.views.looks import assign_looks
from pipeline.views.runs import discover_runs, stamp
from pipeline.views.series import COST, HELD_OUT, METRICS, MIN_STEPS, Cost, Log, Series

ENDS = {DIVERGED: "diverged", STOPPED: "stopped"}
STATES = {"done": "finished", "stopped": "stopped", "failed": "failed"}
# seconds, and steps at the usual pace, without a new step after which no end is foretold
STALLED = 30.0, 10.0


class Curve:
    """Everything read of one curve of a run. `outcome`: how a sweep's adapter ended before the
    others, if it did.
    """

    def __init__(self, run: "RunView", files: LogFiles, smoothing: float) -> None:
        self.view, self.name, self.files = run, files.name, files
        self.log, self.cost = Log(smoothing), Cost(smoothing)
        self.change: Change = ""
        self.outcome = ""
        self.answers: list[Sample] = []
        self._loss = FileTail(files.loss, step_parser)
        self._samples = FileTail(files.samples, lambda _: parse_sample, header=False)
        self._telemetry: FileTail[Telemetry] | None = None
        if files.telemetry:
            self._telemetry = FileTail(files.telemetry, lambda _: parse_telemetry)

    @property
    def key(self) -> str:
        """Unique among all curves and runs."""
        return f"{self.view.key}/{self.name}"

    @property
    def label(self) -> str:
        """What it is called beside its line."""
        method, *_ = self.view.name.split()
        return f"{method} {self.name}" if self.name else self.view.name

    @property
    def goes_on(self) -> bool:
        return self.view.alive and not self.outcome

    @property
    def skipped(self) -> int:
        """Lines that are none of this log."""
        return self._loss.skipped + self.log.foreign

    def series(self, name: str) -> Series:
        return self.cost.series[name] if name in COST else self.log.series[name]

    def smooth(self, strength: float) -> None:
        self.log.smooth(strength)
        self.cost.smooth(strength)

    def flat(self) -> tuple[int, float] | None:
        """The epoch from which the loss is flat, and its first step."""
        return self.log.flat(self.goes_on)

    @property
    def loss(self) -> tuple[str, float | None]:
        """The loss by which adapters are compared, and its name: on held-out examples if measured.

        With `patience` or `load_best` it is the lowest, as the run has the weights of that one, else
        the last.
        """
        if values := self.log.series[HELD_OUT["loss"]].y:
            params = self.view.run.params
            takes_best = params.get("patience") or params.get("load_best")
            held_out = min(values) if takes_best else values[-1]
            if isfinite(held_out):
                return "held out", held_out
        return "loss", self.log.final_loss(self.goes_on)

    def value(self, metric: str, step: float | None) -> float | None:
        """The smoothed value at a step, or the newest; of the loss after an epoch the last epoch's
        mean.

        That mean is what reports and the list of runs compare, so that a run has one loss.
        """
        series = self.series(metric)
        if step is not None:
            return series.smoothed_at(step)
        if metric == "loss" and self.log.epochs > 1:
            return self.log.final_loss(self.goes_on)
        return series.smooth[-1] if series.smooth else None

    def answers_at(self, step: float | None) -> list[Sample]:
        """The newest answers, or those at a step or before it."""
        steps = (sample.step for sample in reversed(self.answers))
        last = next((number for number in steps if step is None or number <= step), None)
        return [sample for sample in self.answers if sample.step == last]

    def model(self, project: Project) -> Path | None:
        """The folder of the model that it made, if it did."""
        run = self.view.run
        folders = [at / self.name for at in (run.log_folder, project.artifact(run.stage))]
        made = (folder for folder in folders if (folder / MANIFEST).is_file())
        return next(made, None) if run.digest else None

    def changed(self) -> bool:
        """Whether `read` has something to read."""
        tails = (self._loss, self._samples, self._timed)
        return any(tail.changed() for tail in tails if tail)

    @property
    def _timed(self) -> FileTail[Telemetry] | None:
        """The telemetry, if it is this curve's that is read."""
        return self._telemetry if self is self.view.timed else None

    async def read(self) -> None:
        """Read all new rows: a thread reads the files, chunk by chunk."""
        async for part in self._samples.chunks():
            if part.change:
                self.answers = []
            self.answers += part.rows
        rows: list[Telemetry] = []
        # before the steps that it tells of, which are then all there
        if telemetry := self._timed:
            async for piece in telemetry.chunks():
                if piece.change:
                    self.cost, rows = Cost(self.log.smoothing), []
                rows += piece.rows
        async for chunk in self._loss.chunks():
            if chunk.change:
                self.change, self.log = chunk.change, Log(self.log.smoothing)
            self.log.extend(chunk.rows)
        self.cost.extend(rows, self.log)


class RunView:
    """A run, its state and everything read of it, with a Curve for each of its curves, by name."""

    look = Look("", "")

    def __init__(self, run: Run, smoothing: float) -> None:
        self.journal: Journal | None = None
        self.alive = False
        # share of the base's answers on old sentences, if an evaluation measured it
        self.kept: float | None = None
        self.curves: dict[str, Curve] = {}
        self._outcomes_stamp: tuple[object, ...] | None = None  # of the outcomes, when last read
        self.update(run, smoothing)

    def update(self, run: Run, smoothing: float) -> None:
        """Update to a later state of the run, which may have more curves."""
        self.run, before = run, self.curves
        self.curves = {}
        for files in run.curves:
            curve = before.get(files.name)
            # an adapter of a unit that ran out of memory trains again in another
            is_same = curve is not None and curve.files == files
            self.curves[files.name] = curve if curve and is_same else Curve(self, files, smoothing)
        self._select_best()

    @property
    def key(self) -> str:
        return str(self.run.log_folder)

    @property
    def name(self) -> str:
        """What it is called: its method, and the settings that differ from the current ones."""
        stage = self.run.stage
        label = self.run.curve_label("").replace(stage, GRAPH.stages[stage].method or stage, 1)
        return " ".join(label.split())

    @property
    def timed(self) -> Curve:
        """The first curve that is still training: its telemetry describes the process, so it holds
        for all.
        """
        curves = list(self.curves.values())
        return next((curve for curve in curves if not curve.outcome), curves[0])

    async def read(self) -> bool:
        """Read all new rows; whether there were any."""
        changed = [curve for curve in self.curves.values() if curve.changed()]
        for curve in changed:
            await curve.read()
        self._select_best()
        return bool(changed)

    def poll(self) -> bool:
        """Read the run state and the outcomes of adapters again. Returns whether they changed, but
        for the progress.
        """
        before, folder = self._condition, self.run.folder
        if self.run.units:
            self._look_at_units()
        else:
            self.journal = run_state.read(folder) if folder else None
            running = self.journal is not None and self.journal.state == "running"
            self.alive = running and folder is not None and run_state.alive(folder)
        folders = {files.loss.parent.parent for files in self.run.curves if self.run.sweeps}
        now = tuple(file_stamp(at / TABLE) for at in sorted(folders))
        if now != self._outcomes_stamp:
            self._outcomes_stamp = now
            outcomes = dict(chain.from_iterable(read_run_outcomes(f).items() for f in folders))
            for name, curve in self.curves.items():
                outcome = outcomes.get(name, "")
                curve.outcome = outcome if outcome in ENDS else ""
            self._select_best()
        return before != self._condition

    def _look_at_units(self) -> None:
        """What the fleet's units do."""
        with suppress(UserError):  # the folder of one is gone
            units = [state_by_files(*unit) for unit in self.run.units.items()]
            self.journal = joined(units)
            self.alive = any(unit.state == "running" for unit in units)

    @property
    def _condition(self) -> tuple[object, ...]:
        journal = self.journal
        noted = (journal.state, journal.message, journal.total) if journal else None
        return noted, self.alive, self._outcomes_stamp

    def _select_best(self) -> None:
        """The curve that represents the run: that of the lowest loss; a diverged one or a NaN is
        never better.
        """

        def rank(curve: Curve) -> tuple[bool, float]:
            _, loss = curve.loss
            known = loss is not None and isfinite(loss)
            return curve.outcome == DIVERGED, loss if known and loss is not None else float("inf")

        self.best = min(self.curves.values(), key=rank)

    @property
    def state(self) -> str:
        """running, finished, stopped, failed or died."""
        if self.journal is None:
            return "finished"
        return STATES.get(self.journal.state) or ("running" if self.alive else "died")

    @property
    def change(self) -> Change:
        """Whether the log was restarted, replaced or is gone while it was followed."""
        changes = (curve.change for curve in self.curves.values())
        return next(filter(None, changes), "")

    @property
    def steps(self) -> tuple[int, int]:
        """Steps done and in all; 0 in all before a run that was resumed has told how many there
        are.
        """
        if self.run.units and self.journal:
            return self.journal.done, self.journal.total
        logs = (curve.log for curve in self.curves.values())
        done = max((int(log.steps[-1]) for log in logs if log.steps), default=0)
        total = self.journal.total if self.journal else 0
        return done, max(total, done) if total or not self.alive else 0

    @property
    def seconds_left(self) -> float | None:
        """From the pace of the last steps; None while nothing can be said: at the start, or when no
        step comes.
        """
        if self.run.units:
            return self.journal.eta if self.journal and self.alive else None
        pace, (done, total) = self.timed.cost.seconds_per_step or self._mean_pace, self.steps
        if not self.alive or not total or pace is None or not isfinite(pace):
            return None
        if self._quiet > max(STALLED[0], STALLED[1] * pace):
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
    def _quiet(self) -> float:
        """Seconds since its log grew."""
        stamps = (file_stamp(files.loss) for files in self.run.curves)
        return time.time() - max((stamp[-1] for stamp in stamps if stamp), default=0) / 1e9


class Runs:
    """RunViews by the folder of their logs, the newest of a stage first.

    On is the latest run of each method, and what is running. What the user switched stays so until
    it starts anew.
    """

    def __init__(self, root: Path, params: Path, smoothing: float) -> None:
        self.root, self.params, self.smoothing = root, params, smoothing
        self.views: dict[str, RunView] = {}
        self.stamp: tuple[object, ...] = ()  # when they were last searched; () before
        self._looks: dict[str, Look] = {}
        self._switched: dict[str, bool] = {}  # by the user, or on when it started

    def files(self, project: Project | None) -> list[Path]:
        """The params, which name the runs, and the folders of their logs, the parent's too."""
        roots = [self.root]
        if project and project.parent:
            roots.append(project.parent.root)
        return [self.params, *(root / name for root in roots for name in (RUNS, ARTIFACTS))]

    @property
    def on(self) -> list[RunView]:
        """Those that are on."""
        latest: dict[str, RunView] = {}
        for view in self.views.values():
            latest.setdefault(view.run.stage, view)
        methods = [view for stage, view in latest.items() if GRAPH.stages[stage].look]
        usual = {view.key for view in methods or latest.values()}
        return [v for key, v in self.views.items() if self._switched.get(key, key in usual)]

    @property
    def curves(self) -> list[Curve]:
        """Those of the runs that are on."""
        return [curve for view in self.on for curve in view.curves.values()]

    def switch(self, view: RunView, on: bool) -> None:
        self._switched[view.key] = on

    def find(self, name: str) -> RunView | None:
        """The newest run of a stage, or of a method."""
        method = name.removeprefix("finetune_")
        views = self.views.values()
        return next((v for v in views if v.run.stage.removeprefix("finetune_") == method), None)

    def logged(self) -> list[str]:
        """The metrics that any run that is on has values of."""
        curves = self.curves
        return [name for name in METRICS if any(curve.series(name).y for curve in curves)]

    def is_constant(self, metric: str) -> bool:
        """Whether it is a number of each run rather than a curve."""
        return all(curve.series(metric).constant for curve in self.curves)

    async def smooth(self) -> None:
        """Smooth all lines, with a turn of the event loop after each: a long log takes 0.1 s."""
        curves = [curve for view in self.views.values() for curve in view.curves.values()]
        for curve in curves:
            curve.smooth(self.smoothing)
            await asyncio.sleep(0)

    def look(self, states: Iterable[object]) -> bool:
        """Search for runs if folders or the `states` of stages changed, and read the state of each.

        Returns whether anything but the progress changed. Call it in a thread.
        """
        try:
            project = open_project(self.params)
        except UserError:  # the pipeline screen reports it
            project = None
        now = (*stamp(self.root, self.params, project), *states)
        changed = now != self.stamp
        if changed:
            self._search(project)
            self.stamp = now
        for view in self.views.values():
            was_alive = view.alive
            changed |= view.poll()
            if view.alive and not was_alive:
                self.switch(view, True)
        return changed

    def _search(self, project: Project | None) -> None:
        kept, views = _kept(self.root, project), dict[str, RunView]()
        for run in discover_runs(self.root, project):
            key = str(run.log_folder)
            view = self.views.get(key) or RunView(run, self.smoothing)
            view.update(run, self.smoothing)
            view.kept = kept.get(run.digest)
            views[key] = view
        # what a fleet's units logged is listed otherwise once it has been collected
        gone = {view.name: key for key, view in self.views.items() if key not in views}
        for key in views.keys() - self.views.keys():
            before = gone.get(views[key].name)
            if before in self._switched:
                self._switched[key] = self._switched[before]
        assign_looks({key: view.run.stage for key, view in views.items()}, self._looks)
        for key, view in views.items():
            view.look = self._looks[key]
        self.views = views


def _kept(root: Path, project: Project | None) -> dict[str, float]:
    """sha256 of an artifact → the share of old answers that it kept."""
    homes = {root, *(owner.root for owner in (project, project and project.parent) if owner)}
    shares = {}
    for digest, numbers in measured(home / ARTIFACTS for home in homes).items():
        forgetting = numbers.get("forgetting")
        share = forgetting.get("answers_kept") if isinstance(forgetting, dict) else None
        if isinstance(share, int | float) and 0 <= share <= 1:
            shares[digest] = float(share)
    return shares


def in_words(curve: Curve, step: float | None) -> Iterator[str]:
    """What is known of a run, or of an adapter of a sweep, in a line each: values at a step, or the
    newest; what it kept, how adapters ended, memory and pace, and what is odd.
    """
    yield from _values(curve, step)
    yield from _run(curve.view)


def _values(curve: Curve, at: float | None) -> Iterator[str]:
    """The values at a step, or the newest; the small plots have the others."""
    log, steps, flat = curve.log, curve.log.steps, curve.flat()
    if at is None and steps:
        at = steps[-1]
    if at is None or not steps or not steps[0] <= at <= steps[-1]:
        yield "nothing is logged there"
        return
    index = log.index_at(at) or 0
    step, loss = steps[index], log.series["loss"]
    note = f" · » flat from epoch {flat[0]:.0f}" if flat else ""
    yield f"epoch {log.columns['epoch'][index]:.0f}{note}"
    yield f"loss {loss.y[index]:.4g} at step {step:,.0f}"
    yield f"smoothed {loss.smooth[index]:.4g}"
    for name, held_out in HELD_OUT.items():
        value = log.series[held_out].value_at(step)
        if value is not None:
            yield f"held-out {METRICS[name].short} {value:.4g}"


def _run(view: RunView) -> Iterator[str]:
    """What it kept, how the adapters of a sweep ended, memory and pace, and what is odd."""
    if view.kept is not None:
        yield f"kept {view.kept:.0%} of the old answers"
    if view.run.sweeps:
        yield from _sweep(view)
    cost = view.timed.cost
    for last in [*cost.recent][-1:]:
        sizes = {"memory": last.measured, "predicted": last.predicted, "process": last.resident}
        yield ", ".join(f"{name} {in_units(size)}" for name, size in sizes.items() if size)
    rate = cost.series["tokens_per_second"].smooth
    if rate and isfinite(rate[-1]):
        adapters = sum(not curve.outcome for curve in view.curves.values())
        yield f"{f'{adapters} × ' if adapters > 1 else ''}{rate[-1]:,.0f} tokens/s"
    if view.change:
        yield f"log {view.change} since it was opened"
    if skipped := sum(curve.skipped for curve in view.curves.values()):
        yield f"{skipped:,} foreign lines skipped"


def _sweep(view: RunView) -> Iterator[str]:
    name, loss = view.best.loss
    if loss is not None and view.best.outcome != DIVERGED:
        yield f"best {view.best.name}: {name} {loss:.4g}"
    for outcome in ENDS:
        names = [curve.name for curve in view.curves.values() if curve.outcome == outcome]
        if names:
            yield f"{len(names)} {outcome}: {', '.join(names)}"
