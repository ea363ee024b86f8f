"""Clients of another kind: HTTP requests to `lora serve`, lines to the inference process."""

import json
import queue
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from pipeline.adapters.config import AdapterSpec
from pipeline.inference.handlers import RequestHandler
from pipeline.inference.http.models import Source
from pipeline.inference.http.server import HttpServer
from tests.conftest import Built
from tests.helpers.bases import toy_checkpoint
from tests.helpers.checkpoints import adapter, checkpoint
from tests.helpers.fuzz import (
    NUMBERS,
    ODD,
    as_json,
    changed,
    damaged,
    fuzz,
    json_files,
    limits,
    read_or_refuse,
)
from tests.helpers.http_server import ask, serving
from tests.helpers.projects import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        **{
            "model": "base",
            "max_tokens": 2,
            "temperature": 0.5,
            "top_p": 0.9,
            "top_k": 4,
            "n": 2,
            "seed": 7,
        },
        **{
            "stop": ["x", "yy"],
            "logprobs": True,
            "top_logprobs": 2,
            "stream": False,
            "tool_choice": "auto",
        },
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "Which"}]},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}],
            },
            {"role": "tool", "content": "1", "tool_call_id": "c"},
        ],
        "response_format": {"type": "text"},
    },
    "/v1/completions": {
        **{
            "model": "a",
            "prompt": ["the", "Two and"],
            "max_tokens": 2,
            "temperature": 0,
            "strength": 0.5,
        },
        **{
            "stream": True,
            "stream_options": {"include_usage": True},
            "echo": False,
            "logprobs": 1,
            "logit_bias": {},
        },
    },
    "/v1/load_lora_adapter": {"lora_name": "b", "lora_path": "nowhere", "load_inplace": True},
    "/v1/unload_lora_adapter": {"lora_name": "b", "lora_int_id": 1},
}
VALUES = st.one_of(ODD, st.sampled_from((*NUMBERS, "base", [[1, 2], [3]], [5, 9], 2**31 - 1)))


@pytest.fixture(scope="module")
def folders(built: Built) -> Path:
    """A toy Llama and an adapter on it, and a MiniGPT. Read it; do not write to it."""

    def build(root: Path) -> None:
        toy_checkpoint(root / "base")
        adapter(root / "a", root / "base", AdapterSpec(2, 8.0, ("q_proj",)))
        checkpoint(root / "mini", d_model=16)

    return built("fuzz-requests", build)


@pytest.fixture(scope="module")
def desk(folders: Path) -> Iterator[HttpServer]:
    sources = {"base": Source(folders / "base"), "a": Source(folders / "base", folders / "a")}
    with serving(sources) as running:
        for path in BODIES:
            # loads what is loaded once, and starts the process of templates
            ask(running, path, BODIES[path])
        yield running


@fuzz(
    "HTTP bodies",
    drawn=st.sampled_from(sorted(BODIES)).flatmap(
        lambda path: st.tuples(st.just(path), json_files(BODIES[path], VALUES))
    ),
)
def test_bodies(folder: Path, desk: HttpServer, drawn: tuple[str, bytes]) -> None:
    path, body = drawn
    with limits(folder, may=["socket.connect", "subprocess.Popen"]):
        status, answer, headers = ask(desk, path, body)
    assert status == 200 or 400 <= status < 500, answer
    if status != 200:
        message = answer["error"]["message"]
        assert message and len(message) <= 2_000 and headers["content-type"] == "application/json"
    assert ask(desk, "/health")[0] == 200


BODY = as_json({"model": "base", "prompt": "the", "max_tokens": 1})
HEADERS: dict[str, str] = {
    **{"Host": "127.0.0.1", "Content-Type": "application/json", "Content-Length": str(len(BODY))},
    **{"Origin": "", "Authorization": "Bearer x", "Connection": "close"},
}
ODD_HEADERS = st.sampled_from(
    (
        *(
            "",
            "-1",
            "1e9",
            "99999999999999999999",
            "chunked",
            "chunked, chunked",
            "gzip",
            "localhost:99999",
            "[::1",
        ),
        *(
            "evil.example",
            "http://evil.example",
            "null",
            "\x80",
            "a" * 40_000,
            "100-continue",
            "websocket",
            "keep-alive",
        ),
    )
)
PATHS = st.sampled_from(
    (
        *(
            "/v1/completions",
            "/v1/completions/",
            "/v1/models/../../etc/passwd",
            "/v1/models/%2e%2e/%00",
            "/",
            "//",
            "*",
        ),
        *(
            "/v1/models/" + "a" * 20_000,
            "/metrics",
            "/health?x=" + "%ff" * 50,
            "http://evil.example/v1/models",
            "\x00",
        ),
    )
)
METHODS = st.sampled_from(
    ("GET", "POST", "PUT", "HEAD", "OPTIONS", "TRACE", "CONNECT", "PRI", "get", "", "A" * 500)
)


