"""Prompts given to several models at once, and what they answered."""

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

KEPT = 200  # exchanges
LOADING = "loading"  # how an answer stands while its model is brought into memory


class Conversation:
    """The exchanges of this session, the newest last, and what the newest one was asked of."""

    def __init__(self, asker: RequestQueue) -> None:
        self.asker = asker
        self.exchanges: deque[Exchange] = deque(maxlen=KEPT)
        self.sampling = Sampling()
        self.chat = False
        self._entries: list[Entry] = []

    @property
    def newest(self) -> Exchange | None:
        return self.exchanges[-1] if self.exchanges else None

    def begin(self, prompt: str, entries: Sequence[Entry], strength: float) -> Exchange:
        """The exchange that `answers` fills: `strength` is of the adapters among `entries` that scale."""
        answers = [Answer(e.label, strength if e.model.scales else None, ended="waiting") for e in entries]
        self._entries = list(entries)
        self.exchanges.append(Exchange(prompt, self.sampling, answers))
        return self.exchanges[-1]

    async def answers(self, exchange: Exchange) -> AsyncGenerator[int | None, None]:
        """Ask. Yields whenever something is to be shown: the index of an answer that changed, or None for the table.

        What one model refuses is its answer's `error`. Raises UserError if nothing more can be answered; what came
        until then, or until it is cancelled or closed, stays.
        """
        prompt, answers, entries = exchange.prompt, exchange.answers, self._entries
        try:
            for index, (entry, answer) in enumerate(zip(entries, answers, strict=True)):
                if not self.asker.ready(entry):
                    answer.ended = LOADING
                    yield index
                await _or_error(answer, self.asker.load(entry))
                answer.ended = "" if answer.error else "waiting"
                if answer.error:
                    yield index
            exchange.chat = self._chats()
            await self._top_k(prompt, self._able(answers))
            yield None
            for index, (entry, answer) in enumerate(zip(entries, answers, strict=True)):
                if not answer.error:
                    async for _ in self._complete(entry.model.path, answer, exchange):
                        yield index
        except UserError as error:
            _end(answers, "the engine ended" if isinstance(error, EngineDied) else str(error))
            raise
        except (asyncio.CancelledError, GeneratorExit):
            _end(answers, "")
            raise

    def _able(self, answers: Sequence[Answer]) -> dict[Path, Answer]:
        pairs = zip(self._entries, answers, strict=True)
        return {entry.model.path: answer for entry, answer in pairs if not answer.error}

    def _chats(self) -> bool:
        return self.chat and self.asker.has_chat(self._entries)

    async def _top_k(self, prompt: str, able: dict[Path, Answer]) -> None:
        if not able:
            return
        found = await self.asker.top_k(able, prompt, self.sampling, self._chats())
        for path, answer in able.items():
            answer.error = found[path].get("error", "")
            answer.top_k = [(choice["token"], choice["probability"]) for choice in found[path].get("top_k", [])]
            answer.of = found[path].get("of", {})

    async def _complete(self, path: Path, answer: Answer, exchange: Exchange) -> AsyncGenerator[None, None]:
        events = self.asker.complete(path, answer, exchange.prompt, self.sampling, exchange.chat)
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
        """The newest exchange's table with the adapters at another strength. Its record stays as it was asked."""
        if self.newest is None:
            return []
        answers = [replace(a, strength=None if a.strength is None else strength) for a in self.newest.answers]
        for entry, answer in zip(self._entries, answers, strict=True):
            if not answer.error:  # it may have made room for others
                await _or_error(answer, self.asker.load(entry))
        await self._top_k(self.newest.prompt, self._able(answers))
        return answers


def _end(answers: Sequence[Answer], error: str) -> None:
    """Say of those that were not done that they were cut off."""
    for answer in answers:
        if answer.ended in ("waiting", LOADING) and not answer.error:
            answer.ended, answer.error = ("", error) if error else ("interrupted", "")


async def _or_error(answer: Answer, work: Awaitable[object]) -> None:
    try:
        await work
    except EngineDied:
        raise
    except UserError as error:
        answer.error, answer.ended = str(error), ""


class Latest:
    """Runs a job once at a time; wanted again meanwhile, it runs once more after: there is never a queue."""

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
