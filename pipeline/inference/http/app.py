"""OpenAI's HTTP API over the generator: the application that `lora serve` runs."""

import asyncio
import hashlib
import itertools
import re
import secrets
import time
import traceback
import uuid
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing
from typing import Any

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route, Router
from starlette.types import Receive, Scope, Send

from pipeline.errors import UserError, explain, first_line, is_out_of_memory
from pipeline.inference import engine
from pipeline.inference.batching import BatchedGenerator, Busy, Generation, Matcher
from pipeline.inference.engine import LoadedModel
from pipeline.inference.http import requests, tool_calls
from pipeline.inference.http.choices import Piece, generate, read_calls
from pipeline.inference.http.errors import ApiError
from pipeline.inference.http.grammar import compile_grammar, json_rule
from pipeline.inference.http.metrics import CONTENT_TYPE, Metrics
from pipeline.inference.http.models import ServedModels, unknown
from pipeline.inference.http.replies import ChatFormat, Choice, CompletionFormat, Format, Usage
from pipeline.inference.http.requests import ChatRequest, CompletionRequest, parse
from pipeline.inference.model_pool import Resident
from pipeline.inference.requests import FieldError
from pipeline.models.generate import Sampling

# More than the average of any real text. A longer prompt is rejected before it is encoded, which
# takes seconds for 1 MiB.
MAX_TOKEN_CHARACTERS = 32
Ids = tuple[int, ...]


class Json(Response):
    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return msgspec.json.encode(content)


class EventStream:
    """A response of server-sent events. Its events are closed as soon as the client is gone."""

    def __init__(self, events: AsyncGenerator[bytes, None]) -> None:
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
        ]
        async with aclosing(self._events):
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            async for event in self._events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


