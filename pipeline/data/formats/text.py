"""{"text": …}: all of the text is trained on, as in a line of a .txt file."""

from pipeline.data.examples import Example
from pipeline.data.formats import Format, Record, read_string


def read(record: Record, file: str, line: int) -> Example:
    return Example(read_string(record, "text", f"{file}:{line}"), file, line)


FORMAT = Format(1, '{"text"}', lambda record: set(record) == {"text"}, read)
