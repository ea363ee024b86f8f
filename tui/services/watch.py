"""The watch: tells those who follow files and folders that something there has changed.

One `watchfiles` watch serves the project and the screen that is shown, so nothing needs a clock of
its own. Where the system tells of no changes, the followed files are compared from time to time.
"""

import asyncio
import math
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from pipeline.files.digest_cache import Signature, signature

STEP = 100  # ms: changes are told once none is new for a step, within two of them
DEBOUNCE = 400  # ms after which changes are told though there are always new ones
STARTED = 500  # ms after which a watch that saw nothing says that it has begun
PAUSE = 0.5  # seconds between two calls of a follower: a log may grow 50 times per second

# A watch of 4,000 folders is begun in 0.1 s, in which nothing else is done.
MAX_FOLDERS = 4000
POLL_DELAY = 2.0  # seconds between two comparisons, where the system does not tell
POLL_SHARE = 0.01  # of a core for comparing: the delay grows with the number of files,
MAX_DELAY = 10.0  # up to this
REMOTE = {  # file systems that other machines write to, whose changes the system does not tell
    *("9p", "afs", "beegfs", "ceph", "cifs", "drvfs", "fuse.sshfs", "glusterfs", "gpfs"),
    *("lustre", "nfs", "nfs4", "prl_fs", "smb3", "smbfs", "vboxsf", "virtiofs"),
}
FORCED, DELAY = "WATCHFILES_FORCE_POLLING", "WATCHFILES_POLL_DELAY_MS"

Changes = set[tuple[int, str]] | Exception  # as watchfiles tells them; or why it ended
MODIFIED = 2  # of watchfiles' kinds: the others are added and deleted


@dataclass(eq=False)
class _Follower:
    paths: frozenset[Path]
    tell: Callable[[], object]
    pause: float
    told: float = -math.inf  # when, by the loop's clock
    due: asyncio.TimerHandle | None = None
    is_polled: bool = False
    seen: tuple[Signature, ...] | None = None  # when its files were last compared

    @cached_property
    def paths_and_parents(self) -> set[Path]:
        return {above for path in self.paths for above in (path, *path.parents)}

    def concerns(self, path: Path) -> bool:
        """Whether a change of `path` is one at, below or above a followed path."""
        return path in self.paths_and_parents or not self.paths.isdisjoint(path.parents)

    def has_changed(self) -> bool:
        """Whether a file differs from the last call. Costs a stat per file."""
        before, self.seen = self.seen, tuple(map(signature, sorted(self.paths)))
        return self.seen != before


class _Plan(NamedTuple):
    """The folders to watch: `trees` with everything below, of `flat` ones the entries alone.

    A file is watched through its folder: the watch of a file ends when it is replaced. What does
    not exist yet is watched through the nearest folder that does.
    """

    trees: frozenset[Path] = frozenset()
    flat: frozenset[Path] = frozenset()


