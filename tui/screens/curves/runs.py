"""The runs of the curves screen: which exist, which are shown, and the look of each."""

import asyncio
from pathlib import Path

from pipeline.errors import UserError
from pipeline.project.logs.runs import discover_runs, stamp
from pipeline.project.palette import Look, other
from pipeline.project.stage_graph import Project
from pipeline.workbench import GRAPH, open_project
from tui.screens.curves.run_view import RunView


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

    def toggle(self, key: str) -> None:
        self._user_toggled = True
        self.shown ^= {key}

    def smooth(self, smoothing: float) -> None:
        self.smoothing = smoothing
        for view in self.views.values():
            view.smooth(smoothing)

    async def rediscover(self) -> bool:
        """Search for runs if the folders changed. Returns whether it searched."""
        project = _open_project(self.params)
        now = stamp(self.root, self.params, project, GRAPH)
        if now == self.stamp:
            return False
        runs = await asyncio.to_thread(discover_runs, self.root, project, GRAPH)
        previous, self.views = self.views, {}
        for run in runs:
            view = previous.get(str(run.log_folder)) or RunView(run, self.smoothing)
            view.update(run)
            self.views[str(run.log_folder)] = view
        self.stamp = now
        self._assign_looks()
        return True

    def _assign_looks(self) -> None:
        """The last run of a method gets the method's look; any other run keeps the first look that was free."""
        for key, view in self.views.items():
            first = next(k for k, w in self.views.items() if w.run.stage == view.run.stage)
            if key == first and (look := GRAPH.stages[view.run.stage].look):
                self.looks[key] = look
            elif self.looks.get(key) in (None, *(stage.look for stage in GRAPH.stages.values())):
                taken = {self.looks[k] for k in self.views if k in self.looks}
                self.looks[key] = next((o for n in range(20) if (o := other(n)) not in taken), other(len(taken)))

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


def _open_project(params: Path) -> Project | None:
    try:
        return open_project(params)
    except UserError:  # the pipeline screen reports it
        return None
