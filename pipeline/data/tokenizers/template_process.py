"""Renders chat templates in a separate process with limited time and memory.

A template is a program written by the model's author, so it may loop forever or fill the memory. The process imports
transformers' Jinja but not torch (0.7 s, once) and answers requests, one JSON line each. It ends with its parent.
"""

import atexit
import json
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RENDER_SECONDS = 5.0  # per request; a real template takes less than a millisecond
START_SECONDS = 120.0  # to import the libraries on a slow and busy machine
MEMORY_BYTES = 512 * 2**20  # in addition to what the process uses when it is ready
MAX_EXTRA_CHARACTERS = 4 * 2**20  # of output, in addition to MAX_COPIES of the conversation
MAX_COPIES = 4
COMMAND = (sys.executable, "-P", str(Path(__file__)))  # imports nothing from this package
ADVICE = "Fix the template, or choose another model."


class TemplateError(Exception):
    """Why a rendering failed; the message continues “its chat template …”."""


@dataclass(frozen=True)
class Conversation:
    """A rendered conversation, and the character spans [start, stop) inside {% generation %}."""

    text: str
    marks: tuple[tuple[int, int], ...]


class Renderer:
    """The rendering process: started on first use, restarted after it was stopped, one request at a time."""

    _process: "subprocess.Popen[bytes] | None"

    def __init__(self) -> None:
        self.forget()

    def render(
        self,
        template: str,
        messages: Sequence[Mapping[str, object]],
        prefixes: Sequence[tuple[int, bool]],
        tokens: Mapping[str, object],
    ) -> list[Conversation | TemplateError]:
        """For each (n, add_generation_prompt) the first n `messages` in a Jinja `template` with the special `tokens`.

        All in one request: the round trip takes 0.1 ms, a short rendering a fifth of that. Raises TemplateError if the
        process had to be stopped.
        """
        request = {"template": template, "messages": messages, "prefixes": prefixes, "tokens": tokens}
        with self._lock:
            answers = self._send_request(json.dumps(request).encode() + b"\n")
        return [
            TemplateError(answer["error"])
            if "error" in answer
            else Conversation(answer["text"], _as_spans(answer["marks"]))
            for answer in answers
        ]

    def _send_request(self, request: bytes) -> list[dict[str, Any]]:
        process = self._ensure_running()
        try:
            answer = self._exchange(process, request)
        except BaseException:  # Ctrl-C too: the next request must not read this one's answer
            self.stop()
            raise
        if answer is None:
            self.stop()
            raise TemplateError(
                f"was stopped: it did not finish within {RENDER_SECONDS:g} seconds and {MEMORY_BYTES // 2**20} MiB of "
                f"memory. {ADVICE}"
            )
        return answer

    def _exchange(self, process: "subprocess.Popen[bytes]", request: bytes) -> list[dict[str, Any]] | None:
        """The process's answer, or None if it ended or was too slow."""
        assert process.stdin is not None
        try:
            process.stdin.write(request)
            process.stdin.flush()
        except BrokenPipeError:
            return None
        line = self._read_line(process, RENDER_SECONDS)
        answers: list[dict[str, Any]] | None = None if line is None else json.loads(line)
        return answers

    def _ensure_running(self) -> "subprocess.Popen[bytes]":
        if self._process is not None and self._process.poll() is None:
            return self._process
        self.stop()
        pipe = subprocess.PIPE
        process = subprocess.Popen(COMMAND, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL)
        self._process = process
        self._rest = b""
        if self._read_line(process, START_SECONDS) is None:
            self.stop()
            raise TemplateError(f"cannot be rendered: `{' '.join(COMMAND)}` does not start. Run it to see the reason.")
        return process

    def _read_line(self, process: "subprocess.Popen[bytes]", seconds: float) -> bytes | None:
        """The next line from the process, or None if it ends or takes longer than `seconds`."""
        assert process.stdout is not None
        pieces, deadline = [self._rest], time.monotonic() + seconds
        poller = select.poll()
        poller.register(process.stdout, select.POLLIN)
        while b"\n" not in pieces[-1]:
            if not poller.poll(max(0, deadline - time.monotonic()) * 1000):
                return None
            piece = os.read(process.stdout.fileno(), 2**20)
            if not piece:
                return None
            pieces.append(piece)
        line, _, self._rest = b"".join(pieces).partition(b"\n")
        return line

    def stop(self) -> None:
        """End the process, if there is one."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            with suppress(BrokenPipeError):  # unread input
                process.communicate()

    def forget(self) -> None:
        """Drop the process without stopping it: a fork must leave its parent's alone and start its own."""
        self._lock = threading.Lock()
        self._process = None
        self._rest = b""  # output read after the last line


def _as_spans(marks: list[list[int]]) -> tuple[tuple[int, int], ...]:
    return tuple((start, stop) for start, stop in marks)


RENDERER = Renderer()
atexit.register(RENDERER.stop)
os.register_at_fork(after_in_child=RENDERER.forget)


def serve() -> None:
    """Answer requests from stdin until it closes."""
    import signal
    import warnings

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    warnings.simplefilter("ignore")
    out = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    sys.stdout = sys.stderr  # keeps library output out of the answers
    from transformers.utils.chat_template_utils import render_jinja_template  # noqa: F401  # before the memory limit

    _bound_memory()
    out.write(b"ready\n")
    out.flush()
    for line in sys.stdin.buffer:
        _bound_time()
        request = json.loads(line)
        answers = [_answer(request, *prefix) for prefix in request["prefixes"]]
        out.write(json.dumps(answers).encode() + b"\n")
        out.flush()


def _answer(request: dict[str, Any], count: int, add_generation_prompt: bool) -> dict[str, Any]:
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        (text,), (marks,) = render_jinja_template(
            conversations=[request["messages"][:count]],
            chat_template=request["template"],
            add_generation_prompt=add_generation_prompt,
            return_assistant_tokens_mask=True,
            **request["tokens"],
        )
    except MemoryError:
        return {"error": f"was stopped: it takes more than {MEMORY_BYTES // 2**20} MiB of memory. {ADVICE}"}
    except RecursionError:
        return {"error": "fails: maximum recursion depth exceeded"}
    except Exception as error:  # whatever the template or the library raises
        return {"error": f"fails: {' '.join(str(error).split())[:200] or type(error).__name__}"}
    limit = MAX_EXTRA_CHARACTERS + MAX_COPIES * sum(len(message["content"]) for message in request["messages"])
    if len(text) > limit:
        return {"error": f"was stopped: it wrote {len(text):,} characters, more than {limit:,}. {ADVICE}"}
    return {"text": text, "marks": marks}


def _bound_memory() -> None:
    """Limit the address space to the current size + MEMORY_BYTES, where the system supports it."""
    try:
        import resource

        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        limit = pages * resource.getpagesize() + MEMORY_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
    except (ImportError, OSError, ValueError):
        pass


def _bound_time() -> None:
    """Limit CPU time per request, for when a killed parent cannot stop this process."""
    try:
        import resource

        hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
        resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time() + RENDER_SECONDS) + 2, hard))
    except (ImportError, OSError, ValueError):
        pass


if __name__ == "__main__":
    serve()
