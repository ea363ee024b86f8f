"""Prompts sent to several models at once, and their answers."""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

from pipeline.errors import UserError
from tui.screens.adapters.session.catalog import Entry
from tui.screens.adapters.session.request_queue import RequestQueue
from tui.screens.adapters.session.sampling import Sampling
from tui.screens.adapters.session.transcript import Answer, Exchange
from tui.services.engine_client import EngineDied

MAX_EXCHANGES = 200
LOADING = "loading"  # state of an answer while its model is loaded


class Conversation:
    """The exchanges of this session, the newest last, and the models of the newest one."""

    def __init__(self, requests: RequestQueue) -> None:
        self.requests = requests
        self.exchanges: deque[Exchange] = deque(maxlen=MAX_EXCHANGES)
        self.sampling = Sampling()
        self.chat = False
        self._entries: list[Entry] = []

    @property
    def newest(self) -> Exchange | None:
        return self.exchanges[-1] if self.exchanges else None

    def begin(self, prompt: str, entries: Sequence[Entry], strength: float) -> Exchange:
        """Append an exchange for `answers` to fill. `strength` applies to adapters that can be scaled."""
        answers = [Answer(e.label, strength if e.model.scales else None, ended="waiting") for e in entries]
        self._entries = list(entries)
        self.exchanges.append(Exchange(prompt, self.sampling, answers))
        return self.exchanges[-1]

    async def answers(self, exchange: Exchange) -> AsyncGenerator[int | None, None]:
        """Prompt the models. Yields the index of every answer that changed, or None for the top-k table.

        If one model fails, the reason is its answer's `error`. Raises UserError if no model can continue. Text that
        arrived before that, or before the generator was cancelled or closed, stays.
        """
        prompt, answers, entries = exchange.prompt, exchange.answers, self._entries
        try:
            for index, (entry, answer) in enumerate(zip(entries, answers, strict=True)):
                if not self.requests.is_loaded(entry):
                    answer.ended = LOADING
                    yield index
                await _store_error(answer, self.requests.load(entry))
                answer.ended = "" if answer.error else "waiting"
                if answer.error:
                    yield index
            exchange.chat = self._uses_chat_template()
            await self._top_k(prompt, self._without_errors(answers))
            yield None
            for index, (entry, answer) in enumerate(zip(entries, answers, strict=True)):
                if not answer.error:
                    async for _ in self._complete(entry.model.path, answer, exchange):
                        yield index
        except UserError as error:
            _mark_unfinished(answers, "the engine ended" if isinstance(error, EngineDied) else str(error))
            raise
        except (asyncio.CancelledError, GeneratorExit):
            _mark_unfinished(answers, "")
            raise

    def _without_errors(self, answers: Sequence[Answer]) -> dict[Path, Answer]:
        pairs = zip(self._entries, answers, strict=True)
        return {entry.model.path: answer for entry, answer in pairs if not answer.error}

    def _uses_chat_template(self) -> bool:
        return self.chat and self.requests.has_chat(self._entries)

    async def _top_k(self, prompt: str, models: dict[Path, Answer]) -> None:
        if not models:
            return
        result = await self.requests.top_k(models, prompt, self.sampling, self._uses_chat_template())
        for path, answer in models.items():
            answer.error = result[path].get("error", "")
            answer.top_k = [(choice["token"], choice["probability"]) for choice in result[path].get("top_k", [])]
            answer.of = result[path].get("of", {})

    async def _complete(self, path: Path, answer: Answer, exchange: Exchange) -> AsyncGenerator[None, None]:
        events = self.requests.complete(path, answer, exchange.prompt, self.sampling, exchange.chat)
        try:
            async with aclosing(events):
                async for event in events:
                    answer.text += event["text"] if event["event"] == "token" else ""
                    answer.ended = event.get("reason", answer.ended)
                    yield
        except EngineDied:
            raise
        except UserError as error:
            answer.error, answer.ended = str(error), ""
            yield

    async def probe(self, strength: float) -> list[Answer]:
        """The newest exchange's top-k table at another strength. The exchange itself is not changed."""
        if self.newest is None:
            return []
        answers = [replace(a, strength=None if a.strength is None else strength) for a in self.newest.answers]
        for entry, answer in zip(self._entries, answers, strict=True):
            if not answer.error:  # it may have been evicted
                await _store_error(answer, self.requests.load(entry))
        await self._top_k(self.newest.prompt, self._without_errors(answers))
        return answers


def _mark_unfinished(answers: Sequence[Answer], error: str) -> None:
    """Mark unfinished answers with the error, or as interrupted."""
    for answer in answers:
        if answer.ended in ("waiting", LOADING) and not answer.error:
            answer.ended, answer.error = ("", error) if error else ("interrupted", "")


async def _store_error(answer: Answer, work: Awaitable[object]) -> None:
    try:
        await work
    except EngineDied:
        raise
    except UserError as error:
        answer.error, answer.ended = str(error), ""


class Latest:
    """Runs a job one at a time. Any number of requests during a run cause a single further run."""

    def __init__(self, job: Callable[[], Awaitable[None]]) -> None:
        self._job = job
        self._running = self._again = False

    async def run(self) -> None:
        self._again = True
        if self._running:
            return
        self._running = True
        try:
            while self._again:
                self._again = False
                await self._job()
        finally:
            self._running = False
