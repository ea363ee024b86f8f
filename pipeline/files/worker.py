"""A child process that is asked in JSON lines and answers in JSON lines.

A request is an object with an integer `id`, `do` and fields. Every answer repeats the `id` and has
an `event`; "done", "error" (with a `message`) and "cancelled" are the last of a request. An answer
with `bytes` is followed by that many bytes. {"do": "cancel", "target": ID} cancels a request.

`serve` is the child's side. `Worker` asks from a thread, one request after the other;
`async_worker.py` asks from asyncio, many requests at once.
"""

import itertools
import json
import os
import queue
import select
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any, BinaryIO

from pipeline.errors import UserError

Answer = dict[str, Any]  # with "event"

MAX_WAITING = 64  # requests in a server's queue; more are answered with “busy”
MAX_REQUEST_BYTES = 2**20  # of a line, where a server does not say otherwise
LAST_EVENTS = ("done", "error", "cancelled")


def python_module(*words: str) -> tuple[str, ...]:
    """The command that runs one of our modules in this Python."""
    # -P: do not import a folder of our name in the user's project instead of ours
    return (sys.executable, "-P", "-m", *words)


def parse_answer(line: bytes | bytearray) -> Answer:
    """A line as an answer. Raises ValueError if it is not one."""
    with suppress(ValueError, RecursionError):
        answer: Any = json.loads(line)
        is_answer = isinstance(answer, dict) and isinstance(answer.get("id"), int)
        if is_answer and isinstance(answer.get("event"), str):
            return dict(answer)
    raise ValueError(line[:80].decode(errors="replace").rstrip())


