"""Continuous batching: one forward per token for many requests, whatever their adapters.

A thread owns the models. Between two steps requests join, end and are cancelled. A step reads at
most `Limits.prompt_tokens` of the prompts that have joined, so that a long one does not hold up the
others, and gives every running request a token. Requests begin in the order in which they came.
A model that cannot be computed beside others (virtual tokens, or a forward that does not agree with
the model's own) takes its turns alone, in the same thread.
"""

import threading
from collections import Counter, deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain, compress
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from pipeline.adapters.mixed import MixedAdapter
from pipeline.errors import UserError, first_line, is_out_of_memory
from pipeline.inference.batched_model import BatchedModel, Part
from pipeline.inference.model_pool import ModelPool, Resident, ResidentBase
from pipeline.inference.requests import FieldError
from pipeline.models.device import device_limits, release_workers
from pipeline.models.generate import (
    GREEDY,
    Draw,
    NextToken,
    Sampling,
    cache_room,
    cached_tokens,
    draw,
    finite,
    finite_id,
    next_tokens,
)
from pipeline.models.kernels import uses_cpu_kernels
from pipeline.models.kernels.decode import fast_decoding
from pipeline.models.pages import PAGE, Prefix, SequenceCache

# tokens whose keys and values all running requests may need, where nothing else is said
MAX_TOKENS = 65_536

T = TypeVar("T")


class Busy(UserError):
    """Too many requests are waiting."""


class Matcher(NamedTuple):
    """What may follow in one answer. `field`: of the request, for errors."""

    field: str
    inner: Any  # llguidance.LLMatcher

    def copy(self) -> "Matcher":
        """For another answer, from its beginning."""
        return self._replace(inner=self.inner.deep_copy())

    def mask(self, logits: Tensor) -> Tensor:
        """Logits (V,), -inf for tokens that must not come next. Raises FieldError."""
        allowed = bytearray(self.inner.compute_logit_bias())
        bias = torch.frombuffer(allowed, dtype=torch.uint8, count=len(logits))  # (V,), 0: not
        if self.inner.is_error() or not bias.any():
            problem = " allows no token, or takes too long to follow. Use a simpler schema."
            raise FieldError(self.field, problem)
        return logits.masked_fill(bias == 0, -torch.inf)


@dataclass(frozen=True)
class Generation:
    """A request for up to `limit` tokens after the prompt `ids`."""

    model: str
    ids: tuple[int, ...]
    limit: int
    sampling: Sampling = GREEDY
    strength: float = 1.0  # of the model's adapter
    top_logprobs: int = 0  # alternatives to report with each token
    grammar: Matcher | None = None  # what the answer must match


class GeneratedToken(NamedTuple):
    """A sampled token with its log-probability before temperature and cuts.

    `top`: the likeliest tokens with theirs.
    """

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, eq=False)
class Ticket:
    """A submitted request. The callbacks run on the generator's thread."""

    generation: Generation
    capacity: int  # `cached_tokens` of prompt and answer, at most
    on_token: Callable[[GeneratedToken], None]
    on_end: Callable[[str | Exception], None]
    wake: Callable[[], None]
    cancelled: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        """Stop before the next step; `on_end` then gets "cancelled".

        Without effect on a request that has ended.
        """
        self.cancelled.set()
        self.wake()


@dataclass(eq=False)
class Running:
    """A request that has begun. `batched` is None for one that takes its turns alone."""

    ticket: Ticket
    resident: Resident
    batched: BatchedModel | None
    adapter: MixedAdapter | None
    cache: Any
    ids: list[int]  # prompt and answer
    unread: list[int]  # those that are not in the cache yet: of the prompt, then the last token
    left: int  # tokens to sample
    generator: torch.Generator
    ends: frozenset[int]
    prefix: Prefix | None = None  # where the prefixes of its model begin
    matcher: Matcher | None = None
    started: bool = False  # has a token

    @property
    def tokens_read(self) -> int:
        """Tokens in the cache."""
        return int(self.cache.length if self.batched else self.cache.get_seq_length())

    @property
    def is_plain(self) -> bool:
        """Whether any token may be next, and nothing is asked of the others."""
        return self.matcher is None and not self.ticket.generation.top_logprobs

    @property
    def draw(self) -> Draw:
        return self.ticket.generation.sampling, self.generator

    def remember(self) -> None:
        """Let later requests take over what this one has read."""
        if self.prefix is not None:
            self.cache.remember(self.prefix, self.ids)

    def logits_alone(self) -> Tensor:
        """Of the next token, (1, V); reads the unread tokens."""
        model = self.resident.at(self.ticket.generation.strength).model
        with fast_decoding(model):
            hidden = model.hidden_states(
                torch.tensor([self.unread], device=model.device), cache=self.cache
            )
            return model.logits(hidden[:, -1])


