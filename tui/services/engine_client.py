"""The client of the inference process (`pipeline/inference/server`): asks, streams, notices its death, starts anew."""

import asyncio
import itertools
import json
import signal
import sys
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Any

from pipeline.errors import UserError

Answer = dict[str, Any]

# -P: a folder called `pipeline` in the user's project must not be imported in place of ours
COMMAND = (sys.executable, "-P", "-m", "pipeline.inference.server.server")
LAST = ("done", "cancelled")  # events that end a request; "error" is raised
GATHERED = 256  # answers that wait for one reader; further ones stay in the pipe, which then holds the process up
LONGEST_REQUEST = 2**20  # bytes in a line to the process, which takes no longer one
LONGEST_ANSWER = 2**25  # bytes in a line of the process
TAIL = 20  # lines of its stderr that are kept
PATIENCE = 1.0  # seconds between asking it to end, terminating and killing


class EngineDied(UserError):
    """The inference process ended before it answered; the next request starts a fresh one with nothing loaded."""


class Inference:
    """One inference process, started on first use. What was loaded is lost with it: load again before asking."""

    def __init__(self, cwd: Path, command: Sequence[str] = COMMAND) -> None:
        self._cwd, self._command = cwd, tuple(command)
        self._process: _Process | None = None
        self._starting = asyncio.Lock()

    @property
    def running(self) -> bool:
        return self._process is not None and not self._process.ended

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process and self.running else None

    async def warm(self) -> None:
        """Start the process, which then imports its libraries; a request sent meanwhile waits for them."""
        await self._running()

    async def ask(self, do: str, **fields: object) -> Answer:
        """The last answer to one request. Raises UserError if it is refused, EngineDied if the process ends."""
        async with aclosing(self.stream(do, **fields)) as answers:
            return [answer async for answer in answers][-1]

    async def stream(self, do: str, **fields: object) -> AsyncGenerator[Answer, None]:
        """Every answer to one request, as it comes. Raises as `ask` does.

        Closing it early cancels the request: use `contextlib.aclosing` and leave the loop when you like.
        """
        process = await self._running()
        request = process.send(do, fields)
        try:
            await process.drain()
            while True:
                answer = await process.answer(request)
                yield answer
                if answer["event"] in LAST:
                    return
        finally:
            process.forget(request)

    async def stop(self) -> None:
        """End the process: ask, then terminate, then kill. Does not hang."""
        async with self._starting:
            process, self._process = self._process, None
        if process is not None:
            await process.stop()

    async def _running(self) -> "_Process":
        async with self._starting:
            if self._process is None or self._process.ended:
                self._process = await _Process.start(self._command, self._cwd)
            return self._process


class _Request:
    """A request that waits for its answers."""

    def __init__(self, id_: int) -> None:
        self.id = id_
        self.answers: deque[Answer] = deque()
        self.came = asyncio.Event()
        self.over = False


