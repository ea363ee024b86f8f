"""Chat templates rendered in a process of their own: one that never ends or fills the memory is stopped.

A template is a program of whoever made the model. The process imports transformers' Jinja, not torch (0.7 s, once), and
answers requests, one JSON line each; it is bound in memory and in time by the system. It ends with its parent.
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

SECONDS = 5.0  # for one rendering; a real template takes less than a millisecond
START = 120.0  # seconds for the process to import its libraries, on a slow and busy machine
MEMORY = 512 * 2**20  # bytes, beside what the process has when it is ready
LARGEST = 4 * 2**20  # characters that a template may write beside a few copies of the conversation
COPIES = 4
COMMAND = (sys.executable, "-P", str(Path(__file__)))  # it needs nothing of this package
ELSE = "Correct the template, or choose a model with another."


class TemplateError(Exception):
    """What a template did instead of writing a conversation, to be read after “its chat template”."""


@dataclass(frozen=True)
class Conversation:
    """What a template wrote, and the characters [start, stop) that it marks as the model's own."""

    text: str
    marks: tuple[tuple[int, int], ...]


class Renderer:
    """The process, started when it is first needed and again after it was stopped. One request at a time."""

    _process: "subprocess.Popen[bytes] | None"

    def __init__(self) -> None:
        self.forget()

    def render(
        self,
        template: str,
        messages: Sequence[Mapping[str, object]],
        asked: Sequence[tuple[int, bool]],
        tokens: Mapping[str, object],
    ) -> list[Conversation | TemplateError]:
        """For each (n, reply) the first n of `messages` in a Jinja `template` that may read the special `tokens`.

        One request, since the way to the process and back takes 0.1 ms, and a short rendering a fifth of that. Raises
        TemplateError where the process was stopped.
        """
        request = {"template": template, "messages": messages, "asked": asked, "tokens": tokens}
        with self._lock:
            answers = self._asked(json.dumps(request).encode() + b"\n")
        return [
            TemplateError(answer["error"])
            if "error" in answer
            else Conversation(answer["text"], _pairs(answer["marks"]))
            for answer in answers
        ]

    def _asked(self, request: bytes) -> list[dict[str, Any]]:
        process = self._running()
        try:
            answer = self._answer(process, request)
        except BaseException:  # the user's Ctrl-C too: the next request must not read this one's answer
            self.stop()
            raise
        if answer is None:
            self.stop()
            raise TemplateError(
                f"was stopped: it did not end within {SECONDS:g} seconds and {MEMORY // 2**20} MiB of memory. {ELSE}"
            )
        return answer

    def _answer(self, process: "subprocess.Popen[bytes]", request: bytes) -> list[dict[str, Any]] | None:
        """None where the process ended or was too slow."""
        assert process.stdin is not None
        try:
            process.stdin.write(request)
            process.stdin.flush()
        except BrokenPipeError:
            return None
        line = self._line(process, SECONDS)
        answers: list[dict[str, Any]] | None = None if line is None else json.loads(line)
        return answers

    def _running(self) -> "subprocess.Popen[bytes]":
        if self._process is not None and self._process.poll() is None:
            return self._process
        self.stop()
        pipe = subprocess.PIPE
        process = subprocess.Popen(COMMAND, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL)
        self._process = process
        self._rest = b""
        if self._line(process, START) is None:
            self.stop()
            raise TemplateError(f"cannot be rendered: `{' '.join(COMMAND)}` does not start. Run it to see why.")
        return process

    def _line(self, process: "subprocess.Popen[bytes]", seconds: float) -> bytes | None:
        """The next line that the process writes; None if it ends, or writes none in time."""
        assert process.stdout is not None
        pieces, until = [self._rest], time.monotonic() + seconds
        waiting = select.poll()
        waiting.register(process.stdout, select.POLLIN)
        while b"\n" not in pieces[-1]:
            if not waiting.poll(max(0, until - time.monotonic()) * 1000):
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
            with suppress(BrokenPipeError):  # what it did not read
                process.communicate()

    def forget(self) -> None:
        """Without a process. A fork leaves that of its parent alone, and starts its own."""
        self._lock = threading.Lock()
        self._process = None
        self._rest = b""  # what it wrote after its last answer: nothing


def _pairs(marks: list[list[int]]) -> tuple[tuple[int, int], ...]:
    return tuple((start, stop) for start, stop in marks)


RENDERER = Renderer()
atexit.register(RENDERER.stop)
os.register_at_fork(after_in_child=RENDERER.forget)


def serve() -> None:
    """Answer requests from stdin until it is closed."""
    import signal
    import warnings

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal; the parent decides
    warnings.simplefilter("ignore")
    out = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    sys.stdout = sys.stderr  # what a library prints is no answer
    from transformers.utils.chat_template_utils import render_jinja_template  # noqa: F401  # before memory is bounded

    _bound_memory()
    out.write(b"ready\n")
    out.flush()
    for line in sys.stdin.buffer:
        _bound_time()
        request = json.loads(line)
        answers = [_answer(request, count, reply) for count, reply in request["asked"]]
        out.write(json.dumps(answers).encode() + b"\n")
        out.flush()


def _answer(request: dict[str, Any], count: int, reply: bool) -> dict[str, Any]:
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        (text,), (marks,) = render_jinja_template(
            conversations=[request["messages"][:count]],
            chat_template=request["template"],
            add_generation_prompt=reply,
            return_assistant_tokens_mask=True,
            **request["tokens"],
        )
    except MemoryError:
        return {"error": f"was stopped: it takes more than {MEMORY // 2**20} MiB of memory. {ELSE}"}
    except RecursionError:
        return {"error": "fails: it calls itself without end"}
    except Exception as error:  # whatever a template or the library raises
        return {"error": f"fails: {' '.join(str(error).split())[:200] or type(error).__name__}"}
    most = LARGEST + COPIES * sum(len(message["content"]) for message in request["messages"])
    if len(text) > most:
        return {"error": f"was stopped: it wrote {len(text):,} characters, more than {most:,}. {ELSE}"}
    return {"text": text, "marks": marks}


def _bound_memory() -> None:
    """Address space: what there is now and MEMORY. A system without such a limit has the others."""
    try:
        import resource

        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        limit = pages * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
    except (ImportError, OSError, ValueError):
        pass


def _bound_time() -> None:
    """CPU seconds until the system ends this process: a parent that was killed stops nobody."""
    try:
        import resource

        hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
        resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time() + SECONDS) + 2, hard))
    except (ImportError, OSError, ValueError):
        pass


if __name__ == "__main__":
    serve()
