"""The watch: what it shows of a project, and when."""

import asyncio
import shutil
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from pipeline.project.logs import run_state
from tests.helpers.projects import load
from tui.services import project_watch
from tui.services.param_edits import ParamEdits
from tui.services.pipeline_process import Runner, Running
from tui.services.project_watch import ProjectWatch
from tui.services.watch import FileWatch


class Watched(ProjectWatch):
    """A watch that counts what it tells."""

    def __init__(self, root: Path) -> None:
        self.counts: list[int] = []
        self.ended: list[Running] = []
        self.files = FileWatch(print)
        super().__init__(
            root / "params.yaml", Runner(root), self.files, self._count, self.ended.append
        )

    def _count(self) -> None:
        self.counts.append(len(self.states))

    async def comes(self, holds: Callable[[], object]) -> None:
        async with asyncio.timeout(20):
            while not holds():
                await asyncio.sleep(0.02)


@asynccontextmanager
async def watching(root: Path) -> AsyncIterator[Watched]:
    watch = Watched(root)
    tasks = [asyncio.create_task(service.run()) for service in (watch, watch.files)]
    yield watch
    for task in tasks:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def test_states_are_told_one_by_one_and_then_only_changes(empty: Path) -> None:
    async with watching(empty) as watch:
        # the look has ended
        await watch.comes(lambda: len(watch.states) == len(watch.stages) and watch._look.files)
        assert {*range(1, len(watch.stages) + 1)} <= {*watch.counts}  # each as soon as it was known
        told = watch.revision
        for _ in range(5):
            watch.look_now()
            await asyncio.sleep(0.05)
        assert watch.revision == told
        ParamEdits().save(empty / "params.yaml", {"finetune_lora.rank": 16})
        await watch.comes(lambda: watch.project and watch.project.params.finetune_lora.rank == 16)


async def test_a_data_file_that_the_params_name_now_is_followed(empty: Path) -> None:
    data = empty / "elsewhere/new.txt"
    data.parent.mkdir()
    data.write_text("Ein Satz.\n", encoding="utf-8")
    async with watching(empty) as watch:
        await watch.comes(lambda: len(watch.states) == len(watch.stages) and watch._look.files)
        ParamEdits().save(empty / "params.yaml", {"pretrain.data": "elsewhere/new.txt"})
        await watch.comes(lambda: data.resolve() in watch.files._followers["project"].paths)
        before = watch._look.files
        data.write_text("Ein anderer Satz.\n", encoding="utf-8")
        await watch.comes(lambda: watch._look.files != before)


async def test_broken_params_leave_the_last_valid_project(empty: Path) -> None:
    params = empty / "params.yaml"
    text, rank = params.read_text(encoding="utf-8"), load(params).finetune_lora.rank
    async with watching(empty) as watch:
        await watch.comes(lambda: watch.states)
        params.write_text("finetune_lora: {rank: 0}\n", encoding="utf-8")
        await watch.comes(lambda: "rank must be at least 1" in watch.problem)
        assert watch.project and watch.project.params.finetune_lora.rank == rank
        params.write_text(text, encoding="utf-8")
        await watch.comes(lambda: not watch.problem)


async def test_a_watch_that_is_cancelled_in_the_moment_in_which_it_is_woken_ends(
    empty: Path,
) -> None:
    watch = Watched(empty)
    task = asyncio.create_task(watch.run())
    await watch.comes(lambda: len(watch.states) == len(watch.stages) and watch._look.files)
    while watch._wake.is_set():  # `comes` woke it: it looks once more, and waits
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.3)
    watch.look_now()
    task.cancel()
    async with asyncio.timeout(10):
        await asyncio.wait((task,))
    assert task.cancelled()


async def test_a_project_that_is_deleted_is_a_problem_and_no_error(empty: Path) -> None:
    async with watching(empty) as watch:
        await watch.comes(lambda: len(watch.states) == len(watch.stages))
        shutil.rmtree(empty)
        await watch.comes(lambda: watch.problem)
        assert watch.project


async def test_a_stage_that_runs_and_one_that_was_killed(empty: Path) -> None:
    folder = empty / "runs/pretrain"
    folder.mkdir(parents=True)
    writer = run_state.Writer(folder)
    lock = folder / run_state.LOCK
    holder = subprocess.Popen(
        ["python", "-c", f"import fcntl, os, time; f = open({str(lock)!r}, 'w+'); f.write(str(os.getpid())); f.flush();"
         " fcntl.flock(f, fcntl.LOCK_EX); print('x', flush=True); time.sleep(60)"],
        stdout=subprocess.PIPE,
    )  # fmt: skip
    assert holder.stdout and holder.stdout.readline()
    try:
        async with watching(empty) as watch:
            writer.progress(3, 10, "loss 1.2")
            await watch.comes(
                lambda: watch.running and watch.running.run and watch.running.run.done == 3
            )
            holder.kill()
            holder.wait()
            await watch.comes(lambda: watch.states["pretrain"].state == "died")  # no file changed
    finally:
        holder.kill()
        holder.wait()


async def test_the_end_of_a_pipeline_is_told_after_its_states(
    empty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    running: list[Running | None] = [Running(1, "dvc repro", 0.0)]
    monkeypatch.setattr(Runner, "running", lambda _: running[0])
    async with watching(empty) as watch:
        await watch.comes(lambda: watch.pipeline and len(watch.states) == len(watch.stages))
        running[0] = None
        await watch.comes(lambda: watch.ended)
        assert watch.ended == [Running(1, "dvc repro", 0.0)] and watch.pipeline is None


async def test_the_end_of_a_pipeline_that_no_look_saw_is_told_too(empty: Path) -> None:
    async with watching(empty) as watch:
        await watch.comes(lambda: len(watch.states) == len(watch.stages))
        short = Running(1, "dvc repro", 0.0)
        watch.started(short)
        assert watch.pipeline == short
        await watch.comes(lambda: watch.ended)
        assert watch.ended == [short] and watch.pipeline is None


@pytest.mark.parametrize("name", ["main", "a/branch"])
async def test_the_branch_is_that_of_the_repository_above(empty: Path, name: str) -> None:
    subprocess.run(["git", "init", "-q", "-b", name, str(empty.parent)], check=True)
    async with watching(empty) as watch:
        await watch.comes(lambda: watch.branch == name)
    assert project_watch._branch(empty / "none") == ""