class _Process:
    """One life of the process: what it was asked, and why it ended."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._ids = itertools.count(1)
        self._waiting: dict[int, _Request] = {}
        self._moved = asyncio.Event()  # an answer was taken, a request came or went
        self._tail = ""  # of its stderr
        self._death = ""  # the sentence that says why it ended
        self._errors = asyncio.create_task(self._keep_errors())
        self._reader = asyncio.create_task(self._read())

    @classmethod
    async def start(cls, command: Sequence[str], cwd: Path) -> "_Process":
        """In a session of its own: Ctrl+C in the terminal is for the parent to decide on. Raises EngineDied."""
        pipe = asyncio.subprocess.PIPE
        try:
            process = await asyncio.create_subprocess_exec(
                *command, cwd=cwd, stdin=pipe, stdout=pipe, stderr=pipe, limit=LONGEST_ANSWER, start_new_session=True
            )
        except OSError as error:
            raise EngineDied(f"The inference process cannot be started: {error.strerror or error}.") from None
        return cls(process)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def ended(self) -> bool:
        return self._process.returncode is not None or bool(self._death)

    def send(self, do: str, fields: dict[str, object]) -> _Request:
        """Ask; `answer` has the answers. Raises UserError if the request is too long."""
        request = _Request(next(self._ids))
        self._write({"id": request.id, "do": do, **fields})
        self._waiting[request.id] = request
        self._moved.set()
        return request

    async def drain(self) -> None:
        """Wait until the process has room for requests."""
        assert self._process.stdin is not None
        with suppress(ConnectionError):  # `answer` says what happened
            await self._process.stdin.drain()

    def _write(self, request: dict[str, object]) -> None:
        line = json.dumps(request, default=str).encode() + b"\n"
        if len(line) >= LONGEST_REQUEST:
            raise UserError(f"The request has {len(line):,} bytes, more than {LONGEST_REQUEST:,}. Shorten the text.")
        assert self._process.stdin is not None
        if not self._process.stdin.is_closing():
            self._process.stdin.write(line)

    async def answer(self, request: _Request) -> Answer:
        """The next answer. Raises UserError for "error" and EngineDied when no more will come."""
        while not request.answers:
            if self._death:
                raise EngineDied(self._death)
            request.came.clear()
            await request.came.wait()
        answer = request.answers.popleft()
        self._moved.set()
        request.over = answer["event"] in (*LAST, "error")
        if answer["event"] == "error":
            raise UserError(str(answer.get("message")))
        return answer

    def forget(self, request: _Request) -> None:
        """Nobody waits for `request` any more; cancel it unless it is over."""
        self._waiting.pop(request.id, None)
        self._moved.set()
        if not request.over and not self.ended:
            self._write({"id": next(self._ids), "do": "cancel", "target": request.id})

    async def _read(self) -> None:
        """Hand answers to those who wait until the process ends, then tell all of them."""
        assert self._process.stdout is not None
        broken = ""
        try:
            while (line := await self._process.stdout.readline()).endswith(b"\n"):
                await self._deliver(_parsed(line))
        except ValueError as error:
            broken = f"it wrote a line that is no answer ({error})"
            self._kill()
        await self._see_it_end()
        self._end(broken or self._how_it_ended())

    async def _see_it_end(self) -> None:
        """Kill it if it lives on without an output; what it started may hold its stderr open for longer."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._process.wait(), PATIENCE)
        self._kill()
        await self._process.wait()
        await asyncio.wait((self._errors,), timeout=PATIENCE)
        self._process._transport.close()  # type: ignore[attr-defined]  # the pipes; asyncio has no public way

    async def _deliver(self, answer: Answer) -> None:
        """A slow reader holds up the process, unless another request waits behind its answers."""
        if answer["event"] == "error" and answer.get("kind") == "memory":
            self._end(str(answer.get("message")))
        while (request := self._waiting.get(answer["id"])) and self._is_held_up_by(request):
            self._moved.clear()
            await self._moved.wait()
        if request is not None and not self._death:
            request.answers.append(answer)
            request.came.set()

    def _is_held_up_by(self, request: _Request) -> bool:
        return len(request.answers) >= GATHERED and len(self._waiting) == 1 and not self._death

    def _end(self, why: str) -> None:
        """No more answers will come: tell all who wait the reason, the first that is given."""
        self._death = self._death or f"The inference process ended: {why}. Prompt again: a fresh one starts."
        self._moved.set()
        for request in self._waiting.values():
            request.came.set()

    def _how_it_ended(self) -> str:
        code = self._process.returncode or 0
        lines = self._tail.strip().splitlines()
        said = f", its last line was {lines[-1]!r}" if lines else ""
        if code == -signal.SIGKILL:
            return f"it was killed, perhaps because the machine's memory ran out{said}"
        if code < 0:
            return f"signal {-code} ({signal.strsignal(-code)}){said}"
        return f"exit code {code}{said}"

    async def _keep_errors(self) -> None:
        assert self._process.stderr is not None
        while chunk := await self._process.stderr.read(4096):
            self._tail = "\n".join((self._tail + chunk.decode(errors="replace"))[-8192:].split("\n")[-TAIL:])

    async def stop(self) -> None:
        """Close its stdin, then terminate, then kill."""
        assert self._process.stdin is not None
        self._end("it was stopped")
        for action in (self._process.stdin.close, self._process.terminate, self._kill):
            with suppress(ProcessLookupError):
                action()
            done, _ = await asyncio.wait((self._reader,), timeout=PATIENCE)
            if done:
                return
        self._reader.cancel()
        self._errors.cancel()

    def _kill(self) -> None:
        with suppress(ProcessLookupError):
            self._process.kill()


def _parsed(line: bytes) -> Answer:
    """One answer. Raises ValueError if the line is none."""
    with suppress(ValueError, RecursionError):
        answer = json.loads(line)
        if isinstance(answer, dict) and isinstance(answer.get("id"), int) and isinstance(answer.get("event"), str):
            return answer
    raise ValueError(line[:80].decode(errors="replace").rstrip())
