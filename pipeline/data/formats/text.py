"""{"text": …}: all of the text is trained on, as in a line of a .txt file."""

from pipeline.data.examples import Example
from pipeline.data.formats import Format, Record, read_string


def detect(record: Record) -> bool:
    # A prompt beside it may be its beginning or not: nobody could tell what is to be trained on.
    return "text" in record and "prompt" not in record


def read(record: Record, file: str, line: int) -> Example:
    return Example(read_string(record, "text", f"{file}:{line}"), file, line)


FORMAT = Format(7, '{"text"}', frozenset({"text"}), detect, read, mixes=True, trained="all of it")
