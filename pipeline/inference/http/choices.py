"""Runs the sequences of a request, cuts their texts at stop strings, and finds calls in them."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Container, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import regex

from pipeline.errors import UserError
from pipeline.inference.batching import BatchedGenerator, GeneratedToken, Generation
from pipeline.inference.http.errors import ApiError
from pipeline.inference.http.tool_calls import Format, parse
from pipeline.inference.requests import FieldError


class TextToken(NamedTuple):
    """A token, and where its text begins in the choice's."""

    token: GeneratedToken
    offset: int


@dataclass(frozen=True)
class Piece:
    """The next part of a choice.

    `finish` is set in its last piece: "stop", "length" or "tool_calls".
    """

    index: int
    text: str
    tokens: Sequence[TextToken]
    finish: str | None = None
    calls: Sequence[dict[str, Any]] = ()


@dataclass
class StoppedText:
    """Text up to the first of some stop strings, which may begin in one token and end in another.

    Text that may turn out to be the beginning of a stop string is held back, and its tokens with
    it.
    """

    stops: Sequence[str]
    _held: str = ""
    _sent: int = 0  # characters before `_held`
    _tokens: list[TextToken] = field(default_factory=list)  # of `_held`

    def add(self, token: GeneratedToken, text: str) -> tuple[str, list[TextToken], bool]:
        """Text and tokens that are certain now, and whether a stop string was met."""
        self._tokens.append(TextToken(token, self._sent + len(self._held)))
        self._held += text
        places = [self._held.find(stop) for stop in self.stops]
        starts = [start for start in places if start >= 0]
        if starts:
            return *self._release(min(starts)), True
        uncertain = max(map(self._overlap, self.stops), default=0)
        return *self._release(len(self._held) - uncertain), False

    def _overlap(self, stop: str) -> int:
        """The length of the longest beginning of `stop` that the text ends with."""
        longest = min(len(stop) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(stop[:n])), 0)

    def rest(self) -> tuple[str, list[TextToken]]:
        """All that is held back, when nothing follows."""
        text, tokens = self._held, self._tokens
        self._held, self._tokens = "", []
        return text, tokens

    def _release(self, length: int) -> tuple[str, list[TextToken]]:
        text, self._held = self._held[:length], self._held[length:]
        self._sent += length
        # A token without text, such as half a character, goes with the text that follows it.
        certain = [token for token in self._tokens if token.offset < self._sent]
        self._tokens = self._tokens[len(certain) :]
        return text, certain


async def generate(
    generator: BatchedGenerator,
    generations: Sequence[Generation],
    new_decoder: Callable[[], Callable[[int], str]],
    stops: Sequence[str],
    count: Callable[[], None],
) -> AsyncGenerator[Piece, None]:
    """Pieces of all choices as they come; `count` is called for each token.

    Everything is submitted before the first piece. A caller that stops early must close it: that
    cancels the rest. Raises what `submit` raises, and what ends a sequence early.
    """
    loop = asyncio.get_running_loop()
    events: asyncio.Queue[tuple[int, GeneratedToken | str | Exception]] = asyncio.Queue()

    def put(index: int, event: GeneratedToken | str | Exception) -> None:
        with suppress(RuntimeError):  # the loop is closed: the server has ended
            loop.call_soon_threadsafe(events.put_nowait, (index, event))

    texts = [StoppedText(stops) for _ in generations]
    decoders = [new_decoder() for _ in generations]
    running = {}
    try:
        for index, generation in enumerate(generations):
            callback = partial(put, index)
            running[index] = generator.submit(generation, callback, callback)
        while running:
            index, event = await events.get()
            if index not in running:  # cancelled after a stop string
                continue
            # a bad request was rejected before, but for grammars: it is the model, or the machine
            if isinstance(event, UserError) and not isinstance(event, FieldError):
                raise ApiError(503, str(event))
            if isinstance(event, Exception):
                raise event
            if event == "cancelled":
                raise ApiError(
                    503,
                    "The server stopped this request: it is shutting down, or unloads the model.",
                )
            if isinstance(event, str):
                del running[index]
                yield Piece(index, *texts[index].rest(), event)
                continue
            count()
            text, tokens, stopped = texts[index].add(event, decoders[index](event.id))
            if stopped:
                running.pop(index).cancel()
            if text or tokens or stopped:
                yield Piece(index, text, tokens, "stop" if stopped else None)
    finally:
        for ticket in running.values():
            ticket.cancel()


async def read_calls(
    pieces: AsyncGenerator[Piece, None], form: Format, names: Container[str], most: int | None
) -> AsyncGenerator[Piece, None]:
    """The pieces without text that may be calls; a choice's last one has the calls, or that text.

    `names` of functions; calls after `most` of them are dropped.
    """
    begins = regex.compile(form.begins)
    read: dict[int, tuple[str, int]] = {}  # a choice's text, and how much of it is sent
    async with aclosing(pieces):
        async for piece in pieces:
            text, sent = read.get(piece.index, ("", 0))
            text += piece.text
            match = begins.search(text, sent, partial=True)
            stop = match.start() if match else len(text)
            calls = parse(form, text[stop:], names)[:most] if piece.finish else []
            if piece.finish and not calls:
                stop = len(text)
            read[piece.index] = text, stop
            finish = "tool_calls" if calls else piece.finish
            yield replace(piece, text=text[sent:stop], finish=finish, calls=calls)
