"""Asks a child process in `worker.py`'s protocol from asyncio, many requests at once."""

import asyncio
import itertools
import json
import os
import signal
from asyncio.subprocess import PIPE, Process
from collections import deque
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.errors import UserError
from pipeline.files.worker import LAST_EVENTS, MAX_REQUEST_BYTES, Answer, parse_answer

# answers queued per request; further ones stay in the pipe, which then blocks the process
MAX_QUEUED = 256
MAX_ANSWER_BYTES = 2**25  # of a line from the process
STDERR_BYTES = 8192  # the end of its stderr, whose last line is in the error message
PATIENCE = 1.0  # seconds between closing stdin, SIGTERM and SIGKILL


class WorkerDied(UserError):
    """The process ended before it answered. The next request starts a new one."""


class AsyncWorker:
    """A process that is started on first use. If it ends, what it had loaded is lost.

    `name` and `advice` begin and end the message when it died. `environment` is called at each
    start.
    """

    def __init__(
        self,
        command: Sequence[str],
        cwd: Path,
        name: str,
        advice: str,
        environment: Callable[[], Mapping[str, str]] = lambda: os.environ,
    ) -> None:
        self._command, self._cwd, self._environment = tuple(command), cwd, environment
        self._name, self._advice = name, advice
        self._process: _Process | None = None
        self._starting = asyncio.Lock()

    @property
    def running(self) -> bool:
        return self._process is not None and not self._process.ended

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process and self.running else None

    async def ask(self, do: str, **fields: object) -> Answer:
        """The last answer. Raises UserError if it is an error, WorkerDied if the process ends."""
        async with aclosing(self.stream(do, **fields)) as answers:
            return [answer async for answer in answers][-1]

    async def stream(self, do: str, **fields: object) -> AsyncGenerator[Answer, None]:
        """Yield every answer to a request as it arrives. Raises as `ask` does.

        Closing the generator early cancels the request: wrap it in `contextlib.aclosing`.
        """
        process = await self._running()
        request = process.send(do, fields)
        try:
            await process.drain()
            while not request.finished:
                yield await process.answer(request)
        finally:
            process.forget(request)

    async def stop(self) -> None:
        """End the process: close its stdin, then SIGTERM, then SIGKILL. Does not hang."""
        async with self._starting:
            process, self._process = self._process, None
        if process is not None:
            await process.stop()

    async def _running(self) -> "_Process":
        async with self._starting:
            if self._process is None or self._process.ended:
                self._process = await self._start()
            return self._process

    async def _start(self) -> "_Process":
        try:
            process = await asyncio.create_subprocess_exec(
                *self._command,
                cwd=self._cwd,
                env=self._environment(),
                stdin=PIPE,
                stdout=PIPE,
                stderr=PIPE,
                limit=MAX_ANSWER_BYTES,
                start_new_session=True,  # Ctrl+C in the terminal does not reach it
            )
        except OSError as error:
            reason = error.strerror or error
            raise WorkerDied(f"{self._name} cannot be started: {reason}.") from None
        return _Process(process, lambda reason: f"{self._name} ended: {reason}. {self._advice}")


@dataclass(eq=False)
class _Request:
    """A pending request and its unread answers."""

    id: int
    answers: deque[Answer] = field(default_factory=deque)
    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    finished: bool = False


