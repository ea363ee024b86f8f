"""The watch of files: whom it tells of which changes, and what it does where the system tells of
none.
"""

import asyncio
import shutil
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import watchfiles

from pipeline.files.artifact import write_file
from tests.helpers.pilot import until
from tui.app import Workbench
from tui.screens.curves.screen import CurvesScreen
from tui.screens.data.screen import DataScreen
from tui.screens.pipeline.screen import PipelineScreen
from tui.services import watch
from tui.services.pipeline_process import Runner
from tui.services.project_watch import ProjectWatch
from tui.services.watch import Changes, FileWatch


class Watch(FileWatch):
    """A watch that counts its calls, and knows when it has begun."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.calls = Counter[str]()
        self._begun: list[threading.Event] = []
        super().__init__(self.said.append)

    def _take(self, stop: threading.Event, changes: Changes) -> None:
        super()._take(stop, changes)
        if changes is None:
            self._begun.append(stop)

    def count(self, name: str, *paths: Path) -> None:
        self.follow(name, paths, lambda: self.calls.update([name]))

    async def comes(self, holds: Callable[[], object]) -> None:
        async with asyncio.timeout(30):
            while not holds():
                await asyncio.sleep(0.01)

    async def settled(self) -> None:
        """Wait until all is watched, and all was told."""
        await self.comes(
            lambda: (
                any(self._plan)
                and self._begun.count(self._stop) == sum(map(bool, self._plan))
                and not self._replan.is_set()
                and not any(follower.due for follower in self._followers.values())
            )
        )

    async def tells(self, name: str, change: Callable[[], object]) -> None:
        """Change something, and wait until the follower was called."""
        await self.settled()
        before = self.calls[name]
        change()
        await self.comes(lambda: self.calls[name] > before)


@asynccontextmanager
async def running(*services: FileWatch | ProjectWatch) -> AsyncIterator[None]:
    tasks = [asyncio.create_task(service.run()) for service in services]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task


async def test_a_file_that_changes_is_replaced_is_deleted_and_comes_back(tmp_path: Path) -> None:
    file = tmp_path / "params.yaml"
    file.write_text("a", encoding="utf-8")
    files = Watch()
    files.count("file", file)
    async with running(files):
        await files.tells("file", lambda: file.write_text("b", encoding="utf-8"))
        for number in range(3):  # by rename: a watch of the file itself would end
            await files.tells("file", lambda number=number: write_file(file, str(number)))  # type: ignore[misc]
        await files.tells("file", file.unlink)
        await files.tells("file", file.touch)


async def test_a_link_is_told_when_its_target_changes(tmp_path: Path) -> None:
    target, link = tmp_path / "there/params.yaml", tmp_path / "here/params.yaml"
    for path in (target, link):
        path.parent.mkdir()
    target.touch()
    link.symlink_to(target)
    files = Watch()
    files.count("link", link)
    async with running(files):
        await files.tells("link", lambda: target.write_text("a", encoding="utf-8"))


async def test_folders_are_followed_before_they_exist_and_after_they_were_removed(
    tmp_path: Path,
) -> None:
    runs = tmp_path / "project/runs"
    log = runs / "pretrain/loss.csv"
    files = Watch()
    files.count("runs", runs)
    async with running(files):
        for _ in range(2):
            await files.tells("runs", lambda: log.parent.mkdir(parents=True))
            await files.tells("runs", log.touch)
            await files.tells("runs", lambda: log.write_text("1", encoding="utf-8"))
            await files.tells("runs", lambda: shutil.rmtree(tmp_path / "project"))


async def test_a_project_that_is_moved_away_and_back(tmp_path: Path) -> None:
    project = tmp_path / "project"
    (project / "runs").mkdir(parents=True)
    files = Watch()
    files.count("params", project / "params.yaml")
    files.count("runs", project / "runs")
    async with running(files):
        for name in ("params", "runs"):
            await files.tells(name, lambda: project.rename(tmp_path / "other"))
            await files.tells(name, lambda: (tmp_path / "other").rename(project))
        await files.tells("runs", (project / "runs/log").touch)


async def test_who_follows_something_else_is_not_told(tmp_path: Path) -> None:
    files = Watch()
    files.count("mine", tmp_path / "mine")
    files.count("other", tmp_path / "other")
    async with running(files):
        await files.settled()
        before = files.calls["mine"]
        for _ in range(5):
            await files.tells("other", lambda: write_file(tmp_path / "other", "x"))
        assert files.calls["mine"] == before


async def test_a_name_that_follows_other_paths_follows_the_former_no_more(tmp_path: Path) -> None:
    files = Watch()
    files.count("first", tmp_path / "a")
    files.count("screen", tmp_path / "a")
    async with running(files):
        await files.tells("screen", (tmp_path / "a").touch)
        files.count("screen", tmp_path / "b/c")
        await files.settled()
        before = files.calls["screen"]
        await files.tells("first", (tmp_path / "a").unlink)
        assert files.calls["screen"] == before
        await files.tells("screen", lambda: (tmp_path / "b/c").mkdir(parents=True))


async def test_a_burst_of_changes_is_a_few_calls_the_last_after_the_last_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, pause, seen = tmp_path / "loss.csv", 0.3, [0]
    monkeypatch.setattr("tui.services.watch.PAUSE", pause)
    log.touch()
    files = Watch()
    files.follow("log", [log], lambda: seen.append(log.stat().st_size))
    async with running(files):
        await files.settled()
        calls, start = len(seen), time.monotonic()
        for _ in range(100):
            with log.open("a", encoding="utf-8") as stream:
                stream.write("x")
            await asyncio.sleep(0.01)
        await files.comes(lambda: seen[-1] == 100)
        await files.settled()
        assert len(seen) - calls <= (time.monotonic() - start) / pause + 2


async def test_the_threads_end_with_the_watch(tmp_path: Path) -> None:
    files = Watch()
    files.count("folder", tmp_path)
    async with running(files):
        await files.settled()
        threads = [thread for thread in threading.enumerate() if thread.name == "watch"]
        assert threads
    await files.comes(lambda: not any(thread.is_alive() for thread in threads))


def fail(error: Exception) -> Callable[..., Iterator[Any]]:
    def watch(*_: object, **__: object) -> Iterator[Any]:
        raise error
        yield

    return watch


@pytest.fixture
def quick_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "POLL_DELAY", 0.03)


REASONS = {
    "watches": "Files cannot be watched: OS file watch limit reached. Raise fs.inotify",
    "network": "is on a network file system (nfs4).",
    "size": "has more than 2 folders.",
}


@pytest.mark.parametrize("reason", REASONS)
async def test_where_the_system_does_not_tell_the_files_are_compared(
    tmp_path: Path,
    reason: str,
    quick_polls: None,  # noqa: ARG001
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mounts = [SimpleNamespace(mountpoint=str(tmp_path), fstype="nfs4" * (reason == "network"))]
    monkeypatch.setattr(psutil, "disk_partitions", lambda **_: mounts)
    if reason == "watches":
        monkeypatch.setattr(watchfiles, "watch", fail(OSError("OS file watch limit reached.")))
    if reason == "size":
        monkeypatch.setattr(watch, "MAX_FOLDERS", 2)
    for number in range(3):
        (tmp_path / f"runs/{number}").mkdir(parents=True)
    log = tmp_path / "runs/0/loss.csv"
    files = Watch()
    files.count("runs", tmp_path / "runs")
    files.count("missing", tmp_path / "missing")
    async with running(files):
        await files.comes(lambda: files.calls["runs"])
        calls = 0
        for text in "abc":  # all within a second, which watchfiles' own polling takes for one time
            await files.comes(lambda: not files._followers["runs"].due)
            calls = files.calls["runs"]
            log.write_text(text, encoding="utf-8")
            await files.comes(lambda calls=calls: files.calls["runs"] > calls)  # type: ignore[misc]
        await files.comes(lambda: files.calls["missing"])
        calls = files.calls["missing"]
        (tmp_path / "missing").touch()
        await files.comes(lambda: files.calls["missing"] > calls)
        shutil.rmtree(tmp_path / "runs")
    assert len(files.said) == 1 and REASONS[reason] in files.said[0]
    assert files.said[0].endswith("Files are checked every 0.03 s instead.")


async def test_a_folder_that_vanishes_while_its_watch_begins_is_no_reason_to_poll(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, tries = watchfiles.watch, []

    def vanished(*paths: Path, **how: Any) -> Iterator[Any]:
        tries.append(paths)
        return real(*paths, **how) if len(tries) > 2 else fail(FileNotFoundError("gone"))()

    monkeypatch.setattr(watchfiles, "watch", vanished)
    files = Watch()
    files.count("folder", tmp_path)
    async with running(files):
        await files.tells("folder", (tmp_path / "a").touch)
    assert not files.said


async def test_the_project_is_not_looked_at_while_nothing_changes(
    empty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks, load = list[object](), ProjectWatch._load

    def counted(*arguments: Any) -> Any:
        looks.append(arguments)
        return load(*arguments)

    monkeypatch.setattr(ProjectWatch, "_load", counted)
    files = Watch()
    project = ProjectWatch(
        empty / "params.yaml", Runner(empty), files, lambda: None, lambda _: None
    )
    files.count("mark", empty / "mark")
    async with running(project, files):
        await files.comes(lambda: project._look.files)
        await files.tells("mark", (empty / "mark").touch)
        await files.settled()
        before = len(looks)
        for _ in range(5):
            await files.tells("mark", lambda: write_file(empty / "mark", "x"))
        assert len(looks) == before


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often the screens Data and Curves were told of changed files, and of a second."""
    calls = Counter[str]()
    for kind in (DataScreen, CurvesScreen):
        monkeypatch.setattr(kind, "watched", lambda self: [self.workbench.root / "shown"])
        for method in ("files_changed", "tick"):
            key = f"{kind.NAME}.{method}"
            monkeypatch.setattr(kind, method, lambda _, key=key: calls.update([key]))
    return calls


async def test_the_screen_that_is_shown_is_told_alone(empty: Path, told: Counter[str]) -> None:
    app = Workbench(empty / "params.yaml")
    async with app.run_test() as pilot:

        async def counts(what: str, change: Callable[[], object] = lambda: None) -> None:
            before = told[what]
            change()
            await until(pilot, lambda: told[what] > before)

        await until(pilot, lambda: isinstance(app.screen, PipelineScreen))
        (empty / "shown").mkdir()
        for shown, other in (("data", "curves"), ("curves", "data"), ("data", "curves")):
            # once when it is shown
            await counts(f"{shown}.files_changed", partial(app.switch_mode, shown))
            await until(pilot, lambda shown=shown: shown == app.base_screen.NAME)  # type: ignore[misc]
            before = told[f"{other}.files_changed"], told[f"{other}.tick"]
            for name in ("a", "b", "a"):
                await counts(f"{shown}.files_changed", (empty / "shown" / name).touch)
                await counts(f"{shown}.tick")
            assert before == (told[f"{other}.files_changed"], told[f"{other}.tick"])
