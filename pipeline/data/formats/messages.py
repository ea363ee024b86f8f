"""{"messages": [{"role": …, "content": …}, …]}: a conversation; its assistant turns are trained on.

With the keys of transformers and TRL: `tools` beside the messages, and `tool_calls`,
`tool_call_id`, `name` and `reasoning_content` in them. `train` (Axolotl) or `weight` (OpenAI) says
whether an assistant's turn is trained on.
"""

import json
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple, get_args

from pipeline.data.containers import MAX_LINE_BYTES, describe_type
from pipeline.data.examples import Example, Message, Role
from pipeline.data.formats import (
    CannotHold,
    Format,
    Record,
    read_list,
    read_optional,
    read_string,
    refuse_unknown,
)
from pipeline.errors import UserError, first_line

SWITCHES = ("train", "training", "weight")
TEXTS = ("reasoning_content", "tool_call_id", "name")
MAX_DEPTH = 100  # of tools and tool calls: Python's own limit would be met anywhere
KEYS = ("role", "content", "tool_calls", *TEXTS, *SWITCHES)
ROLES = get_args(Role)


class Turns(NamedTuple):
    """Messages, and which of them carry no label although they are the assistant's."""

    messages: tuple[Message, ...]
    untrained: frozenset[int] = frozenset()


def read(record: Record, file: str, line: int) -> Example:
    """At least one turn is the assistant's, which must not be the first."""
    location = f"{file}:{line}"
    return conversation(read_turns(record, "messages", location), record, file, line)


def conversation(
    turns: Turns, record: Record, file: str, line: int, key: str = "messages"
) -> Example:
    """The example of a whole conversation. Raises UserError if there is nothing to train on."""
    location = f"{file}:{line}"
    roles = [message["role"] for message in turns.messages]
    if "assistant" not in roles:
        raise UserError(
            f'{location}: {key} has no "assistant" turn, so there is nothing to train on. Add one.'
        )
    if roles[0] == "assistant":
        raise UserError(
            f'{location}: {key} must not start with an "assistant" turn. Put the turn it answers '
            "first."
        )
    tools = read_tools(record, location)
    return Example(
        text_of(turns.messages), file, line, None, turns.messages, turns.untrained, tools
    )


def text_of(messages: Sequence[Message]) -> str:
    return "\n".join(message["content"] or "" for message in messages)


def read_turns(record: Record, key: str, location: str) -> Turns:
    """The turns of a list of {"role", "content"}. Raises UserError."""
    value = read_list(record, key, location, '{"role", "content"}')
    messages = tuple(
        read_message(entry, f"{location}: {key}[{index}]") for index, entry in enumerate(value)
    )
    untrained = set()
    for number, entry in enumerate(value):
        # most are a role and a content
        if len(entry) > 2 and is_untrained(entry, messages[number], f"{location}: {key}[{number}]"):
            untrained.add(number)
    return Turns(messages, frozenset(untrained))


def read_message(entry: Any, location: str) -> Message:
    """One turn, without what is not for the chat template. Raises UserError."""
    if not isinstance(entry, dict) or "role" not in entry:
        got = describe_type(entry)
        if isinstance(entry, dict):
            got = f"keys {', '.join(map(repr, entry))[:200] or 'none'}"
        raise UserError(
            f"{location} must have the keys role and content, got {got}. Rename them, or say "
            "which is which in columns, such as --columns role=speaker,content=text."
        )
    if len(entry) > 2 or "content" not in entry:
        refuse_unknown(entry, KEYS, location)
    role = entry["role"]
    if not isinstance(role, str) or role not in ROLES:
        name = role[:60] if isinstance(role, str) and role.isidentifier() else "customer"
        raise UserError(
            f"{location}: role must be one of {', '.join(ROLES)}, got {str(role)[:60]!r}. Say in "
            f"columns which is which, such as --columns user={name}."
        )
    calls = read_list(entry, "tool_calls", location) if "tool_calls" in entry else []
    if calls and role != "assistant":
        raise UserError(f"{location}: tool_calls belong to an assistant turn, got role {role!r}.")
    # Without the empty optional keys: a table has every key in every turn.
    message: Message = {
        "role": role,  # type: ignore[typeddict-item]
        "content": _read_content(entry, location, role == "tool", bool(calls)),
    }
    if calls:
        message["tool_calls"] = [
            _read_function(call, f"{location}: tool_calls[{n}]") for n, call in enumerate(calls)
        ]
    for key in TEXTS:
        if key in entry and (text := read_optional(entry, key, location)):
            message[key] = text  # type: ignore[literal-required]
    return message


