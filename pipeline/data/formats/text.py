"""{"text": …}: all of the text is trained on, as in a line of a .txt file."""

from typing import Any

from pipeline.data.examples import Example
from pipeline.data.formats import CannotHold, Format, Record, read_string


def detect(record: Record) -> bool:
    # A prompt beside it may be its beginning or not: nobody could tell what is to be trained on.
    return "text" in record and "prompt" not in record


def read(record: Record, file: str, line: int) -> Example:
    return Example(read_string(record, "text", f"{file}:{line}"), file, line)


def write(example: Example) -> dict[str, Any]:
    if example.messages or example.prompt is not None:
        raise CannotHold("a text does not say which part of it is trained on")
    return {"text": example.text}


FORMAT = Format(
    7, '{"text"}', frozenset({"text"}), detect, read, write, mixes=True, trained="all of it"
)
