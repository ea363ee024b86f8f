"""A program's answers against those of the adapter's own library: what is not the same."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline.certify.measured import Answers
from pipeline.inference.score import difference_of

# Share of the adapter's effect by which a program in fp32 may miss it. Measured: below 2e-5 between
# versions of PEFT; one matrix of ten that is not loaded is above 3e-2.
MISSED = 2e-3
# Below this share of the logits' own size, nothing has moved.
STILL = 1e-6
MOST_NAMES = 3  # of groups in a sentence


class Effect(NamedTuple):
    """How far a group moves the logits: in the adapter's library, and in the program."""

    expected: float
    moved: float
    missed: float  # how far the two are from each other


def distance(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """The rms difference of log-probabilities, which a constant added to logits does not change."""
    squares = [
        (p.log_softmax(-1) - q.log_softmax(-1)).square().mean()
        for p, q in zip(ours, theirs, strict=True)
    ]
    return float(torch.stack(squares).mean().sqrt())


def size(logits: Sequence[Tensor]) -> float:
    """The rms of logits about their mean."""
    squares = [(row - row.mean(-1, keepdim=True)).square().mean() for row in logits]
    return float(torch.stack(squares).mean().sqrt())


def itself(expected: Answers) -> list[str]:
    """What is wrong with an adapter in its own library."""
    still = STILL * size(expected.base)
    problems = [*_keys(expected)]
    if not distance(expected.base, expected.tuned) > still:
        return [*problems, "it changes nothing: base + adapter answers as the base does"]
    short = expected.tuned[: len(next(iter(expected.groups.values())))]
    dead = [name for name, logits in expected.groups.items() if not distance(short, logits) > still]
    if dead:
        problems.append(f"no effect of {_named(dead)}")
    return problems


def against(expected: Answers, found: Answers) -> tuple[dict[str, Any], list[str]]:
    """Entries of the certificate, and what is not as expected."""
    if found.opened.rows != expected.opened.rows:
        rows = f"it has {found.opened.rows} tokens, the reference {expected.opened.rows}"
        return {}, [f"{rows} (is it another base?)"]
    problems = [*_keys(found)]
    still = STILL * size(expected.base)
    rounding = distance(expected.base, found.base)
    effect = distance(expected.base, expected.tuned)
    missed = distance(expected.tuned, found.tuned)
    pairs = zip(expected.tuned, found.tuned, strict=True)
    entry: dict[str, Any] = {
        **difference_of(pairs)._asdict(),
        "base_difference": rounding,
        "effect": effect,
        "missed": missed,
        "same_greedy_text": expected.greedy == found.greedy,
    }
    if rounding > max(still, MISSED * effect):
        problems.append(f"the base alone differs by {rounding:.1e} (rms of log-probabilities)")
    if not distance(found.base, found.tuned) > still:
        problems.append("the adapter has no effect: it answers as the base does")
    elif not missed <= MISSED * effect + 2 * rounding + still:
        problems.append(f"{missed / max(effect, 1e-30):.0%} of the adapter's effect is missing")
    groups = {name: _effect(expected, found, name) for name in expected.groups}
    problems += _dead(groups, still, rounding)
    return {**entry, "groups": {name: group._asdict() for name, group in groups.items()}}, problems


def _effect(expected: Answers, found: Answers, name: str) -> Effect:
    ours, theirs = expected.groups[name], found.groups[name]
    short, shorter = expected.tuned[: len(ours)], found.tuned[: len(theirs)]
    return Effect(distance(short, ours), distance(shorter, theirs), distance(ours, theirs))


def _dead(groups: dict[str, Effect], still: float, rounding: float) -> Iterator[str]:
    """Groups that move nothing, and those that move something else."""
    moving = {name: group for name, group in groups.items() if group.expected > still}
    dead = [name for name, group in moving.items() if not group.moved > still]
    if dead:
        yield f"no effect of {_named(dead)}"
    partly = [
        name
        for name, group in moving.items()
        if name not in dead and not group.missed <= MISSED * group.expected + 2 * rounding + still
    ]
    if partly:
        yield f"another effect of {_named(partly)}"


def _keys(answers: Answers) -> Iterator[str]:
    for names, what in (
        (answers.opened.unread, "not read as stored"),
        (answers.opened.missing, "not in the files"),
    ):
        if names:
            yield f"{len(names)} keys {what}: {_named(names)}"


def _named(names: Iterable[str]) -> str:
    listed = list(names)
    more = len(listed) - MOST_NAMES
    return ", ".join(listed[:MOST_NAMES]) + (f" and {more} more" if more > 0 else "")
