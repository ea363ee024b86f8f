"""Locks between processes, also of several machines that share a folder.

flock is the lock wherever there is one: the kernel frees it however a process ends, and NFS passes
it on between machines. Some file systems have none (Lustre without -o flock, mounted buckets).
There a second file, PATH.heartbeat, is the lock, which only one process can create. Its mtime is
renewed as long as its process runs.
"""

import errno
import fcntl
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

# what flock raises on a file system without it
MISSING = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)
BEAT = 10.0  # seconds between two heartbeats
STALE = 60.0  # seconds without one after which a process counts as dead
POLL = 0.5  # seconds between two looks at another process's heartbeat
LONGEST = 400  # bytes that are read of a lock: a host name has at most 255


def host() -> str:
    """The name of this machine."""
    return os.uname().nodename


class Holder(NamedTuple):
    """A process of a machine. `host` is empty in files of earlier versions, which do not say it."""

    pid: int
    host: str = ""

    @property
    def is_here(self) -> bool:
        """Whether it is one of this machine's."""
        return self.host in ("", host())

    @property
    def is_gone(self) -> bool:
        """Whether this machine can tell that it has ended."""
        return self.is_here and not is_running(self.pid)

    def __str__(self) -> str:
        return f"process {self.pid}" if self.is_here else f"process {self.pid} on {self.host}"


def read_holder(path: Path) -> Holder | None:
    """Who wrote the lock file: `HOST PID`, in earlier versions `PID`, in a heartbeat with a number
    between them that no other has. None if nobody did.
    """
    try:
        with path.open("rb") as file:
            *names, pid = file.read(LONGEST).decode(errors="replace").split()
        return Holder(int(pid), *names[:1])
    except (OSError, ValueError):
        return None


def flock(file: IO[Any], mode: int = fcntl.LOCK_EX, wait: bool = True) -> bool:
    """Lock an open file until it is closed. Returns False where the file system has no flock.

    Raises BlockingIOError without `wait` if another process holds it.
    """
    try:
        fcntl.flock(file, mode if wait else mode | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in MISSING:
            raise
        return False
    return True


class Lock:
    """The lock of a path, held from `acquire` until the `with` block ends or the process dies."""

    has_flock = True

    def __init__(self, path: Path) -> None:
        self._path, self._beat = path, heartbeat(path)
        self._file = path.open("a+")
        self._stop: Callable[[], None] = lambda: None
        # who held it when, by the clock of the file system, and since when that is so by ours
        self._seen: tuple[object, ...] = ()
        self._since = 0.0

    @property
    def holder(self) -> Holder | None:
        return read_holder(self._path if self.has_flock else self._beat)

    def acquire(self, wait: bool = True) -> bool:
        """Returns whether it is held now, which it is with `wait`."""
        try:
            self.has_flock = flock(self._file, wait=wait)
        except BlockingIOError:
            return False
        while not self.has_flock and not self._create():
            if not self._clear_dead():
                if not wait:
                    return False
                time.sleep(POLL)
        self._file.truncate(0)
        self._file.write(f"{host()} {os.getpid()}")
        self._file.flush()
        return True

    def __enter__(self) -> "Lock":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()
        self._file.close()

    def _create(self) -> bool:
        """Create the heartbeat. Returns False if there is one."""
        import threading

        me = f"{host()} {time.time_ns()} {os.getpid()}"
        try:
            with self._beat.open("x") as file:
                file.write(me)
        except FileExistsError:
            return False
        stopped = threading.Event()

        def is_ours() -> bool:
            # a process that was stopped for a minute has lost it to another
            with suppress(OSError):
                return self._beat.read_text() == me
            return False

        def renew() -> None:
            while not stopped.wait(BEAT):
                with suppress(OSError):  # of a network; the next one may come through
                    if is_ours():
                        os.utime(self._beat)

        def stop() -> None:
            stopped.set()
            with suppress(OSError):
                if is_ours():
                    self._beat.unlink()

        self._stop = stop
        # a daemon, so that it does not keep the program running
        threading.Thread(target=renew, name="heartbeat", daemon=True).start()
        return True

    def _clear_dead(self) -> bool:
        """Remove the heartbeat of a dead process. Returns False if it lives or may live.

        The clocks of two machines differ: of a process elsewhere it counts how long its heartbeat
        stays the same while this one looks.
        """
        with suppress(FileNotFoundError):
            state = (self._beat.read_text(), self._beat.stat().st_mtime_ns)
            if state != self._seen:
                self._seen, self._since = state, time.monotonic()
            holder = self.holder
            is_gone = holder is not None and holder.is_gone
            if not is_gone and time.monotonic() - self._since < STALE:
                return False
            # Two may come to this at once: the second must not remove what the first then creates.
            removal = self._beat.with_name(f"{self._beat.name}.removal")
            try:
                removal.open("x").close()
            except FileExistsError:
                if time.time() - removal.stat().st_mtime > STALE:  # it was killed at this point
                    removal.unlink()
                return False
            try:
                if self._beat.read_text() == state[0]:
                    self._beat.unlink()
            finally:
                removal.unlink()
        return True


def heartbeat(path: Path) -> Path:
    """The file beside the lock `path` whose mtime says that its process runs."""
    return path.with_name(f"{path.name}.heartbeat")


def is_held(path: Path) -> bool:
    """Whether a process, here or elsewhere, holds the lock."""
    holder = read_holder(path)
    # Do not try the lock of a process that is gone: a stage that starts at this moment would have
    # to wait.
    if holder is None or holder.is_gone:
        return False
    try:
        with path.open("rb") as file:
            if flock(file, fcntl.LOCK_SH, wait=False):
                return False
        return time.time() - heartbeat(path).stat().st_mtime < STALE
    except BlockingIOError:
        return True
    except OSError:
        return False


def is_running(pid: int, started: str = "") -> bool:
    """Whether a process with this id, and start time `started` if known, runs on this machine."""
    try:
        os.kill(pid, 0)
    # a number from a file may be larger than the system knows
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # another user's
    state, now = process_state(pid)
    return state not in ("Z", "X") and (not started or not now or now == started)


def process_state(pid: int) -> tuple[str, str]:
    """(state, start in clock ticks since boot) of a process; empty if /proc does not tell."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "", ""
    fields = stat.rpartition(")")[2].split()
    return fields[0], fields[19]  # fields 3 and 22 of proc(5)
