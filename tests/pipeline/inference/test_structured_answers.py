"""Answers by a JSON schema: what is complete is valid, and bad schemas hurt nobody else."""

import json
import random
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from openai import OpenAI
from pydantic import BaseModel

from pipeline import errors
from pipeline.adapters.config import AdapterSpec
from pipeline.data.tokenizers.word import load_tokenizer
from pipeline.errors import UserError
from pipeline.inference.batching import BatchedGenerator, GeneratedToken, Generation, Matcher
from pipeline.inference.http.grammar import compile_grammar, json_rule
from pipeline.inference.http.models import Source
from pipeline.inference.http.server import HttpServer
from pipeline.inference.model_pool import ModelPool
from pipeline.models.generate import Sampling, draw
from tests.conftest import Built
from tests.helpers.bases import toy_checkpoint
from tests.helpers.checkpoints import adapter, checkpoint
from tests.helpers.http_server import ask, serving
from tests.helpers.tokenizers import folder_with

pytestmark = pytest.mark.filterwarnings("ignore")
CHAT, PLAIN = "/v1/chat/completions", "/v1/completions"
QUESTION = [{"role": "user", "content": "Which currency?"}]
PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "kind": {"enum": ["cat", "dog", None]},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 4}, "maxItems": 2},
    },
    "required": ["age", "kind", "tags"],
    "additionalProperties": False,
}
ENDLESS = {"type": "string", "minLength": 10_000}


@pytest.fixture(scope="module")
def folders(built: Built) -> Path:
    """A toy Llama with an adapter, and a MiniGPT. Read it; do not write to it."""

    def build(root: Path) -> None:
        toy_checkpoint(root / "base", max_position_embeddings=1024)
        adapter(root / "a-1", root / "base", AdapterSpec(2, 8.0, ("q_proj", "v_proj")), 1)
        checkpoint(root / "mini")

    return built("structured", build)


@pytest.fixture(scope="module")
def desk(folders: Path) -> Iterator[HttpServer]:
    sources = {
        "base": Source(folders / "base"),
        "a-1": Source(folders / "base", folders / "a-1"),
        "mini": Source(folders / "mini"),
    }
    with serving(sources) as running:
        yield running


def by_schema(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}


def request(**fields: Any) -> dict[str, Any]:
    return {"model": "base", "max_tokens": 400, "messages": QUESTION, **fields}


def is_valid(value: Any, schema: dict[str, Any]) -> bool:
    """JSON Schema, as far as `random_schema` uses it."""
    if "anyOf" in schema:
        return any(is_valid(value, part) for part in schema["anyOf"])
    if "enum" in schema:
        # 1 == True in Python alone
        return any(type(value) is type(item) and value == item for item in schema["enum"])
    kind = schema.get("type")
    if kind == "object":
        properties = schema["properties"]
        return (
            isinstance(value, dict)
            and set(schema["required"]) <= set(value) <= set(properties)
            and all(is_valid(item, properties[key]) for key, item in value.items())
        )
    if kind == "array":
        return (
            isinstance(value, list)
            and schema["minItems"] <= len(value) <= schema["maxItems"]
            and all(is_valid(item, schema["items"]) for item in value)
        )
    if kind == "string":
        matches = re.search(schema.get("pattern", ""), value) if isinstance(value, str) else None
        return matches is not None and len(value) <= schema.get("maxLength", 99)
    if kind == "integer":
        return type(value) is int and schema["minimum"] <= value <= schema["maximum"]
    return {"boolean": bool, "null": type(None)}[str(kind)] is type(value)


def random_schema(rng: random.Random, depth: int = 3) -> dict[str, Any]:
    simple = ("string", "pattern", "integer", "boolean", "null", "enum")
    kind = rng.choice(simple if depth == 0 else ("object", "object", "array", "anyOf", *simple))

    def inner() -> dict[str, Any]:
        return random_schema(rng, depth - 1)

    if kind == "object":
        properties = {rng.choice(("a", "ü", 'k"', "b c", "d\n")): inner() for _ in range(3)}
        required = [key for key in properties if rng.random() < 0.6]
        return {
            "type": "object",
            "properties": properties,
            "required": required,
            "additionalProperties": False,
        }
    if kind == "array":
        least = rng.randrange(3)
        most = least + rng.randrange(3)
        return {"type": "array", "items": inner(), "minItems": least, "maxItems": most}
    if kind == "anyOf":
        return {"anyOf": [inner(), inner()]}
    if kind == "enum":
        return {"enum": rng.sample(["x", "é€", 1, -2.5, None, True, '"'], 3)}
    if kind == "pattern":
        return {"type": "string", "pattern": rng.choice(("^[a-c]{2,4}$", "^\\d+-x$", "^(é|ab)+$"))}
    if kind == "integer":
        least = rng.randrange(-1000, 1000)
        return {"type": "integer", "minimum": least, "maximum": least + rng.randrange(500)}
    return {"type": kind, **({"maxLength": rng.randrange(9)} if kind == "string" else {})}


