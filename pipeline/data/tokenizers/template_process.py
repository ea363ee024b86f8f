"""Renders chat templates in a process of their own, with limited time and memory.

A template is a program written by the model's author: it may loop forever or fill the memory, and
no thread can be stopped that does. The process imports transformers' Jinja but not torch (0.7 s,
once).
"""

import atexit
import json
import os
import subprocess
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from pipeline.files.worker import Answer, Handle, Worker
    from pipeline.files.worker import Request as Asked

RENDER_SECONDS = 5.0  # per request; a real template takes less than a millisecond
START_SECONDS = 120.0  # to import the libraries on a slow and busy machine
MEMORY_BYTES = 512 * 2**20  # in addition to what the process uses when it is ready
MAX_EXTRA_CHARACTERS = 4 * 2**20  # of output, in addition to MAX_COPIES of the conversation
MAX_COPIES = 4
ADVICE = "Fix the template, or choose another model."


class TemplateError(Exception):
    """Why a rendering failed; the message continues “its chat template …”."""


class Rendered(str):
    """Text written by a chat template. It already has its beginning-of-text token, or should have
    none.

    `marks` are the character spans [start, stop) inside {% generation %}, in order; most templates
    have none.
    """

    marks: tuple[tuple[int, int], ...]

    def __new__(cls, text: str, marks: Iterable[tuple[int, int]] = ()) -> "Rendered":
        rendered = super().__new__(cls, text)
        rendered.marks = tuple((start, stop) for start, stop in marks)
        return rendered


class Conversation(NamedTuple):
    """What to render: the first n `messages` for each (n, add_generation_prompt) of `prefixes`,
    with `tools`.
    """

    messages: Sequence[Mapping[str, object]]
    prefixes: Sequence[tuple[int, bool]]
    tools: Sequence[Mapping[str, object]] = ()


class Renderer:
    """The rendering process: started on first use or before, restarted after it was stopped, one
    request at a time.
    """

    _worker: "Worker | None"
    _unread: "Request | None"  # the request whose answer was not read
    _ready: bool  # whether the process said that it has started

    def __init__(self) -> None:
        self.forget()

    def render(
        self, template: str, conversations: Sequence[Conversation], tokens: Mapping[str, object]
    ) -> "Request":
        """Begin to render `conversations` in a Jinja `template` with the special `tokens`.

        Many in one request, whose answer is read later: the round trip takes 0.1 ms, a short
        rendering a fifth of that, and the caller can work while the process does.
        """
        request = Request(self)
        with self._lock:
            self.read_answer()
            try:
                process = self._ensure_running()
            except TemplateError as error:
                request.error = error
                return request
            fields = {"template": template, "conversations": conversations, "tokens": tokens}
            try:
                process.send("render", **fields)
            except BaseException:  # Ctrl-C too: half a request is in the pipe
                self.stop()
                raise
            self._unread = request
        return request

    def read_answer(self) -> None:
        """Give the request that was sent last its answer, unless it has it."""
        with self._lock:
            if (request := self._unread) is None:
                return
            answer = None
            try:
                answer = self._read(RENDER_SECONDS)
            finally:  # Ctrl-C too: the next request must not read this one's answer
                if answer is None:
                    self.stop()
            self._unread = None
            if answer is not None:
                request.answers = answer["answers"]
                return
            request.error = TemplateError(
                f"was stopped: it did not finish within {RENDER_SECONDS:g} seconds and "
                f"{MEMORY_BYTES // 2**20} MiB of memory. {ADVICE}"
            )

    def start(self) -> None:
        """Start the process, unless there is one. The first request waits until it is ready."""
        if self._worker is not None:  # a request may hold the lock
            return
        with self._lock:
            self._start()

    def _start(self) -> None:
        # imported where something is rendered: most runs render nothing
        from pipeline.files.worker import Worker

        if self._worker is not None and self._worker.process.poll() is None:
            return
        self.stop()
        self._worker, self._ready = Worker(_command(), subprocess.DEVNULL), False
        self._worker.send("start")

    def _ensure_running(self) -> "Worker":
        self._start()
        assert self._worker is not None
        self._ready = self._ready or self._read(START_SECONDS) is not None
        if not self._ready:
            self.stop()
            raise TemplateError(
                f"cannot be rendered: `{' '.join(_command())}` does not start. Run it to see the reason."
            )
        return self._worker

    def _read(self, seconds: float) -> "Answer | None":
        """The next answer; None if the process ends or takes longer than `seconds`."""
        with suppress(EOFError, TimeoutError):
            return self._worker.read(seconds)[0] if self._worker else None
        return None

    def stop(self) -> None:
        """End the process, if there is one."""
        process, self._worker = self._worker, None
        self._unread = None
        if process is not None:
            process.kill()

    def forget(self) -> None:
        """Drop the process without stopping it: a fork must leave its parent's alone and start its
        own.
        """
        self._lock = threading.RLock()
        self._worker = None
        self._unread = None
        self._ready = False


