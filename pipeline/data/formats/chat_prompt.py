"""{"prompt": [messages], "completion": [messages] or a text}: TRL's conversational
prompt-completion.

Only the completion is trained on: turns of the assistant in the prompt carry no label.
"""

from dataclasses import replace

from pipeline.data.examples import Example
from pipeline.data.formats import Format, Record, read_string
from pipeline.data.formats.messages import Turns, conversation, read_turns


def read(record: Record, file: str, line: int) -> Example:
    location = f"{file}:{line}"
    prompt, completion = (
        read_turns(record, "prompt", location),
        answer(record, "completion", location),
    )
    example = conversation(joined(prompt, completion), record, file, line, "prompt + completion")
    return replace(example, begin=len(prompt.messages))


def answer(record: Record, key: str, location: str) -> Turns:
    """The turns behind a prompt: a list of messages, or a text, which is the assistant's turn.
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


FORMAT = Format(
    5,
    '{"prompt": [messages], "completion"}',
    frozenset({"prompt", "completion", "tools"}),
    detect,
    read,
    trained="the completions",
)
