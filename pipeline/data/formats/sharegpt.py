"""{"conversations": [{"from": "human", "value": …}, …]}: ShareGPT's, in the dialects in use.

`system` and `tools` may stand beside the conversation, as LLaMA-Factory has them. A `function_call`
is an assistant's turn with tool calls, its value the JSON of one call or of a list.
"""

import json
from typing import Any

from pipeline.data.examples import Example, Message
from pipeline.data.formats import (
    CannotHold,
    Format,
    Record,
    read_list,
    read_optional,
    read_string,
    refuse_unknown,
)
from pipeline.data.formats.messages import (
    SWITCHES,
    Turns,
    conversation,
    is_untrained,
    read_message,
    write_tools,
)
from pipeline.errors import UserError

ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bard", "bing", "model"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
}
SPEAKERS = {"system": "system", "user": "human", "assistant": "gpt", "tool": "observation"}


def read(record: Record, file: str, line: int) -> Example:
    location = f"{file}:{line}"
    entries = read_list(record, "conversations", location, '{"from", "value"}')
    messages, untrained = list[Message](), set[int]()
    if system := read_optional(record, "system", location):
        messages.append({"role": "system", "content": system})
    for number, entry in enumerate(entries):
        where = f"{location}: conversations[{number}]"
        message = _read_turn(entry, where)
        if is_untrained(entry, message, where):
            untrained.add(len(messages))
        messages.append(message)
    return conversation(
        Turns(tuple(messages), frozenset(untrained)), record, file, line, "conversations"
    )


def _read_turn(entry: Any, location: str) -> Message:
    """Raises UserError."""
    if not isinstance(entry, dict) or not ("from" in entry or "role" in entry):
        raise UserError(
            f'{location} must be {{"from": …, "value": …}} or {{"role": …, "content": …}}.'
        )
    if "from" in entry:
        refuse_unknown(entry, ("from", "value", *SWITCHES), location)
    speaker, key = (entry["from"], "value") if "from" in entry else (entry["role"], "content")
    role = speaker.lower() if isinstance(speaker, str) else ""
    if role == "function_call":
        calls = _read_calls(entry, key, location)
        return {"role": "assistant", "content": None, "tool_calls": calls}
    if role not in ROLES:
        raise UserError(
            f"{location}: unknown speaker {str(speaker)[:60]!r}. Known: "
            f"{', '.join([*ROLES, 'function_call'])}. Say in columns which is which, such as "
            "--columns user=customer."
        )
    if "from" not in entry:
        return read_message({**entry, "role": ROLES[role]}, location)
    read_content = read_optional if ROLES[role] == "tool" else read_string
    content = read_content(entry, key, location)
    return {"role": ROLES[role], "content": content}  # type: ignore[typeddict-item]


def _read_calls(entry: Record, key: str, location: str) -> list[Any]:
    try:
        value = json.loads(read_string(entry, key, location))
    except (ValueError, RecursionError):
        value = None
    calls = value if isinstance(value, list) else [value]
    if not calls or not all(
        isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls
    ):
        raise UserError(
            f'{location}: a function_call must be JSON {{"name": …, "arguments": {{…}}}} or a '
            "list of them."
        )
    return [{"type": "function", "function": call} for call in calls]


def write(example: Example) -> dict[str, Any]:
    turns = [_write_turn(example, number) for number in range(len(example.messages))]
    return {"conversations": turns, **write_tools(example)}


def _write_turn(example: Example, number: int) -> dict[str, Any]:
    message = example.messages[number]
    role, more = message["role"], sorted(message.keys() - {"role", "content", "tool_calls"})
    if more:
        raise CannotHold(f"its turns have {', '.join(more)}")
    if role not in SPEAKERS:
        raise CannotHold(f"it has a {role} turn")
    untrained = {"train": False} if number in example.untrained else {}
    calls = message.get("tool_calls")
    if not calls:
        return {"from": SPEAKERS[role], "value": message["content"], **untrained}
    if message["content"] is not None or any(call.keys() != {"type", "function"} for call in calls):
        raise CannotHold("it has tool calls with an id or with text beside them")
    functions = [call["function"] for call in calls]
    value = json.dumps(functions[0] if len(functions) == 1 else functions, ensure_ascii=False)
    return {"from": "function_call", "value": value, **untrained}


FORMAT = Format(
    3,
    '{"conversations"}',
    frozenset({"conversations", "system", "tools"}),
    lambda record: "conversations" in record,
    read,
    write,
)
