"""{"prompt": …, "chosen": …, "rejected": …}: a preference pair, as TRL has it.

Fine-tuning on answers themselves takes the chosen one. Texts, or lists of messages. Without a
prompt, both hold the whole conversation, and the prompt is the turns that they begin with in
common.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pipeline.data.containers import describe_type
from pipeline.data.examples import Example, Message
from pipeline.data.formats import CannotHold, Format, Record, read_string
from pipeline.data.formats.chat_prompt import answer, completion_start, joined
from pipeline.data.formats.messages import (
    Turns,
    conversation,
    read_turns,
    write_tools,
    write_turns,
)
from pipeline.errors import UserError


def read(record: Record, file: str, line: int) -> Example:
    location = f"{file}:{line}"
    prompt = record.get("prompt")
    kinds = [describe_type(record[key]) for key in ("chosen", "rejected")]
    if len(set(kinds)) > 1:
        raise UserError(
            f"{location}: chosen and rejected must be of one kind, got {kinds[0]} and {kinds[1]}."
        )
    if isinstance(record["chosen"], str) and not isinstance(prompt, list):
        good, bad = (read_string(record, key, location) for key in ("chosen", "rejected"))
        if prompt is None:
            # a space belongs to the answer's first word
            prompt = good[: _shared(good, bad)].removesuffix(" ")
            good, bad = good[len(prompt) :], bad[len(prompt) :]
            _refuse_without_answers(good.strip(), bad.strip(), location)
        else:
            prompt = read_string(record, "prompt", location)
        return Example(prompt + good, file, line, prompt, rejected=bad)
    chosen, rejected = answer(record, "chosen", location), answer(record, "rejected", location)
    if isinstance(prompt, list):
        before = read_turns(record, "prompt", location)
    elif prompt is not None and chosen.messages[0]["role"] == "assistant":
        before = Turns(({"role": "user", "content": read_string(record, "prompt", location)},))
    else:  # whole conversations; a text beside them repeats their first question
        same = _shared(chosen.messages, rejected.messages)
        before, chosen, rejected = (
            Turns(chosen.messages[:same]),
            _behind(chosen, same),
            _behind(rejected, same),
        )
    _refuse_without_answers(chosen.messages, rejected.messages, location)
    conversation(joined(before, rejected), {}, file, line, "prompt + rejected")  # for its errors
    example = conversation(joined(before, chosen), record, file, line, "prompt + chosen")
    return replace(example, begin=len(before.messages), rejected=rejected.messages)


def _shared(chosen: Sequence[object], rejected: Sequence[object]) -> int:
    """How many items both begin with."""
    pairs = enumerate(zip(chosen, rejected, strict=False))
    differs = (number for number, (good, bad) in pairs if good != bad)
    return next(differs, min(len(chosen), len(rejected)))


def _refuse_without_answers(
    chosen: str | tuple[Message, ...], rejected: str | tuple[Message, ...], location: str
) -> None:
    if not chosen or not rejected:
        raise UserError(
            f"{location}: chosen and rejected do not end in two answers: one begins with the "
            "other. Remove the row."
        )


def _behind(turns: Turns, begin: int) -> Turns:
    return Turns(
        turns.messages[begin:], frozenset(n - begin for n in turns.untrained if n >= begin)
    )


def write(example: Example) -> dict[str, Any]:
    if isinstance(example.rejected, str):
        prompt = example.prompt or ""
        if not prompt.strip():  # what both answers begin with, as no row has a blank prompt
            return {"chosen": example.text, "rejected": prompt + example.rejected}
        return {"prompt": prompt, "chosen": example.completion, "rejected": example.rejected}
    if not example.rejected:
        raise CannotHold("it has no rejected answer")
    begin = completion_start(example)
    # the two prompts differ, and the example does not say where the rejected answer begins
    if example.rejected[0]["role"] != "assistant":
        raise CannotHold("its rejected answer does not begin with an assistant turn")
    return {
        "prompt": write_turns(example, 0, begin),
        "chosen": write_turns(example, begin),
        "rejected": list(example.rejected),
        **write_tools(example),
    }


FORMAT = Format(
    1,
    '{"prompt", "chosen", "rejected"}',
    frozenset({"prompt", "chosen", "rejected", "tools"}),
    lambda record: "chosen" in record and "rejected" in record,
    read,
    write,
    trained="the chosen answers",
)
