"""{"prompt": …, "completion": …}: the completion is trained on.

{"prompt": …} alone is for the model to complete.
"""

from typing import Any

from pipeline.data.examples import Example
from pipeline.data.formats import CannotHold, Format, Record, read_string


def detect(record: Record) -> bool:
    return "prompt" in record and ("completion" in record or "text" not in record)


def read(record: Record, file: str, line: int) -> Example:
    prompt, *completion = (
        read_string(record, key, f"{file}:{line}")
        for key in ("prompt", "completion")
        if key in record
    )
    return Example("".join([prompt, *completion]), file, line, prompt)


def write(example: Example) -> dict[str, Any]:
    if not (example.prompt or "").strip():
        raise CannotHold("it has no prompt")
    return {"prompt": example.prompt, "completion": example.completion}


FORMAT = Format(
    6,
    '{"prompt", "completion"}',
    frozenset({"prompt", "completion"}),
    detect,
    read,
    write,
    mixes=True,
    trained="the completions",
)
