"""The runs that the curves screen knows: which there are, which of them are shown, and how each looks."""

import asyncio
from pathlib import Path

from pipeline.errors import UserError
from pipeline.project.logs.runs import discover_runs, stamp
from pipeline.project.palette import METHODS, Look, other
from pipeline.project.stage_graph import Project
from pipeline.workbench import open_project
from tui.screens.curves.run_view import RunView


class Runs:
    """Keyed by the place of their logs, newest of a stage first."""

    def __init__(self, root: Path, params: Path, smoothing: float) -> None:
        self.root, self.params, self.smoothing = root, params, smoothing
        self.watched: dict[str, RunView] = {}
        self.shown: set[str] = set()
        self.looks: dict[str, Look] = {}
        self.stamp: tuple[int, ...] | None = None  # of the folders when they were searched last
        self._followed: set[str] = set()  # those that were live last
        self._chosen = False  # the user has switched a run on or off: the default does not come back

    def drawn(self) -> list[tuple[str, RunView]]:
        return [(key, watched) for key, watched in self.watched.items() if key in self.shown]

    def toggle(self, key: str) -> None:
        self._chosen = True
        self.shown ^= {key}

    def smooth(self, smoothing: float) -> None:
        self.smoothing = smoothing
        for watched in self.watched.values():
            watched.smooth(smoothing)

    async def rediscover(self) -> bool:
        """Look for runs again if there may be others; whether it did."""
        project = _project(self.params)
        now = stamp(self.root, self.params, project)
        if now == self.stamp:
            return False
        runs = await asyncio.to_thread(discover_runs, self.root, project)
        known, self.watched = self.watched, {}
        for run in runs:
            watched = known.get(str(run.log_folder)) or RunView(run, self.smoothing)
            watched.renew(run)
            self.watched[str(run.log_folder)] = watched
        self.stamp = now
        self._give_looks()
        return True

    def _give_looks(self) -> None:
        """The last run of a method has the method's look everywhere; any other run keeps the first that was free."""
        for key, watched in self.watched.items():
            first = next(k for k, w in self.watched.items() if w.run.stage == watched.run.stage)
            if key == first and watched.run.stage in METHODS:
                self.looks[key] = METHODS[watched.run.stage]
            elif self.looks.get(key) in (None, *METHODS.values()):
                taken = {self.looks[k] for k in self.watched if k in self.looks}
                self.looks[key] = next((o for n in range(20) if (o := other(n)) not in taken), other(len(taken)))

    def show_default(self) -> None:
        """The last run of each fine-tuning; of pretraining and scratch while one runs, or if nothing else is there."""
        if self._chosen:
            self.shown &= self.watched.keys()
            return
        last: dict[str, str] = {}
        for key, watched in self.watched.items():
            last.setdefault(watched.run.stage, key)
        methods = {key for stage, key in last.items() if stage.startswith("finetune_")}
        live = {key for key in last.values() if self.watched[key].alive}
        self._followed = live or self._followed & self.watched.keys()  # what has died or ended stays until another runs
        self.shown = self._followed if self._followed - methods else methods or set(last.values())


def _project(params: Path) -> Project | None:
    try:
        return open_project(params)
    except UserError:  # the pipeline screen says what is wrong with it
        return None
