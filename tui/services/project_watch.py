"""What the project's files say: stages, their states, what runs, the git branch. Loaded again when
they change.
"""

import asyncio
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from pipeline.errors import UserError
from pipeline.files.base_model import path_to_watch
from pipeline.files.file_tail import file_stamp
from pipeline.project.stage_graph import ARTIFACTS, RUNS, Project, Stage
from pipeline.stages.registry import GRAPH, open_project
from pipeline.views.stages import StageState, Status, going_on, project_signature, running_of
from tui.services.pipeline_process import Runner, Running
from tui.services.watch import FileWatch

BUSY = 1.0  # seconds between two looks while something runs: a killed process changes no file


class Look(NamedTuple):
    """What one look at the files found."""

    project: Project | None  # while its params file is broken, as it was before
    problem: str  # what is wrong with the params file, or ""
    states: Mapping[str, StageState]  # while the first look lasts, those that are known
    branch: str  # of git, or ""
    params: object  # a stamp of the params file,
    files: object  # and what changes when any other file does; None: look again


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
        project, problem = self._open(None)
        self._take(Look(project, problem, {}, "", None, None))

    def _take(self, look: Look) -> None:
        self._look = look
        self.project, self.problem, self.states, self.branch, *_ = look

    def _open(self, before: Project | None) -> tuple[Project | None, str]:
        """The project, or the one before and what is wrong with the params file."""
        try:
            return open_project(self._params), ""
        except (UserError, OSError) as error:
            folder = self._params.parent
            if folder.is_dir():
                return before, str(error)
            return before, f"{folder} was moved or deleted. Put it back, or quit with q."

    @property
    def stages(self) -> Mapping[str, Stage]:
        """The stages that the project can read, and what ran unlisted; of a broken one, those of
        the product.
        """
        if self.project is None:
            return GRAPH.stages
        readable = self.project.readable
        shown = {name: state.stage for name, state in self.states.items()}
        return {**readable, **shown} or GRAPH.stages

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
        loop = asyncio.get_running_loop()
        self._follow({self._params})
        followed: Project | None = None
        while True:
            self._wake.clear()
            pipeline, started = self._runner.running(), self.pipeline
            if pipeline != started:
                self.pipeline = pipeline
                self._changed()
            before = self._look
            look = await asyncio.to_thread(self._load, before, loop)
            ended = None if pipeline else started
            if look != before or ended:
                self._show(look)
            if ended:
                self._on_end(ended)
            if self.project and self.project is not followed:
                followed = self.project
                self._follow(await asyncio.to_thread(self._paths, followed))
            is_busy = self.running or pipeline or look.files is None
            # Not `wait_for`: before Python 3.12 it returns if it is cancelled in the moment in
            # which the event comes.
            with suppress(TimeoutError):
                async with asyncio.timeout(BUSY if is_busy else None):
                    await self._wake.wait()

    def _show(self, look: Look) -> None:
        self._take(look)
        self._changed()

    def _changed(self) -> None:
        self.revision += 1
        self._on_change()

    def _follow(self, paths: set[Path]) -> None:
        self._files.follow("project", paths, self.look_now)

    def _paths(self, project: Project) -> set[Path]:
        """The files and folders that the states depend on."""
        paths = {self._params, project.root / "dvc.yaml", self._head}
        for name, stage in project.readable.items():
            paths |= {project.root / file for file in project.data_files(stage)}
            paths |= {project.home(name).root / folder for folder in (ARTIFACTS, RUNS)}
        base = path_to_watch(project.params.origin.base, project.home("import").root)
        return paths | ({base} if base else set())

    def _load(self, before: Look, loop: asyncio.AbstractEventLoop) -> Look:
        """The files as they are now. A killed process changes none, so what runs is looked at."""
        params = file_stamp(self._params)
        project, problem = before.project, before.problem
        if params != before.params:
            project, problem = self._open(project)
        files = project_signature(project, running_of(before.states)) if project else ()
        look = Look(project, problem, before.states, _branch(self._head), params, files)
        now = going_on(project, before.states) if project and look == before else None
        if now is not None:
            return look._replace(states=now)
        states: dict[str, StageState] = {}

        def first(state: StageState) -> None:
            """Show each state as soon as it is known: the first look hashes all artifacts."""
            states[state.stage.name] = state
            loop.call_soon_threadsafe(self._show, look._replace(states=dict(states), files=None))

        try:
            if project:
                states = self._status.of(project, *[first] * (not before.states))
        except (UserError, OSError):  # a file vanished while it was read: try again
            return look._replace(files=None)
        return look._replace(states=states)


def _git_head(folder: Path) -> Path:
    """The file HEAD of the repository that holds `folder`; one that does not exist if there is
    none.
    """
    for parent in (folder, *folder.parents):
        git = parent / ".git"
        if git.is_file():  # of a worktree: `gitdir: PATH`
            with suppress(OSError, ValueError):
                git = parent / git.read_text(encoding="utf-8").removeprefix("gitdir:").strip()
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
