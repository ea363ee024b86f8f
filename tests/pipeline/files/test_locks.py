"""Locks with and without flock, of this machine's processes and of others'."""

import errno
import fcntl
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pipeline.files import locks
from pipeline.files.locks import Holder, Lock
from pipeline.project import runner
from pipeline.project.logs import run_state
from pipeline.stages.registry import open_project
from tests.helpers.process import NO_FLOCK
from tests.helpers.projects import BRIEF, STAGES, new_project, wait_for

ELSEWHERE = "node7"


@pytest.fixture(params=["ENOSYS", "EOPNOTSUPP", "ENOLCK"])
def without_flock(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    number = getattr(errno, request.param)

    def missing(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", missing)


@pytest.fixture
def dead() -> int:
    """The id of a process that has ended."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


@pytest.fixture
def beat(tmp_path: Path) -> Path:
    return tmp_path / "lock.heartbeat"


def test_a_lock_says_who_holds_it_and_is_free_afterwards(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with Lock(path) as lock, Lock(path) as second:
        assert lock.acquire() and not second.acquire(wait=False)
        assert second.holder == Holder(os.getpid(), locks.host()) and locks.is_held(path)
        assert [file.name for file in tmp_path.iterdir()] == ["lock"], "flock needs no other file"
    assert not locks.is_held(path)


@pytest.mark.usefixtures("without_flock")
def test_without_flock_one_process_at_a_time_has_the_lock(tmp_path: Path, beat: Path) -> None:
    path = tmp_path / "lock"
    with pytest.raises(RuntimeError), Lock(path) as lock, Lock(path) as second:
        assert lock.acquire() and not lock.has_flock
        assert not second.acquire(wait=False) and locks.is_held(path)
        assert second.holder == Holder(os.getpid(), locks.host())
        raise RuntimeError
    assert not beat.exists() and not locks.is_held(path)
    with Lock(path) as again:
        assert again.acquire(wait=False)


@pytest.mark.usefixtures("without_flock")
def test_without_flock_the_lock_of_a_dead_process_is_taken_at_once(
    tmp_path: Path, beat: Path, dead: int
) -> None:
    beat.write_text(f"{locks.host()} 1 {dead}")
    (tmp_path / "lock").write_text(f"{locks.host()} 1 {dead}")
    assert not locks.is_held(tmp_path / "lock")
    with Lock(tmp_path / "lock") as lock:
        assert lock.acquire(wait=False)
    assert [file.name for file in tmp_path.iterdir()] == ["lock"]


class Clock:
    """Time that goes on as somebody sleeps. `beats`: sleeps before each of which a heartbeat is
    renewed.
    """

    def __init__(self, beat: Path, beats: int) -> None:
        self.now, self._beat, self._beats = 0.0, beat, beats
        self.time, self.time_ns = time.time, time.time_ns

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        if self._beats:
            self._beats -= 1
            os.utime(self._beat, (self._beats, self._beats))  # a clock far from this machine's


@pytest.mark.usefixtures("without_flock")
@pytest.mark.parametrize("beats", [0, 1000])
def test_without_flock_a_machine_that_renews_no_heartbeat_for_a_minute_loses_the_lock(
    tmp_path: Path, beat: Path, beats: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    beat.write_text(f"{ELSEWHERE} 1 1")
    clock = Clock(beat, beats)
    monkeypatch.setattr(locks, "time", clock)
    with Lock(tmp_path / "lock") as lock:
        assert not lock.acquire(wait=False)
        assert str(lock.holder) == f"process 1 on {ELSEWHERE}"
        assert lock.acquire()
    assert clock.now == pytest.approx(beats * locks.POLL + locks.STALE, abs=2 * locks.POLL)


@pytest.mark.usefixtures("without_flock")
def test_the_heartbeat_is_renewed_and_only_ours(
    tmp_path: Path, beat: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "BEAT", 0.01)
    with Lock(tmp_path / "lock") as lock:
        lock.acquire()
        assert [t.daemon for t in threading.enumerate() if t.name == "heartbeat"] == [True]
        os.utime(beat, (0, 0))
        wait_for(lambda: beat.stat().st_mtime > 0)
        beat.write_text(f"{ELSEWHERE} 1 1")  # who has taken it, as this process was stopped
        os.utime(beat, (0, 0))
        time.sleep(0.1)
        assert beat.stat().st_mtime == 0
    assert beat.read_text().startswith(ELSEWHERE)


def test_two_that_take_a_dead_lock_at_once_never_both_have_it(tmp_path: Path, dead: int) -> None:
    code = f"""{NO_FLOCK}
import sys, time
from pathlib import Path
from pipeline.files import locks
locks.POLL = 0.001
for turn in range(25):
    with locks.Lock(Path("lock")) as lock:
        lock.acquire()
        with open("inside", "x"):
            time.sleep(0.001)
        os.unlink("inside")
        if turn % 5 == 0:
            Path("lock.heartbeat").write_text("{locks.host()} 1 {dead}")  # as if killed here
"""
    command = [sys.executable, "-c", code]
    several = [
        subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) for _ in range(4)
    ]
    assert [(process.communicate()[1], process.returncode) for process in several] == [("", 0)] * 4


@pytest.mark.parametrize(
    ("text", "holder"),
    [
        ("12", Holder(12)),
        ("node7 12", Holder(12, "node7")),
        ("node7 345 12", Holder(12, "node7")),
        ("", None),
        ("node7", None),
    ],
)
def test_locks_of_this_and_of_earlier_versions_are_read(
    tmp_path: Path, text: str, holder: Holder | None
) -> None:
    (tmp_path / "lock").write_text(text)
    assert locks.read_holder(tmp_path / "lock") == holder


def test_a_run_of_another_machine_is_alive_while_its_lock_is_held(tmp_path: Path) -> None:
    path = tmp_path / run_state.LOCK
    with path.open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # as NFS passes it on
        path.write_text(f"{ELSEWHERE} {2**22 + 1}")  # no process here has this number
        assert run_state.alive(tmp_path)
    assert not run_state.alive(tmp_path)


@pytest.mark.usefixtures("without_flock")
def test_without_flock_a_run_of_another_machine_is_alive_while_its_heart_beats(
    tmp_path: Path, beat: Path
) -> None:
    (tmp_path / run_state.LOCK).write_text(f"{ELSEWHERE} {2**22 + 1}")
    assert not run_state.alive(tmp_path)
    beat.touch()
    assert run_state.alive(tmp_path)
    then = time.time() - locks.STALE - 1
    os.utime(beat, (then, then))
    assert not run_state.alive(tmp_path)


@pytest.mark.parametrize(
    ("host", "named"), [(ELSEWHERE, f"process 7 on {ELSEWHERE}"), ("", "process 7")]
)
def test_who_waits_for_another_machine_is_told_which(tmp_path: Path, host: str, named: str) -> None:
    root = new_project(tmp_path / "p")
    folder = root / "runs/pretrain"
    folder.mkdir(parents=True)
    with (folder / run_state.LOCK).open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        (folder / run_state.LOCK).write_text(f"{host} 7".strip())
        events = runner.run(open_project(root / "params.yaml"), STAGES["pretrain"])
        assert next(events) == runner.Note(f"pretrain: waiting for {named}, which is running it")
        events.close()


def test_a_command_works_on_a_file_system_without_flock(tmp_path: Path) -> None:
    root = new_project(tmp_path / "p")
    code = f"{NO_FLOCK}from cli.main import main\nmain()"
    command = [sys.executable, "-c", code, "pretrain", f"--set={BRIEF[0]}"]
    said = []
    for _ in range(2):
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        said.append(done.stderr)
    assert all(text.count("has no flock: a heartbeat is the lock") == 1 for text in said)
    assert "taken from the cache" in said[1] and "waiting" not in said[1]
    assert not [*root.rglob("*.heartbeat")]


HOLDS = """
import sys
from pathlib import Path
from pipeline.files.locks import Lock
from pipeline.project.logs import run_state
folder = Path(sys.argv[1])
with Lock(folder / run_state.LOCK) as lock:
    lock.acquire()
    run_state.Writer(folder)
    print("held", flush=True)
    input()
"""


def test_a_run_in_another_uts_namespace_is_one_of_another_machine(tmp_path: Path) -> None:
    named = f"hostname {ELSEWHERE} && exec {sys.executable} -c '{HOLDS}' {tmp_path}"
    with subprocess.Popen(
        ["unshare", "--uts", "sh", "-c", named],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout and process.stdin and process.stderr
        if not process.stdout.readline():
            pytest.skip(f"no UTS namespaces here: {process.stderr.read().strip()}")
        journal = run_state.read(tmp_path)
        assert journal and str(journal.process) == f"process {process.pid} on {ELSEWHERE}"
        assert not journal.process.is_gone and run_state.alive(tmp_path)
        process.stdin.write("\n")
        process.stdin.close()
        assert process.wait() == 0
    assert not run_state.alive(tmp_path)