class FileWatch:
    """Watches until `run` is cancelled. `say` is given a message if the system does not tell of
    changes.
    """

    def __init__(self, say: Callable[[str], object]) -> None:
        self._say = say
        self._followers: dict[str, _Follower] = {}
        self._plan = _Plan()
        self._stop = threading.Event()  # of the threads that watch `_plan`
        self._replan = asyncio.Event()
        self._is_broken = False  # a watched folder was removed or replaced
        self._why_polled = ""
        self._has_said = False
        self._slow: dict[Path, str] = {}  # folder → why it is polled, or ""
        self._mounts: Mapping[Path, str] | None = None  # folder → file system

    def follow(
        self,
        name: str,
        paths: Iterable[Path],
        tell: Callable[[], object],
        pause: float | None = None,
    ) -> None:
        """Call `tell` on the event loop when something at or below `paths` may have changed, at
        most every `pause` (else PAUSE) seconds.

        The paths need not exist. They replace what the same name followed before.
        """
        before, wanted = self._followers.get(name), frozenset(paths)
        wanted |= {Path(os.path.realpath(path)) for path in wanted if path.is_symlink()}
        self._followers[name] = follower = _Follower(
            wanted, tell, PAUSE if pause is None else pause
        )
        if before is None or before.paths != wanted:
            self._replan.set()
        else:
            follower.is_polled, follower.seen = before.is_polled, before.seen
        if before and before.due:
            before.due.cancel()
            self._tell(follower)

    async def run(self) -> None:
        self._loop = asyncio.get_running_loop()
        if os.environ.get(FORCED, "").lower() not in ("", "false", "disable", "disabled"):
            self._why_polled = f"{FORCED} is set."
        try:
            while True:
                self._replan.clear()
                plan = await asyncio.to_thread(self._make_plan)
                if plan != self._plan or self._is_broken:
                    self._start(plan)
                delay = await self._poll()
                with suppress(TimeoutError):
                    async with asyncio.timeout(delay):
                        await self._replan.wait()
        finally:
            self._stop.set()

    # What is watched

    def _make_plan(self) -> _Plan:
        """The folders of all followers that need not be polled. Called in another thread."""
        trees, flat = set[Path](), set[Path]()
        for follower in list(self._followers.values()):
            why = self._why_polled or next(filter(None, map(self._why_slow, follower.paths)), "")
            follower.is_polled = bool(why)
            if why:
                self._say_once(why)
                continue
            for path in follower.paths:
                if _is_folder(path):
                    trees.add(path)
                else:
                    flat.add(next(filter(_is_folder, path.parents)))
        # a folder that is moved or deleted is told by its parent
        flat |= {folder.parent for folder in trees | flat}
        trees = {tree for tree in trees if trees.isdisjoint(tree.parents)}
        return _Plan(frozenset(trees), frozenset(flat))

    def _why_slow(self, path: Path) -> str:
        """Why the system does not tell, or not in time, what changes at or below a path."""
        if path in self._slow:
            return self._slow[path]
        why = self._file_system_problem(path)
        if _is_folder(path):
            why = self._slow[path] = why or _size_problem(path)
        return why

    def _file_system_problem(self, path: Path) -> str:
        if self._mounts is None:
            import psutil  # 20 ms

            mounts = []
            with suppress(OSError):  # without /proc
                mounts = psutil.disk_partitions(all=True)
            self._mounts = {Path(mount.mountpoint): mount.fstype for mount in mounts}
        kind = next((self._mounts[at] for at in (path, *path.parents) if at in self._mounts), "")
        return f"{path} is on a network file system ({kind})." if kind in REMOTE else ""

    def _say_once(self, why: str) -> None:
        """Called in another thread."""
        if not self._has_said:
            self._has_said = True
            text = f"{why} Files are checked every {_poll_delay():g} s instead."
            self._loop.call_soon_threadsafe(self._say, text)

    # Watching

    def _start(self, plan: _Plan) -> None:
        """Watch other folders than before."""
        self._stop.set()
        self._stop, self._plan, self._is_broken = threading.Event(), plan, False
        for folders, recursive in ((plan.trees, True), (plan.flat, False)):
            if folders:
                threading.Thread(
                    target=_watch,
                    args=(folders, recursive, self._stop, self._loop, self._take),
                    name="watch",
                ).start()

    def _take(self, stop: threading.Event, changes: Changes) -> None:
        """Tell the followers of changes; all of them of none, with which a watch begins."""
        if stop is not self._stop:  # of a watch that was replaced
            return
        if isinstance(changes, Exception):
            # a folder that vanished before it was watched is no reason
            if not isinstance(changes, FileNotFoundError):
                self._why_polled = (
                    f"Files cannot be watched: {str(changes).rstrip('.')}. Raise "
                    "fs.inotify.max_user_watches and max_user_instances."
                )
            self._is_broken = True
            self._loop.call_later(PAUSE, self._replan.set)
            return
        paths = {Path(path) for _, path in changes}
        for follower in self._followers.values():
            if not paths or any(map(follower.concerns, paths)):
                self._tell(follower)
        if any(self._needs_plan(Path(path)) for kind, path in changes if kind != MODIFIED):
            self._is_broken = True
            self._replan.set()

    def _needs_plan(self, path: Path) -> bool:
        """Whether a path that was added or deleted changes what is watched."""
        if not self._plan.trees.isdisjoint(path.parents):
            return False  # watchfiles follows what is new in a tree
        above = any(path in follower.paths_and_parents for follower in self._followers.values())
        return above and (path in self._plan.trees | self._plan.flat or _is_folder(path))

    async def _poll(self) -> float | None:
        """Compare the files of the polled followers. Returns seconds until the next time."""
        polled = [follower for follower in self._followers.values() if follower.is_polled]
        if not polled:
            return None
        changed, seconds = await asyncio.to_thread(_changed_of, polled)
        for follower in changed:
            self._tell(follower)
        return min(max(_poll_delay(), seconds / POLL_SHARE), MAX_DELAY)

    # Telling

    def _tell(self, follower: _Follower) -> None:
        """Call it now, or once its pause is over."""
        if follower.due is None:
            wait = max(follower.told + follower.pause - self._loop.time(), 0.0)
            follower.due = self._loop.call_later(wait, self._call, follower)

    def _call(self, follower: _Follower) -> None:
        follower.due, follower.told = None, self._loop.time()
        follower.tell()


def _watch(
    folders: Iterable[Path],
    recursive: bool,
    stop: threading.Event,
    loop: asyncio.AbstractEventLoop,
    take: Callable[[threading.Event, Changes], None],
) -> None:
    """Hand over all changes until `stop` is set. A thread."""

    def hand_over(changes: Changes) -> None:
        with suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(take, stop, changes)

    try:
        from watchfiles import watch  # 30 ms, which the first paint should not wait for

        begun = False
        for changes in watch(
            *folders,
            watch_filter=None,
            debounce=DEBOUNCE,
            step=STEP,
            stop_event=stop,
            rust_timeout=STARTED,
            yield_on_timeout=True,
            force_polling=False,
            recursive=recursive,
            ignore_permission_denied=True,
        ):
            if not begun:  # what changed before is not known
                hand_over(set())
                begun = True
            if changes:
                hand_over({(int(kind), path) for kind, path in changes})
    except Exception as error:  # OSError, or watchfiles' own: without watches or instances left
        hand_over(error)


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # it may not be read
        return False


def _size_problem(path: Path) -> str:
    for count, _ in enumerate(os.walk(path, followlinks=True)):
        if count == MAX_FOLDERS:
            return f"{path} has more than {MAX_FOLDERS:,} folders."
    return ""


def _changed_of(followers: Iterable[_Follower]) -> tuple[list[_Follower], float]:
    """Those whose files changed, and the seconds of CPU time that it took."""
    start = time.thread_time()
    changed = [follower for follower in followers if follower.has_changed()]
    return changed, time.thread_time() - start


def _poll_delay() -> float:
    text = os.environ.get(DELAY, "")
    return int(text) / 1000 if text.isdecimal() else POLL_DELAY
