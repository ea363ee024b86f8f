"""{"instruction": …, "input": …, "output": …}: Alpaca's, with LLaMA-Factory's `system`, `history`.

With a chat template it is a conversation, as other tools make of it: the instruction and the input
on a line of its own are the user's turn, and the output is the assistant's, which is trained on.
`history` holds earlier [instruction, output] pairs.
"""

from typing import Any

from pipeline.data.containers import describe_type
from pipeline.data.examples import Example, Message
from pipeline.data.formats import (
    CannotHold,
    Format,
    Record,
    read_list,
    read_optional,
    read_string,
)
from pipeline.data.formats.messages import Turns, conversation, refuse_more_than_texts
from pipeline.errors import UserError


def read(record: Record, file: str, line: int) -> Example:
    location = f"{file}:{line}"
    system = read_optional(record, "system", location)
    question = read_optional(record, "input", location)
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    history = read_list(record, "history", location) if record.get("history") else []
    for number, pair in enumerate(history):
        where = f"{location}: history[{number}]"
        if not isinstance(pair, list) or len(pair) != 2:
            raise UserError(
                f"{where} must be a pair [instruction, output], got {describe_type(pair)}."
            )
        turns = {"instruction": pair[0], "output": pair[1]}
        messages += _exchange(*(read_string(turns, key, where) for key in turns))
    instruction, output = (read_string(record, key, location) for key in ("instruction", "output"))
    messages += _exchange(f"{instruction}\n{question}" if question else instruction, output)
    return conversation(Turns(tuple(messages)), {}, file, line, "the row")


def _exchange(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def write(example: Example) -> dict[str, Any]:
    refuse_more_than_texts(example)
    roles = [message["role"] for message in example.messages]
    texts = [str(message["content"]) for message in example.messages]
    system = texts.pop(0) if roles[0] == "system" else ""
    if roles[bool(system) :] != ["user", "assistant"] * (len(texts) // 2):
        raise CannotHold("its turns are not questions of a user with one answer each")
    *history, (instruction, output) = zip(texts[::2], texts[1::2], strict=True)
    record: dict[str, Any] = {"instruction": instruction, "input": "", "output": output}
    if system:
        record["system"] = system
    if history:
        record["history"] = [list(pair) for pair in history]
    return record


FORMAT = Format(
    4,
    '{"instruction", "input", "output"}',
    frozenset({"instruction", "input", "output", "system", "history"}),
    lambda record: "instruction" in record and "output" in record,
    read,
    write,
    trained="the outputs",
)
