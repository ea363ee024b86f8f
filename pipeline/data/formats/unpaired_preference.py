"""{"prompt": …, "completion": …, "label": true or false}: an answer, and whether it is a good one.

As in TRL's KTO. Fine-tuning on answers themselves takes the good ones.
"""

from dataclasses import replace
from typing import Any

from pipeline.data.examples import Example
from pipeline.data.formats import Format, Record, chat_prompt, prompt_completion

# a .csv file holds texts, others numbers too: pandas writes 1.0 where a row of the column is empty
LABELS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}


def detect(record: Record) -> bool:
    return (
        str(record.get("label")).lower() in LABELS and "prompt" in record and "completion" in record
    )


def read(record: Record, file: str, line: int) -> Example:
    read_answer = chat_prompt.read if chat_prompt.detect(record) else prompt_completion.read
    return replace(read_answer(record, file, line), desirable=LABELS[str(record["label"]).lower()])


def write(example: Example) -> dict[str, Any]:
    answer = chat_prompt if example.messages else prompt_completion
    return {**answer.write(example), "label": bool(example.desirable)}


FORMAT = Format(
    0,
    '{"prompt", "completion", "label"}',
    frozenset({"prompt", "completion", "label", "tools"}),
    detect,
    read,
    write,
    trained="the completions labelled true",
)