def drawn(matcher: Matcher, tokenizer: Any, rows: int, seed: int, haste: float) -> str | None:
    """A text of random logits in which end tokens have `haste` more; None if it does not end."""
    generator = torch.Generator().manual_seed(seed)
    matcher, decode_next = matcher.copy(), tokenizer.stream()
    text = ""
    for _ in range(600):
        logits = torch.randn(rows, generator=generator)
        logits[sorted(tokenizer.end_ids)] += haste
        id_ = int(draw(matcher.mask(logits)[None], [(Sampling(1.0), generator)]))
        if id_ in tokenizer.end_ids:
            return text
        text += str(decode_next(id_))
        matcher.inner.consume_token(id_)
    return None


@pytest.mark.slow
@pytest.mark.parametrize("sentencepiece", [False, True])
def test_whatever_the_logits_a_complete_answer_is_valid_for_any_of_60_schemas(
    tmp_path: Path, sentencepiece: bool
) -> None:
    tokenizer = load_tokenizer(folder_with(tmp_path, sentencepiece=sentencepiece))
    rows, complete = len(tokenizer) + 7, 0
    for seed in range(60):
        schema = random_schema(random.Random(seed))
        grammar = f"start: {json_rule(schema)}"
        matcher = compile_grammar(tokenizer, rows, grammar, "response_format")
        for haste in (0.0, 100.0):
            text = drawn(matcher, tokenizer, rows, seed, haste)
            if text is not None:
                complete += 1
                assert is_valid(json.loads(text), schema), (schema, text)
    assert complete > 100


@pytest.mark.parametrize("model", ["base", "a-1"])
@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_all_choices_of_a_model_have_the_schema_streamed_or_not(
    desk: HttpServer, model: str, temperature: float
) -> None:
    body = request(
        model=model, temperature=temperature, n=3, seed=5, response_format=by_schema(PERSON)
    )
    status, answer, _ = ask(desk, CHAT, body)
    assert status == 200
    texts = [choice["message"]["content"] for choice in answer["choices"]]
    assert [choice["finish_reason"] for choice in answer["choices"]] == ["stop"] * 3
    for text in texts:
        value = json.loads(text)
        assert set(value) == set(PERSON["required"])
        assert value["age"] in range(121)
        assert value["kind"] in ("cat", "dog", None)
        assert all(len(tag) <= 4 for tag in value["tags"])

    client = OpenAI(base_url=f"{desk.url}/v1", api_key="none", max_retries=0)
    streamed = ["", "", ""]
    for chunk in client.chat.completions.create(**body, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == texts


def test_openais_client_parses_the_answer_into_its_class(desk: HttpServer) -> None:
    class Person(BaseModel):
        age: int
        is_cat: bool

    client = OpenAI(base_url=f"{desk.url}/v1", api_key="none", max_retries=0)
    answer = client.chat.completions.parse(
        model="base", messages=QUESTION, response_format=Person, temperature=0, max_tokens=200
    )
    assert isinstance(answer.choices[0].message.parsed, Person)


def test_a_json_object_is_an_object_in_both_apis(desk: HttpServer) -> None:
    fields = {"response_format": {"type": "json_object"}, "max_tokens": 300, "stop": ["\n"]}
    for seed in range(3):
        chat = ask(desk, CHAT, request(**fields, seed=seed))[1]["choices"][0]
        plain = {"model": "base", "prompt": "A value:", "seed": seed, **fields}
        text = ask(desk, PLAIN, plain)[1]["choices"][0]["text"]
        assert chat["message"]["content"].startswith("{")
        assert text.startswith("{")


def test_an_answer_that_is_cut_off_says_why(desk: HttpServer) -> None:
    fields: dict[str, Any] = {"response_format": by_schema(ENDLESS), "temperature": 0}
    (choice,) = ask(desk, CHAT, request(**fields) | {"max_tokens": 9})[1]["choices"]
    assert choice["finish_reason"] == "length"
    text = choice["message"]["content"]
    (stopped,) = ask(desk, CHAT, request(**fields, stop=text[3]))[1]["choices"]
    assert stopped["finish_reason"] == "stop"
    assert stopped["message"]["content"] == text[: text.index(text[3])]


def test_a_sequence_has_the_same_bits_beside_one_with_a_grammar(folders: Path) -> None:
    pool = ModelPool()
    resident, _ = pool.load("base", folders / "base", None)
    loaded = resident.loaded
    rows = loaded.model.shape.rows
    matcher = compile_grammar(
        loaded.tokenizer, rows, f"start: {json_rule(ENDLESS)}", "response_format"
    )
    free = Generation("base", (5, 6, 7), 20, Sampling(1.0, seed=3), top_logprobs=5)
    beside = Generation("base", (8, 9), 20, Sampling(1.0, seed=4))
    bound = Generation("base", (8, 9), 20, Sampling(1.0, seed=4), grammar=matcher)

    def tokens(*requests: Generation) -> list[list[GeneratedToken]]:
        generator = BatchedGenerator(pool, threaded=False)
        outputs: list[list[GeneratedToken]] = [[] for _ in requests]
        for output, generation in zip(outputs, requests, strict=True):
            generator.submit(generation, output.append, lambda _: None)
        generator.run_all()
        return outputs

    (first, other), (again, constrained) = tokens(free, beside), tokens(free, bound)
    assert first == again
    assert constrained != other
    assert loaded.tokenizer.decode([token.id for token in constrained]).startswith('"')


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "null"}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


