"""{"prompt": …, "completion": …}: the completion is trained on; {"prompt": …} alone is for the
model to complete.
"""

from pipeline.data.examples import Example
from pipeline.data.formats import Format, Record, read_string


def detect(record: Record) -> bool:
    return "prompt" in record and ("completion" in record or "text" not in record)


def read(record: Record, file: str, line: int) -> Example:
    prompt, *completion = (
        read_string(record, key, f"{file}:{line}")
        for key in ("prompt", "completion")
        if key in record
    )
    return Example("".join([prompt, *completion]), file, line, prompt)


FORMAT = Format(
    6,
    '{"prompt", "completion"}',
    frozenset({"prompt", "completion"}),
    detect,
    read,
    mixes=True,
    trained="the completions",
)
