"""Calls of functions: read from texts as the models write them, required, streamed, returned."""

import asyncio
import json
from collections.abc import AsyncGenerator, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai import OpenAI
from transformers import AutoTokenizer

from pipeline.data.tokenizers.word import load_tokenizer
from pipeline.inference.http.choices import Piece, read_calls
from pipeline.inference.http.models import Source
from pipeline.inference.http.server import HttpServer
from pipeline.inference.http.tool_calls import FORMATS, format_of, parse
from tests.conftest import Built
from tests.helpers.bases import TEMPLATE, toy_model, toy_tokenizer
from tests.helpers.http_server import ask, serving

pytestmark = pytest.mark.filterwarnings("ignore")
CHAT = "/v1/chat/completions"
QUESTION: Any = [{"role": "user", "content": "Which currency?"}]
TELLS = {  # what a template says of calls
    "hermes": "Write <tool_call>JSON</tool_call>.",
    "llama": 'Write {"name": function name, "parameters": dictionary of its arguments}.',
    "mistral": "[TOOL_CALLS]",
    "own": "Write calls as you like.",
}
NAMES = ("add", "now")
ADD = ("add", {"a": 1, "b": "}</tool_call>;]"})
ADD_TEXT = json.dumps(ADD[1])
NOW: tuple[str, Any] = ("now", {})
# format, answer → text before the calls, calls
ANSWERS: list[tuple[str, str, str, list[Any]]] = [
    (
        "hermes",
        f'<tool_call>\n{{"name": "add", "arguments": {ADD_TEXT}}}\n</tool_call>',
        "",
        [ADD],
    ),
    (
        "hermes",
        'Let me look.\n<tool_call>{"arguments": {}, "name": "now"}</tool_call>\n<tool_call>\n'
        f'{{"name": "add", "arguments": {ADD_TEXT}}}</tool_call>\n',
        "Let me look.\n",
        [NOW, ADD],
    ),
    # SmolLM 2 has a list in one pair of tags; an end token may come in place of the last tag
    (
        "hermes",
        f'<tool_call>[{{"name": "now", "arguments": {{}}}}, '
        f'{{"name": "add", "arguments": {ADD_TEXT}}}]',
        "",
        [NOW, ADD],
    ),
    ("llama", f'{{"name": "add", "parameters": {ADD_TEXT}}}', "", [ADD]),
    ("llama", f'<|python_tag|>{{"name": "add", "parameters": {ADD_TEXT}}}', "", [ADD]),
    (
        "llama",
        f' {{"name": "now", "parameters": {{}}}}; {{"name": "add", "arguments": {ADD_TEXT}}}',
        "",
        [NOW, ADD],
    ),
    (
        "mistral",
        f'[TOOL_CALLS] [{{"name": "now", "arguments": {{}}}}, '
        f'{{"name": "add", "arguments": {ADD_TEXT}}}]',
        "",
        [NOW, ADD],
    ),
    ("mistral", f'[{{"name": "add", "arguments": {ADD_TEXT}}}]', "", [ADD]),
    ("mistral", 'Wait. [TOOL_CALLS][{"name": "now", "arguments": {}}]', "Wait. ", [NOW]),
]
TEXTS: list[tuple[str, str]] = [  # format, an answer that calls nothing
    ("hermes", "a < b, and <tool_calls> is no mark"),
    ("hermes", '<tool_call>{"name": "add", "arguments": {"a": '),
    ("hermes", '<tool_call>{"name": "rm", "arguments": {}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "now", "arguments": {}}</tool_call> and more'),
    ("hermes", '<tool_call>{"name": "now", "arguments": [1]}</tool_call>'),
    ("hermes", '<tool_call>{"name": ["now"], "arguments": {}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "now"}</tool_call>'),
    ("hermes", '<tool_call>{"name": "add", "arguments": {"a": NaN}}</tool_call>'),
    ("hermes", "<tool_call>" + "[" * 5_000),
    ("hermes", "<tool_call></tool_call>"),
    ("llama", '{"name": "Ada", "age": 36}'),
    ("llama", 'It is {"name": "now", "parameters": {}}'),
    ("llama", '"now"'),
    ("mistral", '[1, {"name": "now", "arguments": {}}]'),
    ("mistral", '["a"] {"name": "now", "arguments": {}}'),
    ("mistral", "[TOOL_CALLS]"),
]


