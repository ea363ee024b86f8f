"""{"prompt": [messages], "completion": [messages] or a text}, as TRL has it.

Only the completion is trained on: turns of the assistant in the prompt carry no label.
"""

from dataclasses import replace
from typing import Any

from pipeline.data.examples import Example
from pipeline.data.formats import CannotHold, Format, Record, read_string
from pipeline.data.formats.messages import (
    Turns,
    conversation,
    read_turns,
    write_tools,
    write_turns,
)


def read(record: Record, file: str, line: int) -> Example:
    location = f"{file}:{line}"
    prompt = read_turns(record, "prompt", location)
    completion = answer(record, "completion", location)
    example = conversation(joined(prompt, completion), record, file, line, "prompt + completion")
    return replace(example, begin=len(prompt.messages))


def answer(record: Record, key: str, location: str) -> Turns:
    """The turns behind a prompt: a list of messages, or the assistant's turn as a text.

    Raises UserError.
    """
    if isinstance(record.get(key), str):
        return Turns(({"role": "assistant", "content": read_string(record, key, location)},))
    return read_turns(record, key, location)


def joined(prompt: Turns, completion: Turns) -> Turns:
    """The conversation, of which the completion alone is trained on."""
    begin = len(prompt.messages)
    before = {n for n, message in enumerate(prompt.messages) if message["role"] == "assistant"}
    return Turns(
        prompt.messages + completion.messages,
        frozenset(before | {begin + n for n in completion.untrained}),
    )


def detect(record: Record) -> bool:
    return isinstance(record.get("prompt"), list) and "completion" in record


def write(example: Example) -> dict[str, Any]:
    begin = completion_start(example)
    return {
        "prompt": write_turns(example, 0, begin),
        "completion": write_turns(example, begin),
        **write_tools(example),
    }


def completion_start(example: Example) -> int:
    """Where the completion begins; of other conversations, the first turn that is trained on."""
    if example.begin:
        return example.begin
    for number, message in enumerate(example.messages):
        if number and message["role"] == "assistant" and number not in example.untrained:
            return number
    raise CannotHold("it has no answer behind a prompt")


FORMAT = Format(
    5,
    '{"prompt": [messages], "completion"}',
    frozenset({"prompt", "completion", "tools"}),
    detect,
    read,
    write,
    trained="the completions",
)