def as_api_error(error: Exception) -> ApiError:
    """What a client is told of an error. The details of an unexpected one are only printed."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, Busy):
        return ApiError(429, str(error), headers={"Retry-After": "1"})
    if isinstance(error, FieldError):
        return ApiError(400, str(error), error.field)
    if isinstance(error, UserError):
        return ApiError(400, str(error))
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, f"{error.detail}.", headers=error.headers)
    if isinstance(error, RecursionError):
        return ApiError(400, "the body is nested too deeply.")
    if is_out_of_memory(error):
        return ApiError(
            503, f"out of memory ({first_line(error)}). Use a shorter prompt or fewer models."
        )
    if isinstance(error, OSError):
        return ApiError(500, explain(error))
    traceback.print_exception(error)
    return ApiError(500, "internal error: the server's terminal shows the reason.")


def error_response(error: Exception) -> Response:
    known = as_api_error(error)
    return Json(known.body, known.status, known.headers)


class Api:
    """The routes."""

    def __init__(self, generator: BatchedGenerator, models: ServedModels, metrics: Metrics) -> None:
        self._generator, self._models, self._metrics = generator, models, metrics
        # schemas that take seconds must not have all threads
        self._compiling = asyncio.Semaphore(2)

    def router(self) -> Router:
        routes = [
            Route("/health", self.health),
            Route("/metrics", self.metrics),
            Route("/v1/models", self.list_models),
            Route("/v1/models/{name:path}", self.model),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/load_lora_adapter", self.load_adapter, methods=["POST"]),
            Route("/v1/unload_lora_adapter", self.unload_adapter, methods=["POST"]),
        ]
        return Router(routes, redirect_slashes=False)

    async def health(self, _: Request) -> Response:
        return Response()

    async def metrics(self, _: Request) -> Response:
        return Response(self._metrics.render(), media_type=CONTENT_TYPE)

    async def list_models(self, _: Request) -> Response:
        names = await self._models.rescan()
        return Json({"object": "list", "data": [self._models.describe(name) for name in names]})

    async def model(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name not in self._models.sources and name not in await self._models.rescan():
            raise unknown(name, self._models.sources)
        return Json(self._models.describe(name))

    async def load_adapter(self, request: Request) -> Response:
        body = parse(requests.LoadAdapter, await request.body())
        await self._models.load_adapter(body.lora_name, body.lora_path, body.load_inplace)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    async def unload_adapter(self, request: Request) -> Response:
        body = parse(requests.UnloadAdapter, await request.body())
        await self._models.unload_adapter(body.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    async def chat(self, request: Request) -> Response | EventStream:
        return await self._respond(parse(ChatRequest, await request.body()))

    async def completions(self, request: Request) -> Response | EventStream:
        return await self._respond(parse(CompletionRequest, await request.body()))

    async def _respond(self, body: ChatRequest | CompletionRequest) -> Response | EventStream:
        """Generate `n` times for every prompt."""
        start = time.monotonic()
        body.check()
        with self._models.pool.using(body.model):
            resident = await self._models.get(body.model)
            loaded, strength = resident.loaded, _strength(resident, body.strength)
            prompts = await asyncio.to_thread(_encode_prompts, loaded, body)
            calls = tool_calls.format_of(loaded.tokenizer) if body.functions else None
            grammar = None
            if body.must_call or body.schema is not None:
                async with self._compiling:
                    grammar = await asyncio.to_thread(_compile, loaded, body, calls)
            generations = list(_generations(loaded, body, prompts, strength, grammar))
            usage = Usage(sum(map(len, prompts)))
            pieces = self._generate(generations, loaded, body.stops, usage, start)
            if calls:
                pieces = read_calls(
                    pieces, calls, body.functions, None if body.parallel_tool_calls else 1
                )
            first = await anext(pieces)  # an error before it has a status
        self._metrics.prompt_tokens.inc(usage.prompt)
        form = _make_format(loaded, body, prompts)
        envelope = {
            "id": f"{form.prefix}-{uuid.uuid4().hex}",
            "object": form.chunk_object if body.stream else form.object_,
            "created": int(time.time()),
            "model": body.model,
            "system_fingerprint": _fingerprint(resident),
        }
        if body.stream:
            with_usage = body.stream_options is not None and body.stream_options.include_usage
            return EventStream(
                _events(envelope, form, first, pieces, len(generations), usage, with_usage)
            )
        choices = [Choice() for _ in generations]
        choices[first.index].add(first)
        async with aclosing(pieces):
            async for piece in pieces:
                choices[piece.index].add(piece)
        written = [form.choice(index, choice) for index, choice in enumerate(choices)]
        return Json(envelope | {"choices": written, "usage": usage.json()})

    async def _generate(
        self,
        generations: Sequence[Generation],
        loaded: LoadedModel,
        stops: Sequence[str],
        usage: Usage,
        start: float,
    ) -> AsyncGenerator[Piece, None]:
        """The pieces of all choices, counted."""

        def count() -> None:
            if not usage.generated:
                self._metrics.first_token.observe(time.monotonic() - start)
            usage.generated += 1
            self._metrics.generated_tokens.inc()

        pieces = generate(self._generator, generations, loaded.tokenizer.stream, stops, count)
        with self._models.pool.using(generations[0].model):
            async with aclosing(pieces):
                async for piece in pieces:
                    yield piece


def _compile(
    loaded: LoadedModel, body: ChatRequest | CompletionRequest, form: tool_calls.Format | None
) -> Matcher:
    """What the answer must match: the schema, or a call of a function. Raises UserError."""
    if body.must_call and form is None:
        raise FieldError("tool_choice", f": how {loaded.name} writes calls is unknown. Use auto.")
    rules = [] if body.schema is None else [json_rule(body.schema)]
    if form:
        rules.append(tool_calls.rule(form, body.functions, loaded.tokenizer))
    field = "tools" if body.must_call else "response_format"
    return compile_grammar(
        loaded.tokenizer, loaded.model.shape.rows, f"start: {' | '.join(rules)}", field
    )


async def _events(
    envelope: Mapping[str, Any],
    form: Format,
    first: Piece,
    pieces: AsyncGenerator[Piece, None],
    count: int,
    usage: Usage,
    with_usage: bool,
) -> AsyncGenerator[bytes, None]:
    """Server-sent events: chunks, the usage if it is wanted, [DONE]. An error is the last event."""
    base = dict(envelope) | ({"usage": None} if with_usage else {})
    try:
        async with aclosing(pieces):
            for opening in filter(None, map(form.opening, range(count))):
                yield _event(base | {"choices": [opening]})
            yield _event(base | {"choices": [form.chunk(first)]})
            async for piece in pieces:
                yield _event(base | {"choices": [form.chunk(piece)]})
        if with_usage:
            yield _event(base | {"choices": [], "usage": usage.json()})
    except Exception as error:
        yield _event(as_api_error(error).body)
        return
    yield b"data: [DONE]\n\n"


def _event(content: Mapping[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(content) + b"\n\n"


def _generations(
    loaded: LoadedModel,
    body: ChatRequest | CompletionRequest,
    prompts: Sequence[Ids],
    strength: float,
    grammar: Matcher | None,
) -> Iterator[Generation]:
    """Up to the request's limit, or what the context has room for. Raises ApiError."""
    # Another seed for each choice; the only one of a request has the seed that was asked for.
    seeds = itertools.count(secrets.randbits(62) if body.seed is None else body.seed)
    for ids in prompts:
        room = loaded.model.max_length - len(ids)
        if room < 1:
            raise ApiError(
                400,
                f"The prompt has {len(ids)} tokens; {loaded.name} takes "
                f"{loaded.model.max_length}, the answer included. Shorten it.",
                "messages" if isinstance(body, ChatRequest) else "prompt",
                "context_length_exceeded",
            )
        for seed in itertools.islice(seeds, body.n):
            sampling = Sampling(body.temperature, max(body.top_k, 0), body.top_p, seed % 2**63)
            limit = min(body.limit, room)
            yield Generation(body.model, ids, limit, sampling, strength, body.alternatives, grammar)


