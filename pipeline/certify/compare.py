"""A program's answers against those of the adapter's own library: what is not the same."""

from collections.abc import Iterable, Iterator, Sequence
from math import isfinite
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


class Limits(NamedTuple):
    """How near two programs must be, as rms differences of log-probabilities."""

    still: float  # up to this, nothing has moved
    rounding: float  # how far the base alone is apart

    def acts(self, moved: float) -> bool:
        """Whether logits have moved; NaN have not."""
        return moved > self.still

    def agree(self, missed: float, effect: float) -> bool:
        """Whether a program has an effect, of which it misses this much."""
        return missed <= MISSED * effect + 2 * self.rounding + self.still


def distance(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """The rms difference of log-probabilities, which a constant added to logits does not change.

    Of as many prompts as both have: groups are compared on the first ones.
    """
    squares = [
        (p.log_softmax(-1) - q.log_softmax(-1)).square().mean()
        for p, q in zip(ours, theirs, strict=False)
    ]
    return float(torch.stack(squares).mean().sqrt())


def size(logits: Sequence[Tensor]) -> float:
    """The rms of logits about their mean."""
    squares = [(row - row.mean(-1, keepdim=True)).square().mean() for row in logits]
    return float(torch.stack(squares).mean().sqrt())


def itself(expected: Answers) -> list[str]:
    """What is wrong with an adapter in its own library."""
    limits = Limits(STILL * size(expected.base), 0.0)
    problems = [*_keys(expected)]
    effect = distance(expected.base, expected.tuned)
    if not isfinite(effect):
        return [*problems, "its answers are no finite numbers"]
    if not limits.acts(effect):
        return [*problems, "it changes nothing: base + adapter answers as the base does"]
    dead = [
        name
        for name, logits in expected.groups.items()
        if not limits.acts(distance(expected.tuned, logits))
    ]
    if dead:
        problems.append(f"no effect of {_named(dead)}")
    return problems


def against(expected: Answers, found: Answers) -> tuple[dict[str, Any], list[str]]:
    """Entries of the certificate, and what is not as expected."""
    if found.opened.rows != expected.opened.rows:
        rows = f"it has {found.opened.rows} tokens, the reference {expected.opened.rows}"
        return {}, [f"{rows} (is it another base?)"]
    limits = Limits(STILL * size(expected.base), distance(expected.base, found.base))
    effect = distance(expected.base, expected.tuned)
    missed = distance(expected.tuned, found.tuned)
    acting, problems = _groups(expected, found, limits)
    problems = [*_keys(found), *_whole(found, limits, effect, missed), *problems]
    entry = {
        **difference_of(zip(expected.tuned, found.tuned, strict=True))._asdict(),
        "base_difference": limits.rounding,
        "effect": effect,
        "missed": missed,
        "groups": len(expected.groups),
        "groups_that_act": acting,
        "same_greedy_text": expected.greedy == found.greedy,
    }
    # JSON has no NaN
    numbers = {key: None if _is_none(value) else value for key, value in entry.items()}
    return numbers, problems


def _is_none(value: object) -> bool:
    return isinstance(value, float) and not isfinite(value)


def _whole(found: Answers, limits: Limits, effect: float, missed: float) -> Iterator[str]:
    """What is not as expected with all groups at once."""
    if not limits.rounding <= max(limits.still, MISSED * effect):
        yield f"the base alone differs by {limits.rounding:.1e} (rms of log-probabilities)"
    if not limits.acts(distance(found.base, found.tuned)):
        yield "the adapter has no effect: it answers as the base does"
    elif not limits.agree(missed, effect):
        yield f"{missed / max(effect, 1e-30):.0%} of the adapter's effect is missing"


def _groups(expected: Answers, found: Answers, limits: Limits) -> tuple[int, list[str]]:
    """The number of groups that act, those that should and do not, and that act otherwise."""
    acting, dead, other = 0, [], []
    for name, ours in expected.groups.items():
        theirs = found.groups[name]
        effect = distance(expected.tuned, ours)
        acts = limits.acts(distance(found.tuned, theirs))
        acting += acts
        if limits.acts(effect) and not acts:
            dead.append(name)
        elif not limits.agree(distance(ours, theirs), effect):
            other.append(name)
    problems = [f"no effect of {_named(dead)}"] * bool(dead)
    return acting, problems + [f"another effect of {_named(other)}"] * bool(other)


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