def tool(name: str, **properties: Any) -> dict[str, Any]:
    parameters = {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


TOOLS: Any = [
    tool("add", a={"type": "integer", "minimum": 0, "maximum": 99}, b={"enum": ["x", "y"]}),
    tool("now"),
]


def plain(calls: Sequence[dict[str, Any]]) -> list[tuple[str, Any]]:
    functions = [call["function"] for call in calls]
    return [(function["name"], json.loads(function["arguments"])) for function in functions]


def streamed(name: str, pieces: Sequence[str], most: int | None = None) -> list[Piece]:
    async def source() -> AsyncGenerator[Piece, None]:
        for text in pieces:
            yield Piece(0, text, ())
        yield Piece(0, "", (), "stop")

    async def read() -> list[Piece]:
        return [piece async for piece in read_calls(source(), FORMATS[name], NAMES, most)]

    return asyncio.run(read())


@pytest.mark.parametrize(("name", "answer", "before", "calls"), ANSWERS)
def test_calls_are_read_as_the_format_writes_them(
    name: str, answer: str, before: str, calls: list[Any]
) -> None:
    assert plain(parse(FORMATS[name], answer[len(before) :], NAMES)) == calls
    (piece, last) = streamed(name, [answer])
    assert (piece.text + last.text, plain(last.calls)) == (before, calls)
    assert last.finish == "tool_calls"
    assert plain(streamed(name, [answer], 1)[-1].calls) == calls[:1]


@pytest.mark.parametrize(("name", "answer"), TEXTS)
def test_an_answer_that_is_no_call_of_a_known_function_stays_text(name: str, answer: str) -> None:
    pieces = streamed(name, [*answer])
    assert "".join(piece.text for piece in pieces) == answer
    assert (pieces[-1].finish, pieces[-1].calls) == ("stop", [])


@given(st.sampled_from(ANSWERS), st.lists(st.integers(0, 200)))
def test_calls_do_not_depend_on_how_the_text_is_cut_into_pieces(
    case: tuple[str, str, str, list[Any]], places: list[int]
) -> None:
    name, answer, before, calls = case
    cuts = sorted({0, *(min(place, len(answer)) for place in places), len(answer)})
    pieces = streamed(name, [answer[a:b] for a, b in pairwise(cuts)])
    assert "".join(piece.text for piece in pieces) == before
    assert plain(pieces[-1].calls) == calls


def test_text_before_a_call_is_not_held_back() -> None:
    texts = [piece.text for piece in streamed("hermes", ["So", " <", "b", " <tool", "_ca", "t>"])]
    assert texts == ["So", " ", "<b", " ", "", "<tool_cat>", ""]


@pytest.fixture(scope="module")
def desk(built: Built) -> Iterator[HttpServer]:
    def build(root: Path) -> None:
        for name, text in TELLS.items():
            toy_model("llama", max_position_embeddings=1024).save_pretrained(root / name)
            tokenizer = toy_tokenizer()
            shown = "{% if tools %}{{ '" + text + "' }}{{ tools | tojson }}{% endif %}"
            calls = "{% for m in messages %}{{ m.tool_calls | default('') }}{% endfor %}"
            tokenizer.chat_template = shown + calls + TEMPLATE
            if name == "hermes":  # as Qwen: tokens that are no special ones
                tokenizer.add_tokens(["<tool_call>", "</tool_call>"])
            if name == "mistral":
                tokenizer.add_special_tokens({"additional_special_tokens": ["[TOOL_CALLS]"]})
            tokenizer.save_pretrained(root / name)

    root = built("tool-calls", build)
    with serving({name: Source(root / name) for name in TELLS}) as running:
        yield running


@pytest.fixture
def client(desk: HttpServer) -> OpenAI:
    return OpenAI(base_url=f"{desk.url}/v1", api_key="none", max_retries=0)


def test_the_format_is_the_one_that_the_template_tells(desk: HttpServer) -> None:
    for name, source in desk.models.sources.items():
        form = format_of(load_tokenizer(source.base))
        assert form is (None if name == "own" else FORMATS[name])


@pytest.mark.parametrize("name", ["hermes", "llama", "mistral"])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "add"}}])
def test_a_call_that_is_required_comes_with_valid_arguments_streamed_or_not(
    client: OpenAI, name: str, choice: Any
) -> None:
    fields: Any = {"model": name, "messages": QUESTION, "tools": TOOLS, "tool_choice": choice}
    for seed in range(3):
        answer = client.chat.completions.create(**fields, seed=seed, max_tokens=400)
        assert answer.choices[0].finish_reason == "tool_calls"
        message = answer.choices[0].message
        assert message.content is None
        (call,) = message.tool_calls
        arguments = json.loads(call.function.arguments)
        assert call.function.name == "add" or (choice == "required" and arguments == {})
        if call.function.name == "add":
            assert set(arguments) == {"a", "b"}
            assert arguments["a"] in range(100)
            assert arguments["b"] in ("x", "y")

        chunks = client.chat.completions.create(**fields, seed=seed, max_tokens=400, stream=True)
        parts = [chunk.choices[0] for chunk in chunks]
        (delta,) = [part.delta.tool_calls for part in parts if part.delta.tool_calls]
        assert (len(delta), delta[0].index) == (1, 0)
        assert delta[0].function.name == call.function.name
        assert delta[0].function.arguments == call.function.arguments
        assert not any(part.delta.content for part in parts)
        assert parts[-1].finish_reason == "tool_calls"


