"""The runs of the screen: which there are, which are on, and the lines that they draw.

A line's color is its run's look (`pipeline/views/looks.py`), made readable on the theme.
"""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from textual.color import Color

from pipeline.errors import UserError
from pipeline.inference.catalog import measured
from pipeline.project.logs.run_log import DIVERGED
from pipeline.project.logs.runs import Run
from pipeline.project.stage_graph import ARTIFACTS, Look, Project
from pipeline.stages.registry import GRAPH, open_project
from pipeline.views.looks import assign_looks
from pipeline.views.runs import discover_runs, stamp
from tui.screens.curves.metrics import METRICS
from tui.screens.curves.runs import CurveLog, RunView
from tui.screens.curves.series import Column
from tui.widgets.colors import readable
from tui.widgets.plot.line_plot import Line
from tui.widgets.plot.scale import Range

# share of the colour in the band of raw values, and in a quiet line; the rest is background
BAND, QUIET = 0.3, 0.5


@dataclass(frozen=True)
class Drawn:
    """A curve to draw. `pointed`: the list's cursor is on it. `quiet`: another adapter of a sweep
    than its best.
    """

    view: RunView
    curve_log: CurveLog
    look: Look
    quiet: bool = False
    pointed: bool = False

    @property
    def name(self) -> str:
        """Its name beside the line."""
        return (
            f"{self.view.name.split()[0]} {self.curve_log.name}"
            if self.curve_log.name
            else self.view.name
        )

    def columns(self, metric: str, x: Range, count: int) -> list[Column]:
        return self.curve_log.series(metric).visible(*x, count)

    def flat(self) -> tuple[int, float] | None:
        """The epoch from which the loss is flat and its first step."""
        return self.curve_log.log.flat(self.view.alive and not self.curve_log.outcome)

    def value(self, metric: str, cursor: float | None) -> float | None:
        """The smoothed value at the cursor, or the newest one; of the loss after an epoch the last
        epoch's mean.

        That mean is what reports and the list of runs compare, so that one run has one loss.
        """
        series, log = self.curve_log.series(metric), self.curve_log.log
        if cursor is not None:
            return series.smoothed_at(cursor)
        if metric == "loss" and log.epochs > 1:
            return log.final_loss(self.view.alive and not self.curve_log.outcome)
        return series.smooth[-1] if series.smooth else None

    def line(
        self,
        metric: str,
        x: Range,
        count: int,
        cursor: float | None,
        background: Color,
        labels: bool = True,
    ) -> Line:
        """Its line in a plot of `count` columns. With `labels`, the pointed one has the band of its
        raw values.
        """
        columns = self.columns(metric, x, count)
        color = readable(Color.parse(self.look.color), background)
        if self.quiet:
            color = background.blend(color, QUIET)
        plain = [(column.x, column.mean) for column in columns]
        stray = self.curve_log.outcome == DIVERGED
        if self.quiet:
            return Line(plain, color.hex6, quiet=True, stray=stray)
        held_out = METRICS[metric].held_out
        flat = self.flat() if metric == "loss" else None
        value = self.value(metric, cursor) if labels else None
        return Line(
            plain,
            color.hex6,
            self.name if labels else "",
            "–" if value is None else METRICS[metric].format(value),
            self.look.sign,
            [column[:3] for column in columns] if self.pointed and labels else (),
            background.blend(color, BAND).hex6,
            [(c.x, c.mean) for c in self.columns(held_out, x, count)] if held_out else (),
            next(((c.x, c.mean) for c in columns if flat and c.x >= flat[1] >= columns[0].x), None),
            bold=self.pointed,
            stray=stray,
        )