class BatchedGenerator:
    """Runs requests on the models of `pool`, in a thread that owns them: others reach it by `call`.

    Without a thread of its own (`threaded`), requests run when `run_all` is called. `max_batch`:
    requests at once; None: `Limits.sequences`.
    """

    def __init__(
        self,
        pool: ModelPool,
        max_batch: int | None = None,
        max_waiting: int = 256,
        max_tokens: int = MAX_TOKENS,
        threaded: bool = True,
    ) -> None:
        self.max_batch, self.max_waiting, self.max_tokens = max_batch, max_waiting, max_tokens
        self.tokens = 0  # generated since the start
        # forwards by the number of requests that got a token from them
        self.batch_sizes = Counter[int]()
        self.pool = pool
        self._batched: WeakKeyDictionary[ResidentBase, BatchedModel] = WeakKeyDictionary()
        self._changed = threading.Condition()  # guards what other threads write
        self._waiting, self._calls = deque[Ticket](), deque[Callable[[], None]]()
        self._running, self._closed = list[Running](), False
        self._thread = (
            threading.Thread(target=self._run, name="generator", daemon=True) if threaded else None
        )
        if self._thread:
            release_workers()
            self._thread.start()

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def submit(
        self,
        generation: Generation,
        on_token: Callable[[GeneratedToken], None],
        on_end: Callable[[str | Exception], None],
    ) -> Ticket:
        """Queue a request.

        `on_token` gets each token but an end token; `on_end` then gets "stop" (an end token
        was sampled), "length", "cancelled", or the error.

        Raises Busy if `max_waiting` requests wait already, and UserError for a bad request.
        """
        ticket = Ticket(generation, self._capacity(generation), on_token, on_end, self._wake)
        with self._changed:
            if self._closed:
                raise UserError("The server is stopping. Start it again.")
            if len(self._waiting) >= self.max_waiting:
                raise Busy(f"{self.max_waiting} requests are waiting already. Try again later.")
            self._waiting.append(ticket)
            self._changed.notify()
        return ticket

    def _capacity(self, generation: Generation) -> int:
        """`cached_tokens` that it may need. Raises UserError for a bad request."""
        resident, ids, limit = self.pool.loaded(generation.model), generation.ids, generation.limit
        model = resident.loaded.model
        resident.refuse_strength(generation.strength)
        if not 0 <= generation.strength <= 2:
            raise UserError(f"strength must be from 0 to 2, got {generation.strength}.")
        if limit < 0 or generation.top_logprobs < 0:
            raise UserError(
                f"limit and top_logprobs must be at least 0, got {limit} and "
                f"{generation.top_logprobs}."
            )
        if not ids:
            raise UserError("The prompt is empty. Give at least one word.")
        if not 0 <= min(ids) <= max(ids) < model.shape.rows:
            raise UserError(
                f"The prompt has ids from {min(ids)} to {max(ids)}; {generation.model} has "
                f"{model.shape.rows}."
            )
        if len(ids) > model.max_length:
            raise UserError(
                f"The prompt has {len(ids)} tokens; {generation.model} takes {model.max_length}."
            )
        capacity = min(len(ids) + limit, model.max_length)
        if capacity > self.max_tokens:
            raise UserError(
                f"Prompt and answer may take {capacity} tokens; there is memory for "
                f"{self.max_tokens}. Lower the limit."
            )
        return cached_tokens(model, [capacity])

    def call(self, function: Callable[[ModelPool], T]) -> Future[T]:
        """Run `function` on the generator's thread between two steps, such as a load."""
        future = Future[T]()

        def run() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function(self.pool))
                except Exception as error:  # the caller's to handle
                    future.set_exception(error)

        with self._changed:
            if self._closed:
                raise UserError("The server is stopping. Start it again.")
            self._calls.append(run)
            self._changed.notify()
        return future

    def close(self) -> None:
        """Cancel all requests and end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread and threading.current_thread() is not self._thread:
            self._thread.join()

    def fit_to_memory(self) -> None:
        """Set `max_tokens` by the free memory and by the base whose tokens take most of it.

        On the generator's thread, after models came or went: what runs keeps its share.
        """
        for batched in self._batched.values():
            batched.pool.forget()
        held = sum(run.tokens_read for run in self._running)
        self.max_tokens = held + min(
            (cache_room(base.loaded.model) for base in self.pool.bases), default=MAX_TOKENS
        )

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify()

    @torch.no_grad()
    def run_all(self) -> None:
        """Answer the requests that wait, here."""
        while self._waiting or self._running:
            self._turn()

    @torch.no_grad()
    def _run(self) -> None:
        while not self._closed:
            with self._changed:
                while not (self._closed or self._calls or self._waiting or self._running):
                    self._changed.wait()
            while self._calls:
                self._calls.popleft()()
            self._turn()
        for run in self._running:
            run.ticket.cancelled.set()
        for ticket in self._waiting:
            ticket.cancelled.set()
        self._drop_cancelled()
        while self._calls:
            self._calls.popleft()()

    def _turn(self) -> None:
        """A token for every request that there is room for."""
        self._drop_cancelled()
        self._admit()
        self._step()
        if not self._running:
            for batched in self._batched.values():
                batched.forget()

    def _drop_cancelled(self) -> None:
        with self._changed:
            cancelled = [ticket for ticket in self._waiting if ticket.cancelled.is_set()]
            for ticket in cancelled:
                self._waiting.remove(ticket)
        for ticket in cancelled:
            _notify_end(ticket, "cancelled")
        for run in [run for run in self._running if run.ticket.cancelled.is_set()]:
            self._end(run, "cancelled")

    def _admit(self) -> None:
        """Begin the requests that there is room for, in order."""
        while self._waiting and not self._closed:
            ticket = self._waiting[0]
            held = sum(run.ticket.capacity for run in self._running)
            if self._running:
                device = self._running[0].resident.loaded.model.device
                most = self.max_batch or device_limits(device).sequences
                if len(self._running) >= most or held + ticket.capacity > self.max_tokens:
                    return  # none overtakes: a long one would wait for ever
            with self._changed:
                self._waiting.popleft()
            try:
                self._running.append(self._begin(ticket))
            except Exception as error:
                _notify_end(ticket, _reported(error))

    def _begin(self, ticket: Ticket) -> Running:
        generation = ticket.generation
        resident = self.pool.get(generation.model)  # loaded again if its files changed
        self._capacity(generation)  # again: there may be less memory since, or another vocabulary
        base = resident.base
        if base not in self._batched:
            self._batched[base] = BatchedModel(base)
        batched, loaded = self._batched[base], resident.loaded
        together = batched.takes(resident)
        model = loaded.model if together else resident.at(generation.strength).model
        adapter = batched.adapter(resident, generation.strength) if together else None
        prefix, known = None, 0
        if together:
            batched.pool.limit = self.max_tokens // PAGE
            cache = SequenceCache(batched.pool, ticket.capacity)
            prefix = batched.prefixes(resident, generation.strength)
            known = cache.begin(prefix, generation.ids)
        return Running(
            ticket,
            resident,
            batched if together else None,
            adapter,
            cache if together else model.new_cache(),
            [*generation.ids],
            [*generation.ids[known:]],
            min(generation.limit, model.max_length - len(generation.ids)),
            torch.Generator().manual_seed(generation.sampling.seed),
            loaded.tokenizer.end_ids,
            prefix,
            generation.grammar and generation.grammar.copy(),
        )

    def _step(self) -> None:
        """Read the next prompts, then sample a token for every request."""
        for run in [run for run in self._running if run.left <= 0]:
            self._end(run, "length")
        for run in [run for run in self._running if run.batched is None]:
            self._advance({run: len(run.unread)}, run.logits_alone)
        for batched in {run.batched: None for run in self._running if run.batched is not None}:
            # a CPU has kernels for one token of each
            apart = uses_cpu_kernels(batched.model.device)
            for started in (False, True) if apart else (None,):
                self._advance_together(batched, started)

    def _advance_together(self, batched: BatchedModel, started: bool | None) -> None:
        """One forward for all requests that have a token already, or have none; None: for both."""
        room = device_limits(batched.model.device).prompt_tokens
        # those of an adapter side by side
        by_adapter = dict[MixedAdapter | None, dict[Running, int]]()
        for run in self._running:
            count = 1 if run.started else min(len(run.unread), room)
            if run.batched is batched and started in (None, run.started) and count:
                by_adapter.setdefault(run.adapter, {})[run] = count
                room -= 0 if run.started else count
        counts = dict(chain.from_iterable(map(dict.items, by_adapter.values())))
        parts = [Part(run.adapter, run.cache, run.unread[:count]) for run, count in counts.items()]
        if parts:
            self._advance(counts, lambda: batched.logits(parts))

    def _advance(self, counts: Mapping[Running, int], forward: Callable[[], Tensor]) -> None:
        """Sample a token for each request whose unread tokens `forward` reads to the end.

        `counts`: how many it reads.
        """
        try:
            tokens = _choices(counts, forward())
        except Exception as error:
            for run in counts:
                self._end(run, _reported(error))
            return
        self.batch_sizes[len(counts)] += 1
        for (run, count), choice in zip(counts.items(), tokens, strict=True):
            del run.unread[:count]
            if choice is not None:
                self._sample(run, choice)

    def _sample(self, run: Running, choice: NextToken | Tensor | GeneratedToken) -> None:
        """Hand on the next token, and end the request if it was the last."""
        try:
            if isinstance(choice, GeneratedToken):
                token = choice
            elif isinstance(choice, NextToken):
                token = GeneratedToken(finite_id(choice.id), choice.logprob, ())
            else:
                token = _draw_token(run, choice)
            id_ = token.id
            if id_ in run.ends:
                self._end(run, "stop")
                return
            self.tokens += 1
            run.ticket.on_token(token)
        except Exception as error:  # also the callback's: it concerns this request alone
            self._end(run, _reported(error))
            return
        if not run.started:
            run.remember()
        run.started = True
        run.ids.append(id_)
        run.unread = [id_]
        run.left -= 1
        if run.matcher:
            run.matcher.inner.consume_token(id_)
        if run.left == 0:
            self._end(run, "length")

    def _end(self, run: Running, reason: str | Exception) -> None:
        self._running.remove(run)
        if run.batched is not None:
            # an error's numbers are not taken over
            if not isinstance(reason, Exception):
                run.remember()
            run.cache.close()
        _notify_end(run.ticket, reason)


def _choices(counts: Mapping[Running, int], logits: Tensor) -> list[NextToken | Tensor | None]:
    """What decides each request's next token, of logits (N, V); None where some are left to read.

    The token itself; or where that is not enough the logits (V,) on the CPU. The device is read
    once.
    """
    ready = [len(run.unread) <= count for run, count in counts.items()]
    if not all(run.is_plain for run in compress(counts, ready)):
        logits = logits.float().cpu()
    choices: list[NextToken | Tensor | None] = [*logits]
    # a number is taken from a generator only for a token that is used
    draws = [
        run.draw if run.is_plain and is_ready else (GREEDY, run.generator)
        for run, is_ready in zip(counts, ready, strict=True)
    ]
    for n, (run, token) in enumerate(zip(counts, next_tokens(logits, draws), strict=True)):
        if not ready[n]:
            choices[n] = None
        elif run.is_plain:
            choices[n] = token
    return choices


def _draw_token(run: Running, logits: Tensor) -> GeneratedToken:
    """The next token by logits (V,). Raises UserError if they are not finite, and FieldError."""
    generation = run.ticket.generation
    allowed = finite(logits)
    if run.matcher:
        allowed = run.matcher.mask(allowed)
    id_ = int(draw(allowed[None], [run.draw]))
    logprobs = logits.log_softmax(0)
    top = logprobs.topk(min(generation.top_logprobs, len(logprobs)))
    pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return GeneratedToken(id_, float(logprobs[id_]), (*pairs,))


def _notify_end(ticket: Ticket, reason: str | Exception) -> None:
    with suppress(Exception):  # nobody is left to tell
        ticket.on_end(reason)


def _reported(error: Exception) -> Exception:
    """The error, in words for the user where memory ran out."""
    if not is_out_of_memory(error):
        return error
    return UserError(
        f"out of memory ({first_line(error)}). Use fewer or smaller models, or shorter prompts."
    )
