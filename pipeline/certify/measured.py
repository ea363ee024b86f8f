"""What a program computes of a base, of what is certified, and of copies with one group changed."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from pipeline.certify.engines import Opens
from pipeline.certify.groups import changed, copy_of, grouped
from pipeline.certify.kinds import Checked
from pipeline.certify.process import Opened, Process


class Question(NamedTuple):
    """What every program is asked."""

    prompts: Sequence[Sequence[int]]  # ids
    short: Sequence[Sequence[int]]  # the first of them, on which groups are compared
    start: Sequence[int]  # what is continued
    limit: int  # tokens of the continuation
    ends: Sequence[int]  # ids


class Answers(NamedTuple):
    """A program's answers: logits in fp32, (T, V) a prompt."""

    name: str  # of the program, with its version
    opened: Opened
    base: list[Tensor]
    tuned: list[Tensor]
    again: list[Tensor]  # as `tuned`, of another time that it was opened; of `short`
    groups: Mapping[str, list[Tensor]]  # with the tensors of that group changed; of `short`
    greedy: list[int]


def ask(
    process: Process,
    opens: Opens,
    checked: Checked,
    question: Question,
    room: Path,
    by_group: bool = True,
) -> Answers:
    """Let a program answer; `room`: a folder for the copy. Raises UserError with its reason."""
    trust = checked.trust_remote_code

    def open_(subject: Path | None) -> Opened:
        return process.open(*opens(subject), trust)

    of_base = _logits(process, open_(None), question.prompts)
    again = _logits(process, open_(checked.folder), question.short)
    opened = open_(checked.folder)
    tuned = _logits(process, opened, question.prompts)
    greedy = process.generate(question.start, question.limit, question.ends)

    groups = dict[str, list[Tensor]]()
    if by_group:
        tensors = checked.tensors
        copy = room / "copy"
        copy_of(checked.folder, copy, {tensor.file for tensor in tensors.values()})
        for number, (group, names) in enumerate(grouped(tensors).items()):
            # another name each time: programs keep what they have opened
            copy = copy.rename(room / f"copy{number}")
            with changed(copy, [tensors[name] for name in names], seed=number):
                groups[group] = _logits(process, open_(copy), question.short)
    return Answers(process.name, opened, of_base, tuned, again, groups, greedy)


def _logits(process: Process, opened: Opened, prompts: Sequence[Sequence[int]]) -> list[Tensor]:
    return [process.logits(ids, opened.rows) for ids in prompts]
