"""Generates for many requests on one thread that owns the models."""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch

from pipeline.errors import UserError
from pipeline.inference.model_pool import ModelPool
from pipeline.models.generate import GREEDY, Sampling, draw, finite
from pipeline.models.kernels.decode import fast_decoding

T = TypeVar("T")


class Busy(UserError):
    """Too many requests wait."""


@dataclass(frozen=True)
class Generation:
    """A request: a prompt's ids, and how to go on from it."""

    model: str
    ids: tuple[int, ...]
    limit: int
    sampling: Sampling = GREEDY
    strength: float = 1.0
    top_logprobs: int = 0


class GeneratedToken(NamedTuple):
    """A token, its log probability, and those of the likeliest tokens."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass
class Ticket:
    """A submitted request."""

    _cancelled: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        self._cancelled.set()


class BatchedGenerator:
    """One thread generates, one request after the other."""

    def __init__(self, pool: ModelPool, max_batch: int = 16, max_waiting: int = 256) -> None:
        self._pool, self._most = pool, max_batch + max_waiting
        self._jobs: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self.waiting = self.running = 0
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def submit(
        self,
        generation: Generation,
        on_token: Callable[[GeneratedToken], None],
        on_end: Callable[[str | Exception], None],
    ) -> Ticket:
        if generation.model not in self._pool.names:
            raise UserError(f"{generation.model} is not loaded.")
        if self.waiting >= self._most:
            raise Busy(f"{self.waiting} requests are waiting already. Try again later.")
        ticket = Ticket()
        self.waiting += 1

        def work() -> None:
            self.waiting -= 1
            self.running = 1
            try:
                end: str | Exception = self._generate(generation, on_token, ticket)
            except Exception as error:
                end = error
            self.running = 0
            on_end(end)

        self._jobs.put(work)
        return ticket

    @torch.no_grad()
    def _generate(self, generation: Generation, on_token: Callable[[GeneratedToken], None], ticket: Ticket) -> str:
        loaded = self._pool.get(generation.model).at(generation.strength)
        model, generator = loaded.model, torch.Generator().manual_seed(generation.sampling.seed)
        cache, new = model.new_cache(), torch.tensor([list(generation.ids)], device=model.device)
        with fast_decoding(model):
            for _ in range(min(generation.limit, model.max_length - len(generation.ids))):
                if ticket._cancelled.is_set():
                    return "cancelled"
                logits = finite(model.logits(model.hidden_states(new, cache=cache)[0, -1]).float().cpu())
                token = draw(logits, generation.sampling, generator)
                if token in loaded.tokenizer.end_ids:
                    return "stop"
                logprobs = logits.log_softmax(0)
                values, ids = logprobs.topk(generation.top_logprobs)
                top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
                on_token(GeneratedToken(token, float(logprobs[token]), top))
                new = torch.tensor([[token]], device=model.device)
        return "length"

    def call(self, function: Callable[[ModelPool], T]) -> "Future[T]":
        future: Future[Any] = Future()

        def work() -> None:
            try:
                future.set_result(function(self._pool))
            except BaseException as error:
                future.set_exception(error)

        self._jobs.put(work)
        return future

    def close(self) -> None:
        self._jobs.put(None)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()
