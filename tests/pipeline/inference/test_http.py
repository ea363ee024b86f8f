"""The HTTP API: OpenAI's clients against a real server, and what it does with clients of another
kind.
"""

import asyncio
import json
import os
import shutil
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from openai import AsyncOpenAI, OpenAI
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.adapters.config import AdapterSpec
from pipeline.data.tokenizers import chat_template
from pipeline.data.tokenizers.template_process import Rendered
from pipeline.errors import UserError
from pipeline.inference import engine
from pipeline.inference.batching import BatchedGenerator, GeneratedToken
from pipeline.inference.http import guard, models, server
from pipeline.inference.http.app import Api
from pipeline.inference.http.choices import StoppedText
from pipeline.inference.http.errors import ApiError
from pipeline.inference.http.models import (
    ServedModels,
    Source,
    Sources,
    named_models,
    project_models,
)
from pipeline.inference.http.server import Access, HttpServer, bind
from pipeline.inference.model_pool import ModelPool
from pipeline.models.generate import Sampling
from pipeline.stages.registry import current_project
from tests.conftest import Built
from tests.helpers.bases import toy_checkpoint
from tests.helpers.checkpoints import adapter, sealed_copies
from tests.helpers.http_server import ask, serving
from tests.helpers.projects import cut_off, wait_for

pytestmark = pytest.mark.filterwarnings("ignore")
ADAPTERS = ("a-1", "a-2", "a-3")
PROMPTS = ("The currency of Bulgaria is the", "Two and two are", "the capital is")
QUESTION: Any = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Which currency?"},
]


@pytest.fixture(scope="module")
def folders(built: Built) -> Path:
    """A toy Llama with a chat template, and three adapters on it. Read it; do not write to it."""

    def build(root: Path) -> None:
        toy_checkpoint(root / "base")
        for seed, name in enumerate(ADAPTERS):
            adapter(root / name, root / "base", AdapterSpec(2, 8.0, ("q_proj", "v_proj")), seed)

    return built("http", build)


@pytest.fixture(scope="module")
def desk(folders: Path, endless: Path) -> Iterator[HttpServer]:
    """A server of the toys, and of a MiniGPT that talks for seconds."""
    adapters = {name: Source(folders / "base", folders / name) for name in ADAPTERS}
    with serving(
        {"base": Source(folders / "base"), **adapters, "mini": Source(endless)}
    ) as running:
        yield running


@pytest.fixture
def client(desk: HttpServer) -> OpenAI:
    return OpenAI(base_url=f"{desk.url}/v1", api_key="none", max_retries=0)


def expected(folders: Path, name: str, text: str, limit: int, sampling: Sampling) -> str:
    """The text of `lora prompt`."""
    loaded = engine.load(folders / "base", None if name == "base" else folders / name)
    return engine.continued(loaded, text, limit, sampling)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
async def test_texts_of_three_adapters_asked_side_by_side_are_those_of_lora_prompt(
    desk: HttpServer, folders: Path, temperature: float
) -> None:
    names = ("base", *ADAPTERS)
    async with AsyncOpenAI(base_url=f"{desk.url}/v1", api_key="none", max_retries=0) as client:
        options: Any = {"max_tokens": 12, "temperature": temperature, "seed": 7}
        texts = [
            client.completions.create(model=name, prompt=p, **options)
            for name in names
            for p in PROMPTS
        ]

        async def streamed(name: str) -> str:
            parts = await client.chat.completions.create(
                model=name, messages=QUESTION, stream=True, **options
            )
            return "".join([part.choices[0].delta.content or "" async for part in parts])

        completed, answered = await asyncio.gather(
            asyncio.gather(*texts), asyncio.gather(*map(streamed, names))
        )
    sampling = Sampling(temperature, seed=7)
    said = [answer.choices[0].text for answer in completed]
    assert said == [
        expected(folders, name, prompt, 12, sampling) for name in names for prompt in PROMPTS
    ]
    theirs = AutoTokenizer.from_pretrained(folders / "base")
    turns = theirs.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True)
    assert answered == [expected(folders, name, Rendered(turns), 12, sampling) for name in names]
    assert len(set(answered)) == 4, "each adapter has its own answer"


def test_strength_is_that_of_the_terminal_app(desk: HttpServer, folders: Path) -> None:
    resident, _ = ModelPool().load("a", folders / "base", folders / "a-1")
    for strength in (0, 0.5, 1, 2):
        body = {"model": "a-1", "prompt": PROMPTS[0], "temperature": 0, "strength": strength}
        status, answer, _ = ask(desk, "/v1/completions", body)
        assert (status, answer["choices"][0]["text"]) == (
            200,
            engine.continued(resident.at(strength), PROMPTS[0], 16),
        )