class Worker:
    """A child that one thread asks; its answers come in the order of the requests.

    It runs in a session of its own, so that Ctrl+C reaches it only through this process. It ends
    with this process, whose end closes its stdin.
    """

    def __init__(self, command: Sequence[str], stderr: int | IO[bytes]) -> None:
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=stderr, start_new_session=True
        )
        self._ids = itertools.count(1)
        self._unread = bytearray()  # output after the last answer

    def send(self, do: str, **fields: object) -> int:
        """Send a request; `read` gives its answers, which have the id that is returned."""
        id_ = next(self._ids)
        line = json.dumps({"id": id_, "do": do, **fields}).encode() + b"\n"
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # it died: reading says so
            self.process.stdin.write(line)
            self.process.stdin.flush()
        return id_

    def read(self, seconds: float) -> tuple[Answer, bytearray]:
        """The next answer, and the bytes that follow it.

        Raises UserError for an “error”, EOFError if the process ended or wrote no answer, and
        TimeoutError if the answer takes longer than `seconds`.
        """
        deadline = time.monotonic() + seconds
        start = 0
        while (end := self._unread.find(b"\n", start)) < 0:
            start = len(self._unread)
            self._read_some(deadline)
        line = self._take(end + 1)

        try:
            answer = parse_answer(line)
        except ValueError:
            self.process.kill()
            raise EOFError from None

        size = answer.pop("bytes", 0)
        while len(self._unread) < size:
            self._read_some(deadline)
        data = self._take(size)

        if answer["event"] == "error":
            raise UserError(*str(answer["message"]).splitlines())
        return answer, data

    def _read_some(self, deadline: float) -> None:
        """Add to the unread output. Raises EOFError at its end, TimeoutError at the deadline."""
        assert self.process.stdout is not None
        poller = select.poll()  # a plain read would wait forever for a process that hangs
        poller.register(self.process.stdout, select.POLLIN)
        if not poller.poll(max(0, deadline - time.monotonic()) * 1000):
            raise TimeoutError
        piece = os.read(self.process.stdout.fileno(), 2**20)
        if not piece:
            raise EOFError
        self._unread += piece

    def _take(self, size: int) -> bytearray:
        taken = self._unread[:size]
        del self._unread[:size]
        return taken

    def kill(self) -> None:
        """End the process, with those that it started, and close its pipes."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):  # input that it did not read
                pipe.close()


class Cancelled(Exception):
    """The request was cancelled; its last answer is “cancelled”."""


@dataclass(frozen=True)
class Request:
    """A request that waits or is being answered."""

    do: Any
    fields: Mapping[str, Any]  # the others
    write: Callable[..., None]
    cancelled: threading.Event = field(default_factory=threading.Event)

    def check(self) -> None:
        """Raises Cancelled if it was cancelled."""
        if self.cancelled.is_set():
            raise Cancelled

    def send(self, **answer: Any) -> None:
        """Send an answer, which may have bytes as `data`. Raises Cancelled."""
        self.check()
        self.write(**answer)


Handle = Callable[[Request], Iterable[Answer]]


class Server:
    """Answers the requests of `source` in `sink`, in the order in which they came.

    `handle` yields a request's answers; a UserError is an answer, any other exception ends the
    process. Requests in `at_once` are answered even while another one is; with `parallel`, all are.
    """

    def __init__(
        self,
        handle: Handle,
        source: BinaryIO,
        sink: BinaryIO,
        *,
        at_once: Sequence[str] = (),
        parallel: bool = False,
        most_bytes: int = MAX_REQUEST_BYTES,
    ) -> None:
        self._handle, self._source, self._sink = handle, source, sink
        self._at_once, self._parallel, self._most_bytes = at_once, parallel, most_bytes
        self._waiting = queue.Queue[int](MAX_WAITING)
        self._requests: dict[int, Request] = {}
        self._writing = threading.RLock()

    def run(self) -> None:
        """Answer requests until the source closes, which ends the process."""
        threading.Thread(target=_or_exit, args=(self._read,), daemon=True).start()
        while True:
            self._answer(self._waiting.get())

    def _read(self) -> None:
        while line := self._source.readline(self._most_bytes):
            # the rest of a line that is too long is dropped: its beginning is no valid JSON
            rest = line
            while len(rest) == self._most_bytes and not rest.endswith(b"\n"):
                rest = self._source.readline(self._most_bytes)
            self.receive(line)
        os._exit(0)  # whatever is being answered

    def receive(self, line: bytes) -> None:
        """Begin to answer a request, queue it, or cancel another one."""
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError):
            fields = None
        id_ = fields.pop("id", None) if isinstance(fields, dict) else None
        if type(id_) is not int or id_ in self._requests:
            rule = "a request must be a JSON object with a unique integer id"
            self._refuse(id_, UserError(f"{rule}, got {line[:80]!r}."))
            return
        do = fields.pop("do", None)
        if do == "cancel":
            self._cancel(id_, fields.get("target"))
            return

        self._requests[id_] = Request(do, fields, partial(self._write, id_))
        if self._parallel:
            threading.Thread(target=_or_exit, args=(self._answer, id_), daemon=True).start()
        elif do in self._at_once:
            self._answer(id_)
        else:
            try:
                self._waiting.put_nowait(id_)
            except queue.Full:
                del self._requests[id_]
                reason = f"{MAX_WAITING} requests are waiting already. Try again later."
                self._refuse(id_, UserError(reason), "busy")

    def _cancel(self, id_: int, target: Any) -> None:
        # what the cancelled request still says comes after this answer
        with self._writing:
            # an unknown id is no error, since the last answer may have been sent already
            if isinstance(target, int) and (request := self._requests.get(target)):
                request.cancelled.set()
            self._write(id_, event="done", target=target)

    def _answer(self, id_: int) -> None:
        request = self._requests[id_]
        try:
            request.check()
            for answer in self._handle(request):
                request.send(**answer)
        except Cancelled:
            self._write(id_, event="cancelled")
        except UserError as error:
            self._refuse(id_, error)
        finally:
            del self._requests[id_]

    def _refuse(self, id_: object, error: UserError, kind: str = "user") -> None:
        self._write(id_, event="error", message=str(error), kind=kind)

    def _write(self, id_: object, data: bytes = b"", **answer: Any) -> None:
        size = {"bytes": len(data)} if data else {}
        line = json.dumps({"id": id_, **answer, **size}).encode() + b"\n" + data
        with self._writing:
            try:
                self._sink.write(line)
                self._sink.flush()
            except BrokenPipeError:
                os._exit(1)  # the parent is gone


def _or_exit(function: Callable[..., None], *arguments: Any) -> None:
    """Run a function in a thread, whose error ends the process."""
    try:
        function(*arguments)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def serve(start: Callable[[], Handle], **options: Any) -> None:
    """Answer requests from stdin until it closes. What is printed goes to stderr.

    `start` makes what answers; `options` are those of `Server`.
    """
    # The descriptor too, not only sys.stdout: C libraries print past Python, and would end up
    # between two answers.
    sink = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    try:
        Server(start(), sys.stdin.buffer, sink, **options).run()
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stderr.flush()
    os._exit(code)  # the reading thread holds stdin, and a normal exit would wait for it


def limit(name: str, soft: int) -> None:
    """Set a soft limit of this process, such as RLIMIT_CPU, where the system supports it."""
    with suppress(ImportError, OSError, ValueError):
        import resource

        kind = getattr(resource, name)
        resource.setrlimit(kind, (soft, resource.getrlimit(kind)[1]))


def limit_memory(extra: int) -> None:
    """Limit the address space of this process to `extra` bytes more than it has now."""
    with suppress(OSError):  # no /proc
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        limit("RLIMIT_AS", pages * os.sysconf("SC_PAGE_SIZE") + extra)