class Runs:
    """RunViews by the folder of their logs, the newest of a stage first.

    On is the latest run of each method, and what is running. What the user switched stays so until
    it starts anew.
    """

    def __init__(self, root: Path, params: Path, smoothing: float) -> None:
        self.root, self.params, self.smoothing = root, params, smoothing
        self.views: dict[str, RunView] = {}
        self.shown: set[str] = set()
        self.looks: dict[str, Look] = {}
        self.stamp: tuple[int, ...] | None = None  # of the folders when last searched
        self._switched: dict[str, bool] = {}  # by the user, or on when it started
        self._alive: set[str] = set()

    def visible(self) -> list[tuple[str, RunView]]:
        return [(key, view) for key, view in self.views.items() if key in self.shown]

    def drawn(self, pointed: str = "") -> list[Drawn]:
        """Every visible curve, in drawing order: the quiet ones, the others, those that run, the
        pointed one.
        """
        drawn = []
        for key, view in self.visible():
            for curve_log in view.curve_logs.values():
                best = curve_log is view.best
                on_it = bool(pointed) and (
                    view.adapter_key(curve_log) == pointed or (best and key == pointed)
                )
                drawn.append(Drawn(view, curve_log, self.looks[key], not best and not on_it, on_it))
        return sorted(drawn, key=lambda line: (line.pointed, not line.quiet, line.view.alive))

    def logged(self) -> list[str]:
        """The metrics that any visible run has values of."""
        logs = [curve_log for _, view in self.visible() for curve_log in view.curve_logs.values()]
        return [name for name in METRICS if any(log.series(name).y for log in logs)]

    def is_constant(self, name: str) -> bool:
        """Whether the metric is a number of each run rather than a curve."""
        logs = (curve_log for _, view in self.visible() for curve_log in view.curve_logs.values())
        return all(log.series(name).constant for log in logs)

    def has_answers(self) -> bool:
        """Whether any visible run has samples."""
        return any(
            curve.answers for _, view in self.visible() for curve in view.curve_logs.values()
        )

    def toggle(self, key: str) -> None:
        self._switched[key] = key not in self.shown
        self.update_shown()

    def show(self, key: str) -> None:
        self._switched[key] = True
        self.update_shown()

    async def smooth(self) -> None:
        """Smooth all lines anew, with a turn of the event loop after each: a long log takes 0.1
        s.
        """
        for curve_log in [
            curve for view in self.views.values() for curve in view.curve_logs.values()
        ]:
            curve_log.smooth(self.smoothing)
            await asyncio.sleep(0)

    def update_shown(self) -> set[str]:
        """Apply the rule of which runs are on. Returns those that have started since the last
        call.
        """
        latest: dict[str, str] = {}
        for key, view in self.views.items():
            latest.setdefault(view.run.stage, key)
        methods = {key for stage, key in latest.items() if GRAPH.stages[stage].look}
        usual = methods or set(latest.values())
        alive = {key for key, view in self.views.items() if view.alive}
        started, self._alive = alive - self._alive, alive
        self._switched |= dict.fromkeys(started, True)
        self.shown = {key for key in self.views if self._switched.get(key, key in usual)}
        return started

    async def rediscover(self) -> bool:
        """Search for runs if the folders changed. Returns whether it searched."""
        try:
            project = open_project(self.params)
        except UserError:  # the pipeline screen reports it
            project = None
        now = stamp(self.root, self.params, project)
        if now == self.stamp:
            return False
        runs, kept = await asyncio.to_thread(_search, self.root, project)
        previous, self.views = self.views, {}
        for run in runs:
            view = previous.get(str(run.log_folder)) or RunView(run, self.smoothing)
            view.update(run, self.smoothing)
            self.views[str(run.log_folder)] = view
        self.stamp = now
        self._show_kept(kept)
        stages = {key: view.run.stage for key, view in self.views.items()}
        assign_looks(stages, self.looks)
        return True

    async def read_kept(self, project: Project | None) -> None:
        """Read again what evaluations measured."""
        self._show_kept(await asyncio.to_thread(_kept, self.root, project))

    def _show_kept(self, kept: Mapping[str, float]) -> None:
        for view in self.views.values():
            view.kept = kept.get(view.run.digest)


def _search(root: Path, project: Project | None) -> tuple[list[Run], Mapping[str, float]]:
    return discover_runs(root, project), _kept(root, project)


def _kept(root: Path, project: Project | None) -> dict[str, float]:
    """sha256 of an artifact → the share of old answers that it kept."""
    homes = {root, *(owner.root for owner in (project, project and project.parent) if owner)}
    shares = {}
    for digest, numbers in measured(home / ARTIFACTS for home in homes).items():
        share: Any = (
            numbers.get("forgetting", {}).get("answers_kept")
            if isinstance(numbers.get("forgetting"), dict)
            else None
        )
        if isinstance(share, int | float) and 0 <= share <= 1:
            shares[digest] = float(share)
    return shares