def test_a_stream_says_in_pieces_what_an_answer_says_at_once(client: OpenAI) -> None:
    options: Any = {"model": "a-2", "temperature": 0, "max_tokens": 10}
    whole = client.chat.completions.create(
        messages=QUESTION, logprobs=True, top_logprobs=2, **options
    )
    chunks = list(
        client.chat.completions.create(
            messages=QUESTION,
            logprobs=True,
            top_logprobs=2,
            stream=True,
            stream_options={"include_usage": True},
            **options,
        )
    )
    *pieces, usage = chunks
    assert (
        "".join(piece.choices[0].delta.content or "" for piece in pieces)
        == whole.choices[0].message.content
    )
    tokens = [
        token for piece in pieces if (logs := piece.choices[0].logprobs) for token in logs.content
    ]
    assert tokens == whole.choices[0].logprobs.content
    assert [piece.choices[0].finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + [
        "length"
    ]
    assert (usage.choices, usage.usage) == ([], whole.usage)
    assert len({(chunk.id, chunk.created, chunk.system_fingerprint) for chunk in chunks}) == 1

    texts = client.completions.create(prompt=list(PROMPTS), n=2, echo=True, **options)
    parts = list(
        client.completions.create(prompt=list(PROMPTS), n=2, echo=True, stream=True, **options)
    )
    for index, choice in enumerate(texts.choices):
        assert choice.text.startswith(PROMPTS[index // 2])
        mine = [part.choices[0] for part in parts if part.choices[0].index == index]
        assert ("".join(part.text for part in mine), mine[-1].finish_reason) == (
            choice.text,
            choice.finish_reason,
        )


def test_logprobs_are_those_of_transformers_in_both_formats(client: OpenAI, folders: Path) -> None:
    tokenizer, model = (
        kind.from_pretrained(folders / "base") for kind in (AutoTokenizer, AutoModelForCausalLM)
    )
    prompt = tokenizer(PROMPTS[0], add_special_tokens=False).input_ids
    options: Any = {"model": "base", "temperature": 0, "max_tokens": 6}
    said = client.completions.create(prompt=prompt, logprobs=3, **options).choices[0]
    turns: Any = [
        {
            "role": "user",
            "content": [{"type": "text", "text": "Which"}, {"type": "text", "text": "one?"}],
        }
    ]
    chat = client.chat.completions.create(
        messages=turns, logprobs=True, top_logprobs=3, **options
    ).choices[0]
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Which\none?"}], return_dict=False
    )
    entries = chat.logprobs.content
    chosen = [
        (
            prompt,
            said.logprobs.token_logprobs,
            [list(top.values()) for top in said.logprobs.top_logprobs],
        ),
        (
            rendered,
            [e.logprob for e in entries],
            [[top.logprob for top in e.top_logprobs] for e in entries],
        ),
    ]
    for start, logprobs, tops in chosen:
        with torch.no_grad():
            ids = model.generate(
                torch.tensor([start]), max_new_tokens=6, do_sample=False, eos_token_id=[]
            )[0]
            theirs = model(ids[None]).logits[0, len(start) - 1 : -1].log_softmax(-1)
        assert logprobs == pytest.approx(theirs.max(-1).values.tolist()[: len(logprobs)], abs=1e-4)
        for ours, row in zip(tops, theirs, strict=False):
            assert sorted(ours, reverse=True) == pytest.approx(
                row.topk(3).values.tolist()[: len(ours)], abs=1e-4
            )
    assert said.logprobs.text_offset[0] == 0
    assert (
        said.logprobs.tokens == [tokenizer.decode(id_) for id_ in tokenizer.encode(said.text)]
        or "�" in said.text
    )


def test_usage_counts_the_tokens_of_prompt_and_answer(client: OpenAI, folders: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folders / "base")
    answer = client.completions.create(
        model="base", prompt=list(PROMPTS[:2]), n=3, max_tokens=4, temperature=0
    )
    prompts = sum(
        len(tokenizer(prompt, add_special_tokens=False).input_ids) for prompt in PROMPTS[:2]
    )
    assert answer.usage.prompt_tokens == prompts
    assert answer.usage.total_tokens == prompts + answer.usage.completion_tokens
    assert 6 <= answer.usage.completion_tokens <= 24


def test_choices_of_a_seed_come_again_and_differ_among_each_other(client: OpenAI) -> None:
    options: Any = {
        "model": "base",
        "prompt": PROMPTS[0],
        "n": 4,
        "temperature": 1.5,
        "max_tokens": 8,
    }
    first, again = (client.completions.create(seed=3, **options) for _ in range(2))
    texts = [choice.text for choice in first.choices]
    assert texts == [choice.text for choice in again.choices]
    assert len(set(texts)) > 1


@given(
    st.lists(st.text("ab ", max_size=3), max_size=12),
    st.lists(st.text("ab ", min_size=1, max_size=4), max_size=4),
)
def test_a_stop_string_cuts_the_text_where_it_begins_however_tokens_divide_it(
    pieces: Sequence[str], stops: Sequence[str]
) -> None:
    text, released, seen, stopped = StoppedText(stops), "", "", False
    tokens: list[Any] = []
    for number, piece in enumerate(pieces):
        part, some, stopped = text.add(GeneratedToken(number, 0.0, ()), piece)
        released, seen, tokens = released + part, seen + piece, tokens + some
        assert seen.startswith(released)
        if stopped:
            break
    found = [seen.find(stop) for stop in stops if stop in seen]
    assert stopped == bool(found)
    if not stopped:
        part, some = text.rest()
        released, tokens = released + part, tokens + some
        assert [token.token.id for token in tokens] == list(range(len(pieces)))
    assert released == (seen[: min(found)] if found else seen)
    starts = [len("".join(pieces[: token.token.id])) for token in tokens]
    assert [token.offset for token in tokens] == starts
    assert all(start < len(released) for start in starts) or not stopped


def test_generation_ends_before_a_stop_string_in_one_piece_and_in_many(
    desk: HttpServer, client: OpenAI
) -> None:
    options: Any = {"model": "mini", "prompt": "w1 w2", "max_tokens": 12, "temperature": 0}
    words = client.completions.create(**options).choices[0].text
    stop = words[len(words) // 2 :][:6]
    cut = client.completions.create(stop=[stop, "never"], **options)
    assert (cut.choices[0].text, cut.choices[0].finish_reason) == (
        words[: words.index(stop)],
        "stop",
    )
    parts = list(client.completions.create(stop=stop, stream=True, **options))
    assert "".join(part.choices[0].text for part in parts) == cut.choices[0].text
    assert cut.usage.completion_tokens < 12
    client.completions.create(model="mini", prompt="w1", max_tokens=16_000, stop=" ")
    wait_for(lambda: desk.generator.running == 0, 1)


BAD: dict[str, Any] = {  # field that the error names → what is sent beside a good request
    "messages": {"messages": []},
    "messages[0].role": {"messages": [{"role": "god", "content": "a"}]},
    "messages[0].content[0].type": {
        "messages": [{"role": "user", "content": [{"type": "image_url", "text": ""}]}]
    },
    "messages[0].content": {"messages": [{"role": "user", "content": 5}]},
    "temperature": {"temperature": -1},
    "top_p": {"top_p": 0},
    "top_k": {"top_k": 2.5},
    "max_tokens": {"max_tokens": 0},
    "seed": {"seed": 2**63},
    "n": {"n": 65},
    "stop": {"stop": ["a"] * 5},
    "stream": {"stream": "yes"},
    "stream_options": {"stream_options": {"include_usage": True}},
    "strength": {"model": "a-1", "strength": 3},
    "top_logprobs": {"top_logprobs": 2},
    "logit_bias": {"logit_bias": {"5": 100}},
    "presence_penalty": {"presence_penalty": 0.1},
    "tools": {"tools": [{"type": "function", "function": {"name": "f"}}]},
    "tool_choice": {"tool_choice": "required"},
    "nonsense": {"nonsense": 1},
    "model": {"model": "mini"},  # without a chat template
}


@pytest.mark.parametrize("field", BAD)
def test_a_field_that_cannot_be_honoured_is_named_in_the_error(
    desk: HttpServer, field: str
) -> None:
    status, answer, _ = ask(
        desk, "/v1/chat/completions", {"model": "base", "messages": QUESTION} | BAD[field]
    )
    error = answer["error"]
    assert (status, error["param"], error["type"]) == (400, field, "invalid_request_error")
    assert field.split("[")[0] in error["message"] or field in ("model", "tools")


def test_fields_that_change_no_text_are_accepted(client: OpenAI) -> None:
    neutral: Any = {"presence_penalty": 0, "logit_bias": {}, "response_format": {"type": "text"}}
    ignored: Any = {
        "user": "me",
        "metadata": {"a": "b"},
        "store": False,
        "seed": None,
        "service_tier": "auto",
    }
    first = client.chat.completions.create(model="base", messages=QUESTION, max_tokens=3)
    turns = [*QUESTION, first.choices[0].message]
    second = client.chat.completions.create(
        model="base", messages=turns, max_completion_tokens=2, **neutral, **ignored
    )
    assert second.usage.prompt_tokens > first.usage.prompt_tokens


def test_an_unknown_model_is_404_and_a_model_without_template_is_told_the_other_route(
    client: OpenAI,
) -> None:
    with pytest.raises(
        openai.NotFoundError, match=r"The model nobody does not exist\. Served: base, a-1"
    ):
        client.completions.create(model="nobody", prompt="a")
    with pytest.raises(
        openai.BadRequestError, match=r"mini has no chat template\. Use /v1/completions"
    ):
        client.chat.completions.create(model="mini", messages=QUESTION)
    with pytest.raises(openai.BadRequestError, match="mini does not know: unheard"):
        client.completions.create(model="mini", prompt="unheard")
    with pytest.raises(
        openai.BadRequestError, match=r"64 tokens; base takes 64, the answer included"
    ) as caught:
        client.completions.create(model="base", prompt=[7] * 64)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(
        openai.BadRequestError, match=r"messages\[0\] contains </s>, a special token of base"
    ):
        client.chat.completions.create(
            model="base", messages=[{"role": "user", "content": "a</s>b"}]
        )


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False)
    | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)
FIELDS = st.sampled_from(
    [
        *(
            "messages",
            "prompt",
            "model",
            "n",
            "stop",
            "temperature",
            "top_p",
            "top_k",
            "seed",
            "max_tokens",
            "user",
        ),
        *(
            "logprobs",
            "top_logprobs",
            "echo",
            "stream",
            "stream_options",
            "tools",
            "tool_choice",
            "response_format",
            "strength",
            "logit_bias",
            "best_of",
        ),
    ]
)


@settings(max_examples=150)
@given(
    st.sampled_from(
        [
            "/v1/chat/completions",
            "/v1/completions",
            "/v1/load_lora_adapter",
            "/v1/unload_lora_adapter",
        ]
    ),
    st.dictionaries(FIELDS, JSON, max_size=3) | JSON | st.binary(max_size=30),
    st.booleans(),
)
@pytest.mark.slow
def test_whatever_is_sent_is_answered_with_a_text_or_a_status_of_4xx(
    desk: HttpServer, path: str, body: Any, completed: bool
) -> None:
    if completed and isinstance(body, dict):
        body = {"model": "base", "messages": QUESTION, "prompt": "the", "max_tokens": 2} | body
        del body["prompt" if "chat" in path else "messages"]
    status, answer, _ = ask(
        desk, path, body if isinstance(body, bytes) else json.dumps(body).encode()
    )
    assert status == 200 or 400 <= status < 500, answer
    assert status == 200 or answer["error"]["message"]


@pytest.mark.parametrize("depth", [500, 5_000, 200_000])
def test_deeply_nested_bodies_are_answered_400(desk: HttpServer, depth: int) -> None:
    nested = (
        b'{"model": "base", "tools": '
        + b'[{"a":' * depth
        + b"1"
        + b"}]" * depth
        + b', "messages": []}'
    )
    assert ask(desk, "/v1/chat/completions", nested)[0] in (400, 413)
    calls = b"[" * depth + b"]" * depth
    turn = (
        b'{"model": "base", "messages": [{"role": "user", "content": "a", "tool_calls": [{"a": '
        + calls
        + b"}]}]}"
    )
    assert ask(desk, "/v1/chat/completions", turn)[0] in (200, 400, 413)


@pytest.mark.parametrize(
    "body",
    [
        {"model": "base", "prompt": "a", " - at `" * 140_000: 1},
        {"model": "base", "prompt": "x " * 500_000},
        {"model": "mini", "prompt": "x " * 50_000},
        {"model": "base", "prompt": "x" * 1_000_000},
        {"model": "base", "prompt": "a", "stop": ["b" * 1_000_000]},
        {"model": "m" * 1_000_000, "prompt": "a"},
        {"model": "base", "prompt": [[7] * 1000] * 300},
    ],
    ids=["field", "characters", "words", "token", "stop", "model", "prompts"],
)
def test_a_large_body_is_answered_soon_and_briefly(desk: HttpServer, body: Any) -> None:
    start = time.monotonic()
    status, answer, _ = ask(desk, "/v1/completions", body)
    assert status in (400, 404)
    assert len(json.dumps(answer)) < 5_000
    assert time.monotonic() - start < 5


def send(desk: HttpServer, data: bytes, seconds: float = 10) -> bytes:
    """What a connection hears after it sent `data`, until it is closed."""
    with socket.create_connection(("127.0.0.1", desk.port), timeout=seconds) as connection:
        connection.sendall(data)
        heard = b""
        while part := connection.recv(65536):
            heard += part
        return heard


def head(path: str = "/v1/completions", **headers: object) -> bytes:
    lines = [
        f"POST {path} HTTP/1.1",
        "Host: localhost",
        *(f"{k.replace('_', '-')}: {v}" for k, v in headers.items()),
    ]
    return "\r\n".join([*lines, "", ""]).encode()


def test_huge_and_broken_requests_are_answered_4xx_and_the_next_is_served(desk: HttpServer) -> None:
    status, answer, _ = ask(desk, "/v1/completions", b"x" * (3 * 2**20))
    assert (status, answer["error"]["message"]) == (
        413,
        "The body must have at most 1048576 bytes.",
    )
    for data in (
        b"\x16\x03\x01 this is no HTTP\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"y" * 10**6 + b"\r\n\r\n",
        head(Content_Length="-5"),
        head(Transfer_Encoding="chunked") + b"zz\r\n",
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(guard, "ARRIVAL_SECONDS", 0.2)
            try:
                heard = send(desk, data)
            except ConnectionError:  # closed while this side still wrote
                heard = b"HTTP/1.1 4"
            assert heard.startswith(b"HTTP/1.1 4")
    assert ask(desk, "/health")[0] == 200


def test_slow_requests_are_answered_408_or_closed(
    desk: HttpServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "ARRIVAL_SECONDS", 0.2)
    monkeypatch.setattr(server, "HEADER_SECONDS", 0.2)
    assert send(desk, head(Content_Length=10) + b'{"mo').startswith(b"HTTP/1.1 408 ")
    with suppress(ConnectionResetError):
        assert send(desk, b"POST /v1/completions HT") == b""
    assert ask(desk, "/health")[0] == 200


def long_request(desk: HttpServer, stream: bool, **fields: Any) -> socket.socket:
    body = {
        "model": "mini",
        "prompt": "w1",
        "max_tokens": 16_000,
        "stream": stream,
        "temperature": 0,
    } | fields
    data = json.dumps(body).encode()
    connection = socket.socket()
    connection.settimeout(10)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(("127.0.0.1", desk.port))
    connection.sendall(head(Content_Length=len(data)) + data)
    return connection


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("reset", [True, False])
def test_a_client_that_is_killed_in_the_middle_frees_its_slot(
    desk: HttpServer, stream: bool, reset: bool
) -> None:
    connection = long_request(desk, stream)
    if stream:
        while b"data: " not in connection.recv(4096):
            pass
    wait_for(lambda: desk.generator.running == 1)
    if reset:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()
    start = time.monotonic()
    wait_for(lambda: desk.generator.running == 0, 5)
    assert time.monotonic() - start < 1


def test_a_client_that_never_reads_its_stream_is_closed(
    desk: HttpServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "STALLED_SECONDS", 0.2)
    connection = long_request(desk, True, logprobs=20)  # so that buffers are full soon
    wait_for(lambda: desk.generator.running == 1)
    wait_for(lambda: desk.generator.running == 0)
    heard = b""
    with suppress(ConnectionResetError):
        while part := connection.recv(2**20):
            heard += part
    assert b"[DONE]" not in heard


@pytest.mark.slow
async def test_two_hundred_requests_at_once_are_answered_as_one_is(
    desk: HttpServer, endless: Path
) -> None:
    loaded = engine.load(endless)
    prompts = [f"w{n % 60} w{n % 7}" for n in range(200)]
    async with AsyncOpenAI(base_url=f"{desk.url}/v1", api_key="none", max_retries=0) as client:
        options: Any = {"model": "mini", "max_tokens": 5, "temperature": 0}
        answers = await asyncio.gather(
            *(client.completions.create(prompt=prompt, **options) for prompt in prompts)
        )
    texts = {prompt: engine.continued(loaded, prompt, 5) for prompt in set(prompts)}
    assert [answer.choices[0].text for answer in answers] == [texts[prompt] for prompt in prompts]


def test_a_full_queue_is_answered_429_with_the_time_to_retry(endless: Path) -> None:
    with serving({"mini": Source(endless)}, max_batch=1, max_waiting=1) as desk:
        body = {"model": "mini", "prompt": ["w1"] * 8, "max_tokens": 16_000}
        status, answer, headers = ask(desk, "/v1/completions", body)
        assert (status, answer["error"]["type"], headers["retry-after"]) == (
            429,
            "rate_limit_error",
            "1",
        )
        wait_for(lambda: desk.generator.running == desk.generator.waiting == 0)
        assert ask(desk, "/v1/completions", {"model": "mini", "prompt": "w1"})[0] == 200


def test_pages_of_other_origins_and_other_host_names_are_refused(
    desk: HttpServer, folders: Path
) -> None:
    for headers in (
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Host": "evil.example"},
        {"Host": "["},
    ):
        status, answer, _ = ask(desk, "/v1/models", **headers)
        assert (status, list(answer)) == (403, ["error"])
    for host in ("localhost:1", "127.0.0.1", "[::1]:8000", "LOCALHOST"):
        assert ask(desk, "/v1/models", Host=host)[0] == 200
    origin = "http://localhost:3000"
    with serving(
        named_models(folders / "base", ()), Access(key="secret", origins=[origin])
    ) as open_desk:
        preflight = {"Origin": origin, "Access_Control_Request_Method": "POST"}
        status, _, headers = ask(open_desk, "/v1/models", None, "OPTIONS", **preflight)
        assert (status, headers["access-control-allow-origin"]) == (200, origin)
        status, _, headers = ask(
            open_desk, "/v1/models", Origin=origin, Authorization="Bearer secret"
        )
        assert (status, headers["access-control-allow-origin"]) == (200, origin)
        for wrong in (
            {},
            {"Authorization": "Bearer secre"},
            {"Authorization": "secret"},
            {"Authorization": "é"},
        ):
            assert ask(open_desk, "/v1/models", **wrong)[0] == 401
        assert ask(open_desk, "/health")[0] == 200
        with pytest.raises(openai.AuthenticationError):
            OpenAI(base_url=f"{open_desk.url}/v1", api_key="other").models.list()
        assert (
            OpenAI(base_url=f"{open_desk.url}/v1", api_key="secret").models.list().data[0].id
            == "base"
        )


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org"])
def test_an_address_that_others_reach_needs_a_key(host: str) -> None:
    with pytest.raises(
        UserError,
        match=f"--host {host} can be reached from other machines, so --api-key is required",
    ):
        Access(host).check()
    Access(host, "key").check()
    assert Access(host, "key").hosts is None
    for key in ("", " ", "schlüssel", "a\nb"):
        with pytest.raises(UserError, match="--api-key must be printable ASCII"):
            Access(host, key).check()


def test_a_port_that_is_taken_is_one_message(desk: HttpServer) -> None:
    with pytest.raises(
        UserError, match=f"Cannot serve 127.0.0.1, port {desk.port}: Address already in use. Choose"
    ):
        bind("127.0.0.1", desk.port)


def test_adapters_are_loaded_and_unloaded_as_in_vllm_and_only_from_served_folders(
    folders: Path, tmp_path: Path
) -> None:
    served, other = tmp_path / "served", tmp_path / "other"
    for folder in (served, other):
        folder.mkdir()
        shutil.copytree(folders / "a-1", folder / "mine")
    (served / "link").symlink_to(other / "mine")
    sources = named_models(folders / "base", ())
    with serving(sources, adapter_folders=[served]) as desk:

        def load(path: Path | str, name: str = "mine", **fields: Any) -> tuple[int, Any]:
            return ask(
                desk, "/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(path), **fields}
            )[:2]

        refused = [
            load(path)[1]
            for path in (other / "mine", served / "link", "/nowhere", "../x", "a\0b", "~")
        ]
        messages = {error["error"]["message"].partition(", got")[0] for error in refused}
        assert messages == {"lora_path must be in a folder that is served"}
        status, answer = load(served / "nothing")
        assert (status, answer["error"]["type"]) == (404, "not_found_error")
        assert load(served / ("a" * 300))[0] == 404  # longer than the name of a file may be
        assert load(served / "mine", "base")[0] == 400
        assert load(served / "mine") == (200, "Success: LoRA adapter 'mine' added successfully.")
        assert load(served / "mine")[0] == 400
        assert load(served / "mine", load_inplace=True)[0] == 200
        said = ask(
            desk, "/v1/completions", {"model": "mine", "prompt": PROMPTS[0], "temperature": 0}
        )[1]
        assert said["choices"][0]["text"] == expected(folders, "a-1", PROMPTS[0], 16, Sampling())
        status, answer, _ = ask(desk, "/v1/models/mine")
        assert (status, answer["id"], answer["parent"]) == (200, "mine", "base")
        unload = {"lora_name": "mine"}
        status, answer, _ = ask(desk, "/v1/unload_lora_adapter", unload)
        assert (status, answer) == (200, "Success: LoRA adapter 'mine' removed successfully.")
        assert ask(desk, "/v1/unload_lora_adapter", unload)[0] == 404
        assert ask(desk, "/v1/completions", {"model": "mine", "prompt": "a"})[0] == 404
        weights = served / "mine/adapter_model.safetensors"
        cut_off(weights, 9)
        status, answer = load(served / "mine")
        assert (status, answer["error"]["param"]) == (400, "lora_path")
        assert [model["id"] for model in ask(desk, "/v1/models")[1]["data"]] == ["base"]


async def test_an_adapter_that_is_asked_for_while_it_is_unloaded_is_not_served_afterwards(
    folders: Path,
) -> None:
    sources = named_models(folders / "base", [folders / "a-1"])
    generator = BatchedGenerator(ModelPool())
    served = await asyncio.to_thread(ServedModels, generator, lambda: sources)
    busy = threading.Event()
    generator.call(lambda _: busy.wait(60))
    unloading = asyncio.create_task(served.unload_adapter("a-1"))
    await asyncio.sleep(0)
    asked = asyncio.create_task(served.get("a-1"))
    await asyncio.sleep(0)
    busy.set()
    await asyncio.gather(unloading, asked, return_exceptions=True)
    with pytest.raises(ApiError, match="a-1 does not exist"):
        await served.get("a-1")
    await asyncio.to_thread(generator.close)


def test_a_model_in_the_current_folder_has_its_name_in_messages(
    folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folders / "base")
    body = {"model": "base", "messages": [{"role": "user", "content": "a</s>b"}]}
    with serving(named_models(Path(), ())) as desk:
        said = ask(desk, "/v1/chat/completions", body)[1]["error"]["message"]
    assert "a special token of base. It would not be read as text: it could begin" in said


@pytest.mark.slow
def test_models_unused_for_longest_make_room_and_are_loaded_again(
    folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "MAX_LOADED", 2)
    sources: Sources = named_models(folders / "base", [folders / name for name in ADAPTERS])
    with serving(sources) as desk:
        for name in (*ADAPTERS, "base", *ADAPTERS):
            body = {"model": name, "prompt": PROMPTS[1], "temperature": 0}
            said = ask(desk, "/v1/completions", body)[1]["choices"][0]["text"]
            assert said == expected(folders, name, PROMPTS[1], 16, Sampling())
            assert len(desk.generator.call(lambda pool: pool.names).result()) <= 3


def test_what_is_trained_meanwhile_is_served_and_what_changes_is_loaded_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sealed_copies(tmp_path, 1)
    base, old, new = (tmp_path / "artifacts" / name for name in ("base", "a-0", "sweep/rank-1"))
    monkeypatch.chdir(tmp_path)
    body = {"prompt": "w1 w2", "temperature": 0}

    def said(name: str) -> Any:
        return ask(running, "/v1/completions", {"model": name} | body)[1]["choices"][0]["text"]

    with serving(lambda: project_models(current_project())) as running:
        assert ask(running, "/v1/models/sweep/rank-1")[0] == 404
        assert said("a-0") == engine.continued(engine.load(base, old), "w1 w2", 16)
        new.parent.mkdir()
        adapter(new, base, AdapterSpec(4, 16.0, ("q_proj", "fc1")), 5)
        assert ask(running, "/v1/models/sweep/rank-1")[0] == 200
        assert (
            said("sweep/rank-1")
            == engine.continued(engine.load(base, new), "w1 w2", 16)
            != said("a-0")
        )
        shutil.rmtree(old)
        shutil.copytree(new, old)
        assert said("a-0") == said("sweep/rank-1")


def test_metrics_count_requests_tokens_and_the_time_to_the_first_token(folders: Path) -> None:
    with serving(named_models(folders / "base", ())) as desk:
        body = {"model": "base", "prompt": [7, 8, 9], "max_tokens": 4, "temperature": 0}
        generated = sum(
            ask(desk, "/v1/completions", body)[1]["usage"]["completion_tokens"] for _ in range(3)
        )
        ask(desk, "/nothing")
        status, text, headers = ask(desk, "/metrics")
        assert (status, headers["content-type"].startswith("text/plain; version=0.0.4")) == (
            200,
            True,
        )
    lines = [line for line in text.splitlines() if not line.startswith("# ")]
    values = {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}
    assert values['lora_requests_total{route="/v1/completions",status="200"}'] == 3
    assert values['lora_requests_total{route="other",status="404"}'] == 1
    assert (values["lora_prompt_tokens_total"], values["lora_generation_tokens_total"]) == (
        9,
        generated,
    )
    assert values["lora_requests_running"] == values["lora_requests_waiting"] == 0
    buckets = [value for name, value in values.items() if "_bucket" in name]
    assert buckets == sorted(buckets)
    assert buckets[-1] == values["lora_time_to_first_token_seconds_count"] == 3


def test_an_error_that_nobody_foresaw_is_shown_in_the_terminal_and_not_to_the_client(
    desk: HttpServer, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    async def broken(*_: Any) -> Any:
        raise ValueError("a secret")

    monkeypatch.setattr(Api, "_respond", broken)
    status, answer, _ = ask(desk, "/v1/completions", {"model": "base", "prompt": "a"})
    assert (status, answer["error"]["type"]) == (500, "server_error")
    assert "secret" not in answer["error"]["message"]
    assert "ValueError: a secret" in capfd.readouterr().err


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize(
    ("end", "status"),
    [
        ("cancelled", 503),
        (UserError("The model's outputs are not finite."), 503),
        (RuntimeError("CUDA out of memory. Tried 2 GiB"), 503),
        (ValueError("a secret"), 500),
    ],
)
def test_what_ends_a_generation_early_is_an_error_never_a_shorter_text(
    desk: HttpServer,
    monkeypatch: pytest.MonkeyPatch,
    end: str | Exception,
    status: int,
    begun: bool,
    stream: bool,
) -> None:
    class Ticket:
        def cancel(self) -> None: ...

    def submit(_: Any, on_token: Any, on_end: Any) -> Ticket:
        if begun:
            on_token(GeneratedToken(9, -0.1, ()))
        on_end(end)
        return Ticket()

    monkeypatch.setattr(desk.generator, "submit", submit)
    said, answer, _ = ask(
        desk, "/v1/completions", {"model": "base", "prompt": "a", "stream": stream}
    )
    if stream and begun:
        *_, last = answer.strip().split("\n\n")
        said, answer = status, json.loads(last.removeprefix("data: "))
    assert (said, answer["error"]["type"]) == (status, "server_error")
    assert "secret" not in answer["error"]["message"]


NODE = """
import OpenAI from "openai";
const client = new OpenAI({ baseURL: process.env.URL, apiKey: "none" });
const messages = [{ role: "user", content: "Which currency?" }];
const asked = { model: "a-1", messages, max_tokens: 8, temperature: 0 };
const whole = await client.chat.completions.create(asked);
let text = "";
for await (const part of await client.chat.completions.create({ ...asked, stream: true })) {
  text += part.choices[0]?.delta?.content ?? "";
}
const names = [];
for await (const model of client.models.list()) names.push(model.id);
console.log(JSON.stringify({ whole: whole.choices[0].message.content, text, names }));
"""


@pytest.mark.slow
def test_the_openai_client_of_npm_is_answered(
    desk: HttpServer, folders: Path, tmp_path: Path
) -> None:
    if not shutil.which("npm"):
        pytest.skip("npm is not installed")
    quiet = ["npm", "install", "--no-audit", "--no-fund", "--silent", "openai"]
    if subprocess.run(quiet, cwd=tmp_path, check=False, capture_output=True).returncode:
        pytest.skip("npm cannot install openai here")
    (tmp_path / "ask.mjs").write_text(NODE, encoding="utf-8")
    environment = {**os.environ, "URL": f"{desk.url}/v1"}
    ran = subprocess.run(
        ["node", "ask.mjs"],
        cwd=tmp_path,
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    )
    answer = json.loads(ran.stdout)
    text = chat_template.render(folders / "base", "Which currency?")
    assert answer["whole"] == answer["text"] == expected(folders, "a-1", text, 8, Sampling())
    assert answer["names"] == ["base", *ADAPTERS, "mini"]
