"""What a program computes of a base, of an adapter on it, and of copies with one group changed."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from pipeline.adapters.config import WEIGHTS
from pipeline.certify.groups import changed, copy_of, grouped
from pipeline.certify.process import Opened, Process
from pipeline.files.safetensors_file import read_header


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
    groups: Mapping[str, list[Tensor]]  # with the tensors of that group changed; of `short`
    greedy: list[int]


class Checked(NamedTuple):
    """An adapter, and the base that it is checked on."""

    adapter: Path
    base: Path
    trust_remote_code: bool = False


def ask(process: Process, checked: Checked, question: Question, room: Path) -> Answers:
    """Let a program answer; `room`: a folder for the copy. Raises UserError with its reason."""
    adapter, base, trust = checked
    of_base = _logits(process, process.open(base, None, trust), question.prompts)
    opened = process.open(base, adapter, trust)
    tuned = _logits(process, opened, question.prompts)
    greedy = process.generate(question.start, question.limit, question.ends)

    copy = room / "copy"
    copy_of(adapter, copy)
    file = copy / WEIGHTS
    groups = dict[str, list[Tensor]]()
    for number, (group, names) in enumerate(grouped(read_header(file)).items()):
        with changed(file, names, seed=number):
            again = process.open(base, copy, trust)
        groups[group] = _logits(process, again, question.short)
    return Answers(process.name, opened, of_base, tuned, groups, greedy)


def _logits(process: Process, opened: Opened, prompts: Sequence[Sequence[int]]) -> list[Tensor]:
    return [process.logits(ids, opened.rows) for ids in prompts]
