"""Programs in children of one process that has imported their libraries: a tenth of what a start
takes else.
"""

import json
import multiprocessing
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache
from importlib import import_module
from itertools import count
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from pkgutil import resolve_name
from tempfile import mkdtemp, mkstemp
from typing import Any

from tests.helpers import forked_command

SERVER = multiprocessing.get_context("forkserver")
PRELOADED = "tests.helpers.preloaded"
SERVER.set_forkserver_preload([PRELOADED])

# A start looks at all children: of two threads that read one exit code, the second would find 255.
_READING = threading.Lock()

# code of a program for which no file system has flock
NO_FLOCK = """
import errno, fcntl, os
def missing(*_):
    raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
fcntl.flock = missing
"""


class Forked:
    """A running `lora …`, its stderr in a file.

    `dies`: at which call of which function it is killed, if at any; `variables` stand beside its
    environment; `first` is called in the child before the command.
    """

    def __init__(
        self,
        command: list[str],
        cwd: Path,
        dies: tuple[str, int] | None = None,
        variables: Mapping[str, str] = {},
        first: Callable[[], object] | None = None,
    ) -> None:
        handle, self._errors = mkstemp()
        os.close(handle)
        arguments = command, str(cwd), self._errors, dies, variables, first
        self.process: BaseProcess = SERVER.Process(target=_run, args=arguments, daemon=True)
        with _READING:
            self.process.start()

    def ended(self, seconds: float | None = None) -> bool:
        """Whether it has ended, at the latest after so many seconds."""
        wait([self.process.sentinel], seconds)
        with _READING:
            return self.process.exitcode is not None

    def end(self) -> tuple[int, str]:
        """Exit code, or a negative signal's number, and stderr, once it has ended."""
        self.ended()
        errors = Path(self._errors).read_text(encoding="utf-8")
        Path(self._errors).unlink()
        assert self.process.exitcode is not None
        return self.process.exitcode, errors


def _run(
    command: list[str],
    cwd: str,
    errors: str,
    dies: tuple[str, int] | None,
    variables: Mapping[str, str],
    first: Callable[[], object] | None,
) -> None:
    from cli.main import main

    os.environ |= variables
    _follow_environment()
    if dies:
        _die_at(*dies)
    for stream, path in ((1, os.devnull), (2, errors)):
        os.dup2(os.open(path, os.O_WRONLY), stream)
    os.chdir(cwd)
    sys.argv = command
    if first:
        first()
    main()


def _follow_environment() -> None:
    """What libraries read from it when they were imported, which the server did."""
    import huggingface_hub.constants

    huggingface_hub.constants.HF_HUB_OFFLINE = os.environ.get("HF_HUB_OFFLINE") == "1"


def forked(module: str, *arguments: str) -> list[str]:
    """The command line of a process as `python -m module` starts one: its `main` runs in a child of
    the server.

    With "-c" for a module, the code that follows runs there. The process passes on signals and its
    end, but is not the one that computes.
    """
    return [sys.executable, "-I", "-S", forked_command.__file__, listening(), module, *arguments]


@cache
def listening() -> str:
    """The socket on which this process waits for commands, once the server has imported
    everything.
    """
    address = f"{mkdtemp()}/commands"
    server = socket.socket(socket.AF_UNIX)
    server.bind(address)
    server.listen()

    def accept() -> None:
        while True:
            threading.Thread(target=_serve, args=(server.accept()[0],), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    first = SERVER.Process(target=os.getpid)  # so that no test's patience ends while it imports
    with _READING:
        first.start()
    first.join()
    return address


def _serve(client: socket.socket) -> None:
    """One command: start its child, pass on signals, tell its exit code. The child ends with its
    command.
    """
    with client:
        length, streams, _, _ = socket.recv_fds(client, 4, 3)
        given = json.loads(client.makefile("rb").read(int.from_bytes(length, "big")))
        pipes = [Connection(stream) for stream in streams]  # they can be sent to the server
        child = SERVER.Process(target=_run_module, args=(pipes, given), daemon=True)
        with _READING:
            child.start()
        for pipe in pipes:
            pipe.close()
        while client in wait([child.sentinel, client]):
            number = client.recv(1)
            if not number:
                child.kill()
                break
            assert child.pid is not None
            os.kill(child.pid, number[0])
        child.join()
        with _READING:
            code = child.exitcode
        with suppress(BrokenPipeError):  # it was killed
            client.sendall(str(code).encode())


def _run_module(streams: list[Connection], given: dict[str, Any]) -> None:
    for number, stream in enumerate(streams):
        os.dup2(stream.fileno(), number)
        stream.close()
    # Python's own know of the files that they were opened on; a child of multiprocessing reads
    # nothing.
    sys.stdin, sys.stdout, sys.stderr = (
        os.fdopen(number, mode, encoding="utf-8") for number, mode in enumerate("rww")
    )
    for name in ("stdout", "stderr"):  # a stream that is replaced must not be closed
        setattr(sys, f"__{name}__", getattr(sys, name))
    os.chdir(given["cwd"])
    os.environ.clear()
    os.environ.update(given["environment"])
    _follow_environment()
    module, *arguments = given["command"]
    if module == "-c":
        code, *arguments = arguments
        sys.argv = [module, *arguments]
        exec(code, {"__name__": "__main__"})
    else:
        sys.argv = [module, *arguments]
        import_module(module).main()


def _die_at(function: str, call: int) -> None:
    """SIGKILL this process when `function`, such as `pipeline.files.artifact.seal`, is called for
    the nth time.
    """
    place, _, name = function.rpartition(".")
    owner, calls = resolve_name(place), count(1)
    real = getattr(owner, name)

    def dying(*arguments: Any, **named: Any) -> Any:
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **named)

    setattr(owner, name, dying)