class _Process:
    """A running process, its pending requests, and why it ended."""

    def __init__(self, process: Process, describe_end: Callable[[str], str]) -> None:
        self._process, self._describe_end = process, describe_end
        self._ids = itertools.count(1)
        self._pending: dict[int, _Request] = {}
        # set when an answer is read or the set of requests changes
        self._progress = asyncio.Event()
        self._stderr_tail = b""
        self._exit_message = ""  # once it has ended
        self._stderr_task = asyncio.create_task(self._read_stderr())
        self._stdout_task = asyncio.create_task(self._read_stdout())

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def ended(self) -> bool:
        return self._process.returncode is not None or bool(self._exit_message)

    def send(self, do: str, fields: Mapping[str, object]) -> _Request:
        """Send a request; read its answers with `answer`. Raises UserError if it is too long."""
        request = _Request(next(self._ids))
        self._write({"id": request.id, "do": do, **fields})
        self._pending[request.id] = request
        self._progress.set()
        return request

    def _write(self, request: Mapping[str, object]) -> None:
        line = json.dumps(request, default=str).encode() + b"\n"
        if len(line) >= MAX_REQUEST_BYTES:
            raise UserError(
                f"The request has {len(line):,} bytes; the limit is {MAX_REQUEST_BYTES:,}. "
                "Shorten the text."
            )
        assert self._process.stdin is not None
        if not self._process.stdin.is_closing():
            self._process.stdin.write(line)

    async def drain(self) -> None:
        """Wait until the pipe to the process has room."""
        assert self._process.stdin is not None
        with suppress(ConnectionError):  # `answer` raises the reason
            await self._process.stdin.drain()

    async def answer(self, request: _Request) -> Answer:
        """The next answer. Raises UserError for an "error", WorkerDied if the process has ended."""
        while not request.answers:
            if self._exit_message:
                raise WorkerDied(*self._exit_message.splitlines())
            request.arrived.clear()
            await request.arrived.wait()
        answer = request.answers.popleft()
        self._progress.set()
        request.finished = answer["event"] in LAST_EVENTS
        if answer["event"] == "error":
            raise UserError(*str(answer.get("message")).splitlines())
        return answer

    def forget(self, request: _Request) -> None:
        """Drop a request that nobody reads any more; cancel it unless it is finished."""
        self._pending.pop(request.id, None)
        self._progress.set()
        if not request.finished and not self.ended:
            self._write({"id": next(self._ids), "do": "cancel", "target": request.id})

    async def _read_stdout(self) -> None:
        """Hand out answers until the process ends, then fail all pending requests."""
        assert self._process.stdout is not None
        protocol_error = ""
        try:
            while (line := await self._process.stdout.readline()).endswith(b"\n"):
                await self._deliver(parse_answer(line))
        except ValueError as error:
            protocol_error = f"it wrote an invalid answer ({error})"
            self._kill()
        # Wait for the exit; kill the process if it only closed stdout. Its children may keep stderr
        # open longer.
        with suppress(TimeoutError):
            async with asyncio.timeout(PATIENCE):
                await self._process.wait()
        self._kill()
        await self._process.wait()
        await asyncio.wait((self._stderr_task,), timeout=PATIENCE)
        self._process._transport.close()  # type: ignore[attr-defined]  # closes the pipes: asyncio has no public way
        self._end(protocol_error or self._exit_reason())

    def _exit_reason(self) -> str:
        code = self._process.returncode or 0
        reason = f"exit code {code}"
        if code == -signal.SIGKILL:
            reason = "it was killed, perhaps because the machine ran out of memory"
        elif code < 0:
            reason = f"signal {-code} ({signal.strsignal(-code)})"
        lines = self._stderr_tail.decode(errors="replace").strip().splitlines()
        return f"{reason}, its last line was {lines[-1]!r}" if lines else reason

    async def _deliver(self, answer: Answer) -> None:
        """Queue an answer.

        A slow reader blocks the process, unless another request is pending behind its
        answers.
        """
        if answer["event"] == "error" and answer.get("kind") == "memory":
            self._end(str(answer.get("message")))
        while request := self._pending.get(answer["id"]):
            if len(request.answers) < MAX_QUEUED or len(self._pending) > 1 or self._exit_message:
                break
            self._progress.clear()
            await self._progress.wait()
        if request is not None and not self._exit_message:
            request.answers.append(answer)
            request.arrived.set()

    def _end(self, reason: str) -> None:
        """Fail all pending requests. The first reason given is kept."""
        self._exit_message = self._exit_message or self._describe_end(reason)
        self._progress.set()
        for request in self._pending.values():
            request.arrived.set()

    async def _read_stderr(self) -> None:
        assert self._process.stderr is not None
        while chunk := await self._process.stderr.read(4096):
            self._stderr_tail = (self._stderr_tail + chunk)[-STDERR_BYTES:]

    async def stop(self) -> None:
        """Close its stdin, then SIGTERM, then SIGKILL; wait PATIENCE after each."""
        assert self._process.stdin is not None
        self._end("it was stopped")
        for action in (self._process.stdin.close, self._process.terminate, self._kill):
            with suppress(ProcessLookupError):
                action()
            done, _ = await asyncio.wait((self._stdout_task,), timeout=PATIENCE)
            if done:
                return
        self._stdout_task.cancel()
        self._stderr_task.cancel()

    def _kill(self) -> None:
        """Kill it with the processes that it started."""
        if self._process.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
