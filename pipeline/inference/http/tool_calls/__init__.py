"""Calls of functions in answers: a file for each way in which chat templates have them written."""

import json
import re
import uuid
from collections.abc import Container, Mapping, Sequence
from typing import Any, NamedTuple

from pipeline.data.tokenizers.word import Tokenizer
from pipeline.extensions import Registry
from pipeline.inference.http.grammar import json_rule


class Format(NamedTuple):
    """How calls are written: as a JSON text for each, or as a list of them."""

    template: str  # a text of the chat templates that want it
    begins: str  # regular expression of where calls begin in an answer
    between: str  # and of what stands around their JSON texts
    opening: Sequence[str] = ()  # texts and tokens before a call
    closing: Sequence[str] = ()  # and after it
    arguments: str = "arguments"  # the key beside name


FORMATS: Registry[Format] = Registry("tool_call_format")


def format_of(tokenizer: Tokenizer) -> Format | None:
    """The format that the chat template tells a model to use, if it is known."""
    template = getattr(tokenizer, "template", None) or ""
    return next((form for form in FORMATS.usable() if form.template in template), None)


def parse(form: Format, text: str, names: Container[str]) -> list[dict[str, Any]]:
    """The calls that `text` consists of, as OpenAI writes them.

    [] if there is anything else, or a call of a function without one of these names.
    """
    between, decoder = re.compile(form.between), json.JSONDecoder()
    calls: list[Any] = []
    try:
        while text := between.sub("", text, count=1):
            value, stop = decoder.raw_decode(text)
            calls += value if isinstance(value, list) else [value]
            text = text[stop:]
        return [_read(call, names) for call in calls]
    except (ValueError, KeyError, TypeError, RecursionError):
        return []


def _read(call: Any, names: Container[str]) -> dict[str, Any]:
    arguments = call["arguments" if "arguments" in call else "parameters"]
    if call["name"] not in names or not isinstance(arguments, dict):
        raise ValueError
    function = {"name": call["name"], "arguments": json.dumps(arguments, allow_nan=False)}
    # Mistral's templates take ids of 9 letters and digits alone.
    return {"id": uuid.uuid4().hex[:9], "type": "function", "function": function}


def rule(form: Format, functions: Mapping[str, Any], tokenizer: Tokenizer) -> str:
    """One call of one of `functions`, each with the schema of its arguments, as a grammar's rule."""

    def literal(text: str) -> str:
        # the library takes added tokens by their ids alone
        ids = tokenizer.spans(text)[0]
        return f"<[{ids[0]}]>" if len(ids) == 1 < len(text) else json.dumps(text)

    calls = []
    for name, schema in functions.items():
        start = f'{{"name": {json.dumps(name)}, "{form.arguments}": '
        calls.append(f'{json.dumps(start)} {json_rule(schema)} "}}"')
    parts = [*map(literal, form.opening), f"({' | '.join(calls)})", *map(literal, form.closing)]
    return " ".join(parts)