def chained(length: int) -> dict[str, Any]:
    """Each part refers to the one before; the library follows by recursion."""
    parts: dict[str, Any] = {"0": {"type": "null"}}
    for n in range(1, length):
        parts[f"{n:x}"] = {"items": {"anyOf": [{"$ref": f"#/{n - 1:x}"}]}}
    return {**parts, "$ref": f"#/{length - 1:x}"}


BAD: dict[str, tuple[Any, str]] = {  # schema → what the error says
    "keyword": ({"not": {"type": "string"}}, 'Unimplemented keys: ["not"]'),
    "type": ({"type": "strng"}, "Invalid type: strng"),
    "file": ({"$ref": "file:///etc/passwd"}, "not present"),
    "address": ({"$ref": "http://127.0.0.1:9/a.json"}, "not present"),
    "cycle": ({"$ref": "#"}, "allows no token"),
    "empty": ({"type": "string", "minLength": 2, "maxLength": 1}, "Unsatisfiable"),
    "depth": (nested(200), "recursion limit exceeded"),
    "stack": (chained(330), "nested too deeply"),
    "regex": ({"type": "string", "pattern": "(a)\\1"}, "backreferences are not supported"),
    "size": ({"enum": ["x" * 20_000]}, "must have at most 16,384 characters"),
    "choices": ({"allOf": [{"anyOf": [{"minimum": n}, {"maximum": n}]} for n in range(30)]}, ""),
    "states": ({"type": "string", "pattern": "(.?.*)" * 2_000}, "allows no token"),
}
# without limits it takes 5 seconds
LENGTHY = {
    "type": "object",
    "patternProperties": {f"^a{n}_.{{0,100}}$": {"type": "null"} for n in range(300)},
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_schema_is_400_with_its_reason(desk: HttpServer, name: str) -> None:
    schema, reason = BAD[name]
    status, answer, _ = ask(desk, CHAT, request(response_format=by_schema(schema)))
    assert status == 400
    assert answer["error"]["param"] == "response_format"
    assert reason in answer["error"]["message"]


@pytest.mark.slow
def test_a_schema_that_takes_too_long_is_400_and_others_are_answered_meanwhile(
    desk: HttpServer,
) -> None:
    def hostile() -> tuple[int, str]:
        status, answer, _ = ask(desk, CHAT, request(response_format=by_schema(LENGTHY)))
        return status, answer["error"]["message"]

    with ThreadPoolExecutor() as threads:
        bad = [threads.submit(hostile) for _ in range(6)]
        time.sleep(0.2)
        status, _, _ = ask(desk, CHAT, request(max_tokens=2))
        assert status == 200
        assert not all(answer.done() for answer in bad), "the schemas were still being compiled"
        for answer in bad:
            assert answer.result()[0] == 400
            assert "takes too long" in answer.result()[1]


def test_the_wrong_fields_are_named(desk: HttpServer) -> None:
    for fields, param in (
        ({"type": "json_schema"}, "response_format.json_schema"),
        ({"type": "json_schema", "json_schema": {"name": "a"}}, "response_format.json_schema"),
        ({"type": "yaml"}, "response_format.type"),
        ({"type": "json_object", "schema": {}}, "response_format.schema"),
    ):
        status, answer, _ = ask(desk, CHAT, request(response_format=fields))
        assert status == 400
        assert answer["error"]["param"].startswith(param)


def test_a_model_of_whole_words_cannot_follow_a_schema(desk: HttpServer) -> None:
    body = {"model": "mini", "prompt": "w1", "response_format": {"type": "json_object"}}
    status, answer, _ = ask(desk, PLAIN, body)
    assert status == 400
    assert "a token for each byte" in answer["error"]["message"]


def test_without_the_library_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, folders: Path
) -> None:
    monkeypatch.setattr(errors, "find_spec", lambda _: None)
    tokenizer = load_tokenizer(folders / "base")
    with pytest.raises(UserError, match=r"response_format needs llguidance.*\[serve\]"):
        compile_grammar(tokenizer, 320, "start: %json {}", "response_format")
