"""A machine of a test's cluster: one daemon, and whatever becomes a child of it.

`python machine_process.py DISK COMMAND…` reads a word a line: "start" starts the command, "stop" kills it
alone, and leaves what it started. The end of input is the death of the machine: everything that
ever came of the command is killed, and the folder DISK is gone. So nothing outlives a test, not
even one that was killed.
"""

import ctypes
import os
import shutil
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36


def main() -> None:
    disk, *command = sys.argv[1:]
    # A daemon that detaches itself, or whose parent died, becomes a child of this process.
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    # A child that ended is no zombie: nobody asks how it ended.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    # Ctrl-C is for the test, which then ends this process's input.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    print("ready", flush=True)
    daemon = 0
    for line in sys.stdin:
        if line.strip() == "start":
            daemon = start(command)
        else:
            stop(daemon)
        print("done", flush=True)
    die()
    shutil.rmtree(disk, ignore_errors=True)


def start(command: list[str]) -> int:
    """Its process id. It has neither the machine's input nor its output."""
    files = [
        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
        (os.POSIX_SPAWN_DUP2, 2, 1),
    ]
    defaults = [signal.SIGCHLD, signal.SIGINT]
    return os.posix_spawn(command[0], command, os.environ, file_actions=files, setsigdef=defaults)


def stop(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    with suppress(ChildProcessError):  # it ended, and left no exit code
        os.waitpid(pid, 0)


def die() -> None:
    """Kill from the top: whose parent dies becomes a child of this process, until there is none."""
    children = Path("/proc/thread-self/children")
    while True:
        for pid in children.read_text(encoding="ascii").split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        try:
            os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:  # there is none
            return
        time.sleep(0.001)


if __name__ == "__main__":
    main()