def _make_format(
    loaded: LoadedModel, body: ChatRequest | CompletionRequest, prompts: Sequence[Ids]
) -> Format:
    word = loaded.tokenizer.word
    if isinstance(body, ChatRequest):
        return ChatFormat(word, body.logprobs)
    echoes: dict[int, str] = {}
    if body.echo:
        for number, (prompt, ids) in enumerate(zip(body.prompts, prompts, strict=True)):
            text = prompt if isinstance(prompt, str) else loaded.tokenizer.decode(ids)
            choices = range(number * body.n, (number + 1) * body.n)
            echoes |= dict.fromkeys(choices, text)
    return CompletionFormat(word, body.logprobs is not None, echoes)


def _encode_prompts(loaded: LoadedModel, body: ChatRequest | CompletionRequest) -> list[Ids]:
    """The ids of each prompt. Raises UserError or ApiError. Runs beside the event loop."""
    if isinstance(body, ChatRequest):
        return [_encode(loaded, _render(loaded, body))]
    return [
        _encode(loaded, prompt) if isinstance(prompt, str) else _checked_ids(loaded, prompt)
        for prompt in body.prompts
    ]


def _render(loaded: LoadedModel, body: ChatRequest) -> str:
    """The conversation in the model's chat template. Raises ApiError or FieldError."""
    tokenizer, name = loaded.tokenizer, loaded.name
    if not tokenizer.has_template:
        raise ApiError(400, f"{name} has no chat template. Use /v1/completions.", "model")
    messages = [message.for_template() for message in body.messages]
    tools = body.tools if body.functions else []
    try:
        text = tokenizer.render(messages, True, tools)
    except UserError as error:  # which names the model by its path
        path = rf"(?<!\S){re.escape(str(loaded.base))}(?=[:.] )"
        raise ApiError(400, re.sub(path, lambda _: name, str(error)), "messages") from None
    if tools and text == tokenizer.render(messages, True):
        raise ApiError(400, f"The chat template of {name} takes no tools. Remove them.", "tools")
    return text


def _encode(loaded: LoadedModel, text: str) -> Ids:
    """The prompt's ids. Raises UserError, and ApiError before it encodes a text that cannot fit."""
    if len(text) > MAX_TOKEN_CHARACTERS * loaded.model.max_length:
        problem = (
            f"The prompt has {len(text)} characters; {loaded.name} takes "
            f"{loaded.model.max_length} tokens."
        )
        raise ApiError(400, problem, code="context_length_exceeded")
    return engine.encode(loaded, text)


def _checked_ids(loaded: LoadedModel, ids: Ids) -> Ids:
    size = len(loaded.tokenizer)
    if not ids or not all(0 <= id_ < size for id_ in ids):
        raise FieldError("prompt", f" must be token ids from 0 to {size - 1}, at least one.")
    return ids


def _strength(resident: Resident, strength: float | None) -> float:
    """The adapter's strength. Raises FieldError for one that has no effect."""
    if strength in (None, 1):
        return 1.0
    name = resident.loaded.name
    if resident.loaded.adapter is None:
        raise FieldError("strength", f": {name} is no adapter. Remove it, or choose one.")
    if resident.strength is None and strength != 0:
        raise FieldError("strength", f": {name} is not scalable. Use 0 or 1.")
    return float(strength or 0)


def _fingerprint(resident: Resident) -> str:
    """A text that changes with the files of base or adapter."""
    files = repr((resident.base.signature, resident.signature))
    return f"fp_{hashlib.sha256(files.encode()).hexdigest()[:12]}"