class Request:
    """A request that was sent to the rendering process."""

    answers: Sequence[Sequence[Mapping[str, Any]]] | None = None
    error: TemplateError | None = None

    def __init__(self, renderer: Renderer) -> None:
        self._renderer = renderer

    def answer(self) -> list[list[Rendered | TemplateError]]:
        """A rendering, or why it failed, for each prefix of each conversation.

        Raises TemplateError if the process had to be stopped.
        """
        if self.answers is None and self.error is None:
            self._renderer.read_answer()
        if self.answers is None:
            raise self.error or TemplateError(f"was stopped with its process. {ADVICE}")
        return [_renderings(answers) for answers in self.answers]


def _renderings(answers: Sequence[Mapping[str, Any]]) -> list[Rendered | TemplateError]:
    """The renderings of a conversation; one that is a beginning of the first came as its length."""
    first = _first_text(answers)
    renderings = list[Rendered | TemplateError]()
    for answer in answers:
        if "error" in answer:
            renderings.append(TemplateError(answer["error"]))
            continue
        text = first[: answer["length"]] if "length" in answer else answer["text"]
        renderings.append(Rendered(text, answer["marks"]))
    return renderings


def _first_text(answers: Sequence[Mapping[str, Any]]) -> str:
    text: str = answers[0].get("text", "") if answers else ""
    return text


def _command() -> tuple[str, ...]:
    from pipeline.files.worker import python_module

    return python_module("pipeline.data.tokenizers.template_process")


RENDERER = Renderer()
atexit.register(RENDERER.stop)
os.register_at_fork(after_in_child=RENDERER.forget)


# In the rendering process


def main() -> None:
    import warnings

    from pipeline.files.worker import serve

    warnings.simplefilter("ignore")
    serve(_start, most_bytes=-1)


def _start() -> "Handle":
    # Imported before the limit counts, which is on what a template adds to the size of the address
    # space.
    from transformers.utils.chat_template_utils import render_jinja_template  # noqa: F401

    return _handle


def _handle(request: "Asked") -> "Iterator[Answer]":
    from pipeline.files.worker import limit, limit_memory

    if request.do == "start":
        limit_memory(MEMORY_BYTES)
        yield {"event": "done"}
        return
    # The parent stops what takes too long. Of CPU time there is a limit too, in case the parent
    # itself is killed.
    limit("RLIMIT_CPU", int(time.process_time() + RENDER_SECONDS) + 2)
    given = request.fields["template"], request.fields["tokens"]
    answers = []
    for messages, prefixes, tools in request.fields["conversations"]:
        rendered = [_answer(*given, messages, tools, *prefix) for prefix in prefixes]
        answers.append(_shortened(rendered))
    yield {"event": "done", "answers": answers}


def _shortened(answers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The answers. Texts that the first text begins with, as most prompts, are sent as lengths."""
    first = _first_text(answers)
    for answer in answers[1:]:
        if "text" in answer and first.startswith(answer["text"]):
            answer["length"] = len(answer.pop("text"))
    return answers


def _answer(
    template: str,
    tokens: dict[str, Any],
    messages: list[Any],
    tools: list[Any],
    count: int,
    ask: bool,
) -> dict[str, Any]:
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        (text,), (marks,) = render_jinja_template(
            conversations=[messages[:count]],
            tools=tools or None,
            chat_template=template,
            add_generation_prompt=ask,
            return_assistant_tokens_mask=True,
            **tokens,
        )
    except MemoryError:
        return {
            "error": (
                f"was stopped: it takes more than {MEMORY_BYTES // 2**20} MiB of memory. {ADVICE}"
            )
        }
    except RecursionError:
        return {"error": "fails: maximum recursion depth exceeded"}
    except Exception as error:  # whatever the template or the library raises
        return {"error": f"fails: {' '.join(str(error).split())[:200] or type(error).__name__}"}
    if len(text) > MAX_EXTRA_CHARACTERS:
        limit = MAX_EXTRA_CHARACTERS + MAX_COPIES * len(json.dumps([messages, tools]))
        if len(text) > limit:
            return {
                "error": (
                    f"was stopped: it wrote {len(text):,} characters, more than {limit:,}. {ADVICE}"
                )
            }
    return {"text": text, "marks": marks}


if __name__ == "__main__":
    main()
