"""{"instruction": …, "input": …, "output": …}: Alpaca's, also with LLaMA-Factory's `system` and
`history`.

With a chat template it is a conversation, as other tools make of it: the instruction and the input
on a line of its own are the user's turn, and the output is the assistant's, which is trained on.
`history` holds earlier [instruction, output] pairs.
"""

from pipeline.data.containers import describe_type
from pipeline.data.examples import Example, Message
from pipeline.data.formats import Format, Record, read_list, read_optional, read_string
from pipeline.data.formats.messages import Turns, conversation
from pipeline.errors import UserError


def read(record: Record, file: str, line: int) -> Example:
    location = f"{file}:{line}"
    system, question = (
        read_optional(record, "system", location),
        read_optional(record, "input", location),
    )
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    for number, pair in enumerate(
        read_list(record, "history", location) if record.get("history") else []
    ):
        where = f"{location}: history[{number}]"
        if not isinstance(pair, list) or len(pair) != 2:
            raise UserError(
                f"{where} must be a pair [instruction, output], got {describe_type(pair)}."
            )
        turns = dict(zip(("instruction", "output"), pair, strict=True))
        messages += _exchange(*(read_string(turns, key, where) for key in turns))
    instruction, output = (read_string(record, key, location) for key in ("instruction", "output"))
    messages += _exchange(f"{instruction}\n{question}" if question else instruction, output)
    return conversation(Turns(tuple(messages)), {}, file, line, "the row")


def _exchange(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


FORMAT = Format(
    4,
    '{"instruction", "input", "output"}',
    frozenset({"instruction", "input", "output", "system", "history"}),
    lambda record: "instruction" in record and "output" in record,
    read,
    trained="the outputs",
)
