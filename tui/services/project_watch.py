"""What the project's files say: stages, their states, what runs, the git branch. Loaded again when
they change.
"""

import asyncio
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import UserError
from pipeline.files.base_model import path_to_watch
from pipeline.files.file_tail import file_stamp
from pipeline.project.stage_graph import ARTIFACTS, RUNS, Project, Stage
from pipeline.stages.registry import GRAPH, open_project
from pipeline.views.stages import StageState, Status, project_signature
from tui.services.pipeline_process import Runner, Running
from tui.services.watch import FileWatch

BUSY = 1.0  # seconds between two looks while something runs: a killed process changes no file
PAUSE = 0.9  # seconds between two looks at files that change: with 300 adapters one takes 10 ms


@dataclass(frozen=True)
class Look:
    """What one look at the files found. `seen`: stamps that change when anything does."""

    project: Project | None
    problem: str  # with the params file; `project` is then the last valid one
    states: Mapping[str, StageState]
    branch: str
    seen: object


class ProjectWatch:
    """Looks at the files when `files` tells that they changed, until it is cancelled. Its
    attributes change on the event loop only, before `on_change`.

    `on_end` is called when a pipeline that a workbench started has ended, after its states were
    loaded.
    """

    def __init__(
        self,
        params: Path,
        runner: Runner,
        files: FileWatch,
        on_change: Callable[[], None],
        on_end: Callable[[Running], None],
    ):
        self._params, self._runner, self._files = params, runner, files
        self._on_change, self._on_end = on_change, on_end
        self._status, self._wake = Status(), asyncio.Event()
        self._head = _git_head(params.parent)
        self.revision = 0  # counts the changes
        self.pipeline: Running | None = None  # that a workbench started
        try:
            self._look = Look(open_project(params), "", {}, "", None)
        except (UserError, OSError) as error:
            self._look = Look(None, str(error), {}, "", None)

    @property
    def project(self) -> Project | None:
        """The project; while its params file is broken, as it was before."""
        return self._look.project

    @property
    def problem(self) -> str:
        """What is wrong with the params file, or ""."""
        return self._look.problem

    @property
    def states(self) -> Mapping[str, StageState]:
        """State of each stage; while the first look lasts, of those that are known."""
        return self._look.states

    @property
    def branch(self) -> str:
        """The git branch, or ""."""
        return self._look.branch

    @property
    def stages(self) -> Mapping[str, Stage]:
        """The stages that the project can read, and what ran unlisted; of a broken one, those of
        the product.
        """
        if self.project is None:
            return GRAPH.stages
        unlisted = {
            name: state.stage
            for name, state in self.states.items()
            if name not in self.project.readable
        }
        return {**self.project.readable, **unlisted} or GRAPH.stages

    @property
    def running(self) -> StageState | None:
        """The stage that runs; of several the last in the DAG's order."""
        return next(
            (state for state in reversed([*self.states.values()]) if state.state == "running"), None
        )

    def look_now(self) -> None:
        """Look at the files now."""
        self._wake.set()

    def started(self, pipeline: Running) -> None:
        """Take note of a pipeline that was just started: it may end before the next look, and that
        is reported too.
        """
        self.pipeline = pipeline
        self._changed()
        self.look_now()

    async def run(self) -> None:
        """Look at the files once, and again when they change."""
        followed: Project | None = None
        self._files.follow("project", self._paths(None), self.look_now, PAUSE)
        while True:
            self._wake.clear()
            pipeline = self._runner.running()
            ended = self.pipeline if self.pipeline and not pipeline else None
            if pipeline != self.pipeline:
                self.pipeline = pipeline
                self._changed()
            before = self._look
            look = await asyncio.to_thread(self._load, before, asyncio.get_running_loop())
            if look != before or ended:
                self._show(look)
            if ended:
                self._on_end(ended)
            if self.project is not followed:
                followed = self.project
                paths = await asyncio.to_thread(self._paths, followed)
                self._files.follow("project", paths, self.look_now, PAUSE)
            # `seen` is None if a file vanished while it was read
            is_waiting = self.running is None and pipeline is None and look.seen is not None
            # Not `wait_for`: before Python 3.12 it returns if it is cancelled in the moment in
            # which the event comes.
            with suppress(TimeoutError):
                async with asyncio.timeout(None if is_waiting else BUSY):
                    await self._wake.wait()

    def _show(self, look: Look) -> None:
        self._look = look
        self._changed()

    def _changed(self) -> None:
        self.revision += 1
        self._on_change()

    def _paths(self, project: Project | None) -> set[Path]:
        """The files and folders that the states depend on."""
        root = self._params.parent
        paths = {self._params, root / "dvc.yaml", self._head, root / ARTIFACTS, root / RUNS}
        if project is None:
            return paths
        for name, stage in project.readable.items():
            paths |= {project.root / file for file in project.data_files(stage)}
            paths |= {project.home(name).root / folder for folder in (ARTIFACTS, RUNS)}
        base = path_to_watch(project.params.origin.base, project.home("import").root)
        return paths | ({base} if base else set())

    def _load(self, before: Look, loop: asyncio.AbstractEventLoop) -> Look:
        """The files as they are now; `before` itself if nothing changed."""
        params = file_stamp(self._params)
        project, problem = before.project, before.problem
        old = before.seen if isinstance(before.seen, tuple) else (None, None, None)
        if params != old[0]:
            try:
                project, problem = open_project(self._params), ""
            except (UserError, OSError) as error:
                problem = str(error)
                if not self._params.parent.is_dir():
                    problem = (
                        f"{self._params.parent} was moved or deleted. Put it back, or quit with q."
                    )
        seen = params, project and project_signature(project), file_stamp(self._head)
        # a killed process changes no file, so that a stage that runs is looked at each time
        if seen == before.seen and not any(
            state.state == "running" for state in before.states.values()
        ):
            return before
        branch = before.branch if seen[2] == old[2] else _branch(self._head)
        states: dict[str, StageState] = {}

        def first(state: StageState) -> None:
            """Show each state as soon as it is known: the first look hashes all artifacts."""
            states[state.stage.name] = state
            loop.call_soon_threadsafe(
                self._show, Look(project, problem, dict(states), branch, before.seen)
            )

        try:
            if project:
                states = self._status.of(project, *[first] * (not before.states))
        except (UserError, OSError):  # a file vanished while it was read: try again
            return Look(project, problem, before.states, branch, None)
        return Look(project, problem, states, branch, seen)


def _git_head(folder: Path) -> Path:
    """The file HEAD of the repository that holds `folder`; one that does not exist if there is
    none.
    """
    for parent in (folder, *folder.parents):
        git = parent / ".git"
        if git.is_file():  # of a worktree: `gitdir: PATH`
            with suppress(OSError, ValueError):
                return (
                    parent
                    / git.read_text(encoding="utf-8").removeprefix("gitdir:").strip()
                    / "HEAD"
                )
        if git.is_dir():
            return git / "HEAD"
    return folder / ".git" / "HEAD"


def _branch(head: Path) -> str:
    """The branch, or the first digits of the commit."""
    try:
        text = head.read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return ""
    return text.removeprefix("ref: refs/heads/") if text.startswith("ref: ") else text[:8]