@st.composite
def heads(draw: st.DrawFn) -> bytes:
    headers = dict(HEADERS)
    del headers["Origin"]
    for _ in range(draw(st.integers(0, 2))):
        name = draw(
            st.sampled_from((*HEADERS, "Transfer-Encoding", "Expect", "Upgrade", "X" * 300))
            | st.text(max_size=5)
        )
        headers[name] = draw(ODD_HEADERS)
    lines = [
        f"{draw(METHODS)} {draw(PATHS)} HTTP/{draw(st.sampled_from(('1.1', '1.0', '2.0', '')))}"
    ]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    whole = "\r\n".join([*lines, "", ""]).encode("utf-8", "surrogatepass") + BODY
    return draw(st.just(whole) | damaged(whole))


@fuzz("HTTP heads", data=heads())
def test_heads(folder: Path, desk: HttpServer, data: bytes) -> None:
    heard = b""
    with (
        limits(folder, may=["socket.connect"]),
        socket.create_connection(("127.0.0.1", desk.port)) as connection,
        suppress(ConnectionError),  # closed while this side still wrote
    ):
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)  # no more is to come: nobody waits for the rest
        while part := connection.recv(65_536):
            heard += part
    assert heard == b"" or heard.startswith((b"HTTP/1.1 2", b"HTTP/1.1 4", b"HTTP/1.1 1")), heard[
        :300
    ]
    assert ask(desk, "/health")[0] == 200


REQUESTS: list[dict[str, Any]] = [
    {"do": "load", "name": "b", "base": "base", "adapter": None, "trust_remote_code": False},
    {"do": "unload", "name": "b"},
    {
        "do": "generate",
        "model": "mini",
        "text": "w1 w2",
        "limit": 2,
        "temperature": 0.7,
        "top_k": 3,
        "top_p": 0.9,
        "seed": 1,
    },
    {
        "do": "generate",
        "model": "mini",
        "messages": [{"role": "user", "content": "w1"}],
        "limit": 1,
        "chat": False,
    },
    {"do": "top_k", "models": ["mini"], "text": "w1 w2", "k": 3, "strength": {"mini": 1}},
    {"do": "spectrum", "adapter": "a", "base": "base"},
    {"do": "status"},
]


@fuzz(
    "requests in JSON lines",
    fields=st.sampled_from(REQUESTS).flatmap(lambda one: changed(one, VALUES)),
)
def test_requests(folder: Path, handler: RequestHandler, fields: Any) -> None:
    fields = fields if isinstance(fields, dict) else {"do": fields}

    def answer() -> None:
        with suppress(OSError):  # the server answers with its text
            json.dumps(list(handler.answer(fields.get("do"), fields))).encode()

    read_or_refuse(answer, folder)
    handler.models.load("mini", handler.mini, None)  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def handler(folders: Path) -> RequestHandler:
    made = RequestHandler()
    made.mini = folders / "mini"  # type: ignore[attr-defined]
    made.models.load("mini", folders / "mini", None)
    return made


def test_whatever_line_comes_the_process_answers_and_goes_on() -> None:
    """The same process hears all of them; each line has an answer, and the last one's is right."""
    lines = [
        as_json({"id": n, **one})[:cut] for n, one in enumerate(REQUESTS, 1) for cut in (5, 17, -1)
    ]
    lines += [
        b"\xff\xfe",
        b"[]",
        b"1e400",
        b"[" * 100_000,
        b'{"id": 1e9, "do": 1}',
        b'{"id": true}',
        b"x" * 2**21,
        b"\0",
    ]
    lines += [
        b'{"id": -1, "do": "cancel", "target": {}}',
        b'{"id": 900, "do": "load", "name": "\\ud800", "base": "/"}',
    ]
    command = [sys.executable, "-c", "from pipeline.inference.server import main; main()"]
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        command, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL
    )
    assert process.stdin is not None and process.stdout is not None
    answers: queue.Queue[bytes] = queue.Queue()

    def hear() -> None:
        for line in process.stdout or ():
            answers.put(line)

    threading.Thread(target=hear, daemon=True).start()
    try:
        process.stdin.write(b"\n".join([*lines, b'{"id": 5000, "do": "status"}', b""]))
        process.stdin.flush()
        heard = [json.loads(answers.get(timeout=60)) for _ in range(len(lines) + 1)]
        assert next(one for one in heard if one["id"] == 5000)["event"] == "done"
        assert all(one["event"] in ("error", "done") for one in heard)
    finally:
        process.kill()
        process.wait()
