"""{"messages": [{"role": …, "content": …}, …]}: a conversation, whose assistant's turns are trained on."""

from typing import Any, get_args

from pipeline.data.examples import Example, Message, Role
from pipeline.data.formats import Format, Record, describe_type, read_string
from pipeline.errors import UserError


def read(record: Record, file: str, line: int) -> Example:
    """At least one turn is the assistant's, which must not be the first."""
    location, value = f"{file}:{line}", record["messages"]
    if not isinstance(value, list) or not value:
        raise UserError(f'{location}: messages must be a list of {{"role", "content"}}, got {describe_type(value)}.')
    messages = tuple(_read_message(entry, f"{location}: messages[{index}]") for index, entry in enumerate(value))
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        raise UserError(f'{location}: messages has no "assistant" turn, so there is nothing to train on. Add one.')
    if roles[0] == "assistant":
        raise UserError(f'{location}: messages must not start with an "assistant" turn. Put the turn it answers first.')
    return Example("\n".join(message["content"] for message in messages), file, line, messages=messages)


def _read_message(entry: Any, location: str) -> Message:
    if not isinstance(entry, dict) or set(entry) != {"role", "content"}:
        got = f"keys {', '.join(map(repr, entry)) or 'none'}" if isinstance(entry, dict) else describe_type(entry)
        raise UserError(f"{location} must have exactly the keys role and content, got {got}.")
    if entry["role"] not in get_args(Role):
        raise UserError(
            f"{location}: role must be one of {', '.join(get_args(Role))}, got {str(entry['role'])[:60]!r}."
        )
    return {"role": entry["role"], "content": read_string(entry, "content", location)}


FORMAT = Format(3, '{"messages"}', lambda record: set(record) == {"messages"}, read)
