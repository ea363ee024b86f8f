"""{"prompt": …, "completion": …}: the completion is trained on; {"prompt": …} alone is for the model to complete."""

from pipeline.data.examples import Example
from pipeline.data.formats import Format, Record, read_string


def detect(record: Record) -> bool:
    return set(record) in ({"prompt", "completion"}, {"prompt"})


def read(record: Record, file: str, line: int) -> Example:
    prompt, *completion = (
        read_string(record, key, f"{file}:{line}") for key in ("prompt", "completion") if key in record
    )
    return Example("".join([prompt, *completion]), file, line, prompt)


FORMAT = Format(2, '{"prompt", "completion"}', detect, read)
