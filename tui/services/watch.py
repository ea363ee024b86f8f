"""The watch: tells those who follow files and folders that something there has changed.

One `watchfiles` watch serves the project and the screen that is shown, so nothing needs a clock of
its own. Where the system tells of no changes, the followed files are compared from time to time.
"""

import asyncio
import math
import os
import threading
import time
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from pipeline.files.digest_cache import Signature, signature

STEP = 100  # ms: changes are told once none is new for a step, within two of them
DEBOUNCE = 400  # ms after which changes are told though there are always new ones
STARTED = 500  # ms after which a watch that saw nothing says that it has begun
# seconds between two calls of a follower: a log may grow 500 times per second, and with 300 adapters
# a look takes 10 ms
PAUSE = 0.9

# A watch of 4,000 folders is begun in 0.1 s, in which nothing else is done.
MAX_FOLDERS = 4000
POLL_DELAY = 2.0  # seconds between two comparisons, where the system does not tell
POLL_SHARE = 0.01  # of a core for comparing: the delay grows with the number of files,
MAX_DELAY = 10.0  # up to this
# How the names of file systems begin that other machines write to, whose changes the system does
# not tell.
REMOTE = (
    *("9p", "afs", "beegfs", "ceph", "cifs", "drvfs", "fuse.sshfs", "glusterfs", "gpfs"),
    *("lustre", "nfs", "prl_fs", "smb", "vboxsf", "virtiofs"),
)

# As watchfiles tells them; None for any, as a watch begins; or why it ended.
Changes = Collection[tuple[int, str]] | None | Exception
MODIFIED = 2  # of watchfiles' kinds: the others are added and deleted


@dataclass(eq=False)
class _Follower:
    tell: Callable[[], object]
    paths: frozenset[Path] = frozenset()
    above: set[Path] = field(default_factory=set)  # the paths and their parents
    told: float = -math.inf  # when, by the loop's clock
    due: asyncio.TimerHandle | None = None
    is_polled: bool = False
    seen: tuple[Signature, ...] | None = None  # when its files were last compared

    def concerns(self, path: Path) -> bool:
        """Whether a change of `path` is one at, below or above a followed path."""
        return path in self.above or not self.paths.isdisjoint(path.parents)

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
        self._problem = ""  # why nothing can be watched
        self._slow: dict[Path, str] = {}  # folder → why it is polled, or ""

    def follow(
        self,
        name: str,
        paths: Iterable[Path],
        tell: Callable[[], object],
    ) -> None:
        """Call `tell` on the event loop when something at or below `paths` may have changed, at
        most every PAUSE seconds.

        The paths need not exist. They replace what the same name followed before.
        """
        wanted = frozenset(paths)
        wanted |= {Path(os.path.realpath(path)) for path in wanted if path.is_symlink()}
        follower = self._followers.setdefault(name, _Follower(tell))
        follower.tell = tell
        if follower.paths != wanted:
            follower.paths = wanted
            follower.above = {above for path in wanted for above in (path, *path.parents)}
            self._replan.set()

    async def run(self) -> None:
        self._loop = asyncio.get_running_loop()
        try:
            while True:
                self._replan.clear()
                plan = await asyncio.to_thread(self._make_plan)
                if plan != self._plan:
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
            reasons = filter(None, (self._problem, *map(self._why_slow, follower.paths)))
            why = next(reasons, "")
            follower.is_polled = bool(why)
            if why:
                self._loop.call_soon_threadsafe(self._say_once, why)
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
        kind = next((self._mounts[at] for at in (path, *path.parents) if at in self._mounts), "")
        why = f"{path} is on a network file system ({kind})." if kind.startswith(REMOTE) else ""
        if _is_folder(path):
            why = self._slow[path] = why or _size_problem(path)
        return why

    @cached_property
    def _mounts(self) -> dict[Path, str]:
        """Folder → file system."""
        import psutil  # 20 ms

        with suppress(OSError):  # without /proc
            mounts = psutil.disk_partitions(all=True)
            return {Path(mount.mountpoint): mount.fstype for mount in mounts}
        return {}

    def _say_once(self, why: str) -> None:
        self._say(f"{why} Files are checked every {POLL_DELAY:g} s instead.")
        self._say = lambda _: None

    # Watching

    def _start(self, plan: _Plan) -> None:
        """Watch other folders than before."""
        self._stop.set()
        self._stop, self._plan = threading.Event(), plan
        for folders, recursive in ((plan.trees, True), (plan.flat, False)):
            if folders:
                how = (folders, recursive, self._stop, self._hand_over)
                threading.Thread(target=_watch, args=how, name="watch").start()

    def _hand_over(self, stop: threading.Event, changes: Changes) -> None:
        """Called in another thread."""
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._take, stop, changes)

    def _take(self, stop: threading.Event, changes: Changes) -> None:
        """Tell the followers of changes, and look whether other folders are to be watched."""
        if stop is not self._stop:  # of a watch that was replaced
            return
        if isinstance(changes, Exception):
            # a folder that vanished before it was watched is no reason
            if not isinstance(changes, FileNotFoundError):
                self._problem = (
                    f"Files cannot be watched: {str(changes).rstrip('.')}. Raise "
                    "fs.inotify.max_user_watches and max_user_instances."
                )
            self._plan = _Plan()
            self._loop.call_later(PAUSE, self._replan.set)
            return
        paths = {Path(path) for _, path in changes or ()}
        for follower in self._followers.values():
            if changes is None or any(map(follower.concerns, paths)):
                self._tell(follower)
        moved = {Path(path) for kind, path in changes or () if kind != MODIFIED}
        if not moved.isdisjoint(self._plan.trees | self._plan.flat):
            self._plan = _Plan()  # the watch of a folder ends with it
        if moved:
            self._replan.set()

    async def _poll(self) -> float | None:
        """Compare the files of the polled followers. Returns seconds until the next time."""
        polled = [follower for follower in self._followers.values() if follower.is_polled]
        if not polled:
            return None

        def compare() -> tuple[list[_Follower], float]:
            """Those whose files changed, and the seconds of CPU time that it took."""
            start = time.thread_time()
            changed = [follower for follower in polled if follower.has_changed()]
            return changed, time.thread_time() - start

        changed, seconds = await asyncio.to_thread(compare)
        for follower in changed:
            self._tell(follower)
        return min(max(POLL_DELAY, seconds / POLL_SHARE), MAX_DELAY)

    # Telling

    def _tell(self, follower: _Follower) -> None:
        """Call it now, or once its pause is over."""
        if follower.due is None:
            wait = follower.told + PAUSE - self._loop.time()
            follower.due = self._loop.call_later(max(wait, 0.0), self._call, follower)

    def _call(self, follower: _Follower) -> None:
        follower.due, follower.told = None, self._loop.time()
        follower.tell()


def _watch(
    folders: Iterable[Path],
    recursive: bool,
    stop: threading.Event,
    hand_over: Callable[[threading.Event, Changes], None],
) -> None:
    """Hand over all changes until `stop` is set. A thread."""
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
            recursive=recursive,
            ignore_permission_denied=True,
        ):
            if not begun:  # what changed before is not known
                hand_over(stop, None)
                begun = True
            if changes:
                hand_over(stop, changes)
    except Exception as error:  # OSError, or watchfiles' own: without watches or instances left
        hand_over(stop, error)


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