def test_with_a_schema_and_tools_an_answer_is_one_or_the_other(desk: HttpServer) -> None:
    schema = {"type": "integer", "minimum": 0, "maximum": 99}
    body = {
        "model": "hermes",
        "messages": QUESTION,
        "tools": TOOLS,
        "max_tokens": 400,
        "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}},
    }
    kinds = set()
    for seed in range(40):
        (choice,) = ask(desk, CHAT, body | {"seed": seed})[1]["choices"]
        kinds.add(choice["finish_reason"])
        if choice["finish_reason"] == "stop":
            assert json.loads(choice["message"]["content"]) in range(100)
    assert kinds == {"stop", "tool_calls"}


def test_calls_and_their_results_come_back_to_the_model_through_its_template(
    desk: HttpServer, client: OpenAI
) -> None:
    fields: Any = {"model": "llama", "tools": TOOLS}
    first = client.chat.completions.create(**fields, messages=QUESTION, tool_choice="required")
    turn = first.choices[0].message
    result = {"role": "tool", "tool_call_id": turn.tool_calls[0].id, "content": "42"}
    answer = client.chat.completions.create(
        **fields, messages=[*QUESTION, turn, result], max_tokens=3
    )
    call = turn.tool_calls[0].model_dump()
    call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    shown = {"role": "assistant", "content": "", "tool_calls": [call]}
    theirs = AutoTokenizer.from_pretrained(desk.models.sources["llama"].base)
    ids = theirs.apply_chat_template(
        [*QUESTION, shown, result], tools=TOOLS, add_generation_prompt=True, return_dict=False
    )
    assert answer.usage.prompt_tokens == len(ids)


def test_none_hides_the_tools_from_the_model(client: OpenAI) -> None:
    fields: Any = {"model": "hermes", "messages": QUESTION, "max_tokens": 2}
    without = client.chat.completions.create(**fields)
    hidden = client.chat.completions.create(**fields, tools=TOOLS, tool_choice="none")
    shown = client.chat.completions.create(**fields, tools=TOOLS)
    assert hidden.usage.prompt_tokens == without.usage.prompt_tokens < shown.usage.prompt_tokens


BAD: list[tuple[dict[str, Any], str, str]] = [  # fields → parameter and text of the error
    ({"model": "own", "tools": TOOLS, "tool_choice": "required"}, "tool_choice", "is unknown"),
    ({"tool_choice": "required"}, "tool_choice", "must be a function of tools"),
    (
        {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "rm"}}},
        "tool_choice",
        "must be a function of tools",
    ),
    ({"tools": [{"type": "function"}]}, "tools[0].function", "is missing"),
    ({"tools": [tool('a"b')]}, "tools[0].function.name", "match"),
    (
        {"tools": [tool("f", a={"not": {}})], "tool_choice": "required"},
        "tools",
        'Unimplemented keys: ["not"]',
    ),
]


@pytest.mark.parametrize(("fields", "param", "text"), BAD)
def test_tools_that_cannot_be_honoured_are_named(
    desk: HttpServer, fields: dict[str, Any], param: str, text: str
) -> None:
    status, answer, _ = ask(desk, CHAT, {"model": "hermes", "messages": QUESTION} | fields)
    assert (status, answer["error"]["param"]) == (400, param)
    assert text in answer["error"]["message"]
