"""Run the pipeline in its own process group, with its output in a file, so that it can outlive this
program.
"""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import UserError
from pipeline.files import locks
from pipeline.project.logs import run_state
from pipeline.project.stage_graph import RUNS
from pipeline.stages.registry import GRAPH

LOCK, LOG, OLD_LOG = "pipeline.lock", "pipeline.log", "pipeline.old.log"
BIN = Path(sys.executable).parent
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)  # one after the other


@dataclass(frozen=True)
class Running:
    """A pipeline started by any workbench: `dvc …`, the leader of its process group. `starter`:
    that workbench.
    """

    pid: int
    command: str
    started: float
    starter: int = 0
    host: str = ""  # the machine of both

    @property
    def process(self) -> locks.Holder:
        return locks.Holder(self.pid, self.host)


class Runner:
    """Starts and stops the pipeline of a project, and detects one started by another workbench."""

    def __init__(self, root: Path) -> None:
        self.runs = root / RUNS
        self.root = root
        self._child: subprocess.Popen[bytes] | None = None
        self._stops = 0
        self._stopped = set[int]()  # process groups that were told to stop

    @property
    def log(self) -> Path:
        return self.runs / LOG

    def start(self, arguments: Sequence[str]) -> Running:
        """Run `dvc ARGUMENTS`. Raises UserError if a pipeline already runs here, OSError if it
        cannot be started.
        """
        if not (self.root / "dvc.yaml").is_file():
            raise UserError(
                f"{self.root} has no dvc.yaml, so there is no pipeline to run. Write one with "
                "`lora new .` there."
            )
        if self.running():
            raise UserError("The pipeline is already running. Stop it first, or wait for it.")
        if any(run_state.alive(self.runs / name) for name in GRAPH.stages):
            raise UserError(
                "A stage is already running, started elsewhere. Stop it first, or wait for it."
            )
        self.runs.mkdir(parents=True, exist_ok=True)
        self._child, self._stops = None, 0
        path = self.runs / LOCK
        try:
            with path.open("a+") as lock:
                locks.flock(lock, wait=False)
                self._child = self._spawn([str(BIN / "dvc"), *arguments], lock.fileno())
                command = " ".join(["dvc", *arguments])
                running = Running(self._child.pid, command, time.time(), os.getpid(), locks.host())
                lock.truncate(0)
                lock.write(json.dumps(vars(running)))
        except BlockingIOError:
            raise UserError(
                "Another workbench is starting the pipeline. Try again in a moment."
            ) from None
        except OSError as error:
            # it could not be recorded: no workbench would know of it, and it holds the lock
            if self._child:
                _send_signal(self._child.pid, signal.SIGKILL)
                self._child.wait()
            raise OSError(error.errno, error.strerror, error.filename or str(path)) from None
        return running

    def _spawn(self, command: Sequence[str], lock: int) -> subprocess.Popen[bytes]:
        """Start the process. It inherits the lock, and so holds it until it exits."""
        if self.log.exists():
            # renamed, so that a reader of the log sees a new file
            self.log.replace(self.runs / OLD_LOG)
        # The stages' commands are those of this environment, and dvc wraps its text for a width
        # of 100.
        path = f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}"
        with self.log.open("wb") as log:
            return subprocess.Popen(
                command,
                cwd=self.root,
                env={**os.environ, "PATH": path, "COLUMNS": "100"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=(lock,),
            )

    def running(self) -> Running | None:
        """The running pipeline, if a workbench started one."""
        if self._child and self._child.poll() is not None:
            self._child = None  # reaped
        try:
            with (self.runs / LOCK).open() as lock:
                running = Running(**json.load(lock))
                if running.process.is_gone:
                    return None
                # Ids are reused: the process is the pipeline only if it still holds the lock, or,
                # where there is none, started when the pipeline did.
                has_flock = locks.flock(lock, fcntl.LOCK_SH, wait=False)
                if not has_flock and running.process.is_here and _is_as_old(running):
                    return running
        except BlockingIOError:
            return running
        except (OSError, ValueError, TypeError):
            return None
        return None

    def stop(self) -> str:
        """Interrupt the run like Ctrl+C; on further calls terminate it, then kill it. Returns a
        message for the user.

        Raises UserError if nothing runs.
        """
        groups = self.groups()
        if not groups:
            raise UserError("Nothing is running on this machine.")
        number = STOPS[min(self._stops, 2)]
        self._stops += 1
        self._stopped.update(groups)
        for group in groups:
            _send_signal(group, number)
        if number == signal.SIGKILL:
            return "Killed. The last checkpoint is kept."
        return "Stopping. A training ends with a checkpoint. Press again if it does not stop."

    def is_stopping(self, pid: int) -> bool:
        """Whether a process was told to stop, which ends a step first, or an evaluation."""
        with suppress(ProcessLookupError):
            return os.getpgid(pid) in self._stopped
        return False

    def groups(self) -> list[int]:
        """The process groups of this machine that run stages of this project, no matter who started
        them.
        """
        pipeline = self.running()
        groups = [pipeline.pid] if pipeline and pipeline.process.is_here else []
        for name in GRAPH.stages:
            run = run_state.read(self.runs / name)
            if run and run.process.is_here and run_state.alive(self.runs / name):
                with suppress(ProcessLookupError):
                    groups.append(os.getpgid(run.pid))
        return list(dict.fromkeys(groups))


def _is_as_old(running: Running) -> bool:
    """Whether the process with a pipeline's id was there when the pipeline started."""
    import psutil

    with suppress(psutil.Error):
        return bool(psutil.Process(running.pid).create_time() <= running.started + 1)
    return False


def _send_signal(group: int, number: signal.Signals) -> None:
    if group == os.getpgrp():  # a stage run inside this program, as in a test
        return
    with suppress(ProcessLookupError):
        os.killpg(group, number)