def _read_content(
    entry: Mapping[str, Any], location: str, may_be_empty: bool, calls: bool
) -> str | None:
    content = entry.get("content")
    if isinstance(content, list) and content:  # parts, as of models that also read images
        content = "".join(
            _read_part(part, f"{location}: content[{n}]") for n, part in enumerate(content)
        )
    if calls and content is None:
        return None
    if (calls or may_be_empty) and content == "":
        return ""
    return read_string({"content": content}, "content", location)


def _read_part(part: Any, location: str) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        text: str = part["text"]
        return text
    kind = str(part.get("type"))[:60] if isinstance(part, dict) else describe_type(part)
    raise UserError(
        f'{location}: only parts {{"type": "text", "text": …}} can be trained on, got type {kind}.'
    )


def _read_function(call: Any, location: str) -> dict[str, Any]:
    """A tool call, as it is. Raises UserError if it has no function name."""
    inner = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
        raise UserError(
            f'{location} must be {{"type": "function", "function": {{"name": …, "arguments": …}}}}.'
        )
    _refuse_other_than_json(call, location)
    return dict(call)


def _refuse_other_than_json(value: Any, location: str) -> None:
    """Raises UserError for what the template's process cannot take.

    Such as a date of a table, half a character, or too much.
    """
    level, depth = [value], 0
    while level:
        parts = chain.from_iterable(
            part.values() if isinstance(part, dict) else part for part in level
        )
        level = [part for part in parts if isinstance(part, dict | list)]
        depth += 1
    if depth > MAX_DEPTH:
        raise UserError(f"{location}: nested {depth} deep, more than {MAX_DEPTH}. Change it.")
    try:
        size = len(json.dumps(value, ensure_ascii=False).encode())
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{location}: not plain JSON: {first_line(error)}. Change it.") from None
    if size > MAX_LINE_BYTES:
        raise UserError(
            f"{location}: at most {MAX_LINE_BYTES:,} bytes of JSON, got {size:,}. Shorten it."
        )


def is_untrained(entry: Mapping[str, Any], turn: Message, location: str) -> bool:
    """Whether a switch says that a turn of the assistant carries no label. Raises UserError."""
    for key in SWITCHES:
        value = entry.get(key)
        if value is None:
            continue
        if isinstance(value, str) or value not in (0, 1):
            allowed = "0 or 1" if key == "weight" else "true or false"
            raise UserError(f"{location}: {key} must be {allowed}, got {str(value)[:60]}.")
        if value and turn["role"] != "assistant":
            raise UserError(
                f"{location}: {key} is set on a turn of role {turn['role']!r}. Only assistant "
                "turns are trained on: remove it."
            )
        if not value:
            return turn["role"] == "assistant"
    return False


def read_tools(record: Record, location: str) -> tuple[Mapping[str, Any], ...]:
    """The schemas of `tools`, bare functions wrapped as in transformers. Raises UserError."""
    if not record.get("tools"):
        return ()
    tools = read_list(record, "tools", location)
    for number, tool in enumerate(tools):
        inner = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
            got = "no name" if isinstance(tool, dict) else describe_type(tool)
            raise UserError(
                f'{location}: tools[{number}] must be {{"type": "function", "function": '
                f'{{"name": …}}}}, got {got}.'
            )
    _refuse_other_than_json(tools, f"{location}: tools")
    return tuple(
        tool if "function" in tool else {"type": "function", "function": tool} for tool in tools
    )


def detect(record: Record) -> bool:
    return "messages" in record


def write(example: Example) -> dict[str, Any]:
    return {"messages": write_turns(example, 0), **write_tools(example)}


def write_turns(example: Example, start: int, stop: int | None = None) -> list[dict[str, Any]]:
    """The messages [start, stop). An answer without a label says so.

    With `stop` they are a prompt, whose answers have no labels anyway.
    """
    turns = []
    for number, message in list(enumerate(example.messages))[start:stop]:
        turn = {**message}
        if number in example.untrained and stop is None:
            turn["train"] = False
        turns.append(turn)
    return turns


def write_tools(example: Example) -> dict[str, Any]:
    return {"tools": list(example.tools)} if example.tools else {}


def refuse_more_than_texts(example: Example) -> None:
    """Raises CannotHold if there is more than turns of text that are all trained on."""
    calls = any("tool_calls" in turn or turn["role"] == "tool" for turn in example.messages)
    if example.tools or calls:
        raise CannotHold("it has tools or tool calls")
    if example.untrained:
        raise CannotHold("it has assistant turns that are not trained on")
    keys = set[str]().union(*example.messages)
    if more := sorted(keys - {"role", "content"}):
        raise CannotHold(f"its turns have {', '.join(more)}")


FORMAT = Format(
    2, '{"messages"}', frozenset({"messages", "tools"}), detect, read, write, mixes=True
)
