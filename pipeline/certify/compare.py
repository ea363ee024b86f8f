"""A program's answers against those of the format's own library: what is not the same.

In fp32 they are the same but for little. In fewer bits the base rounds too: there the adapter's
effect is compared, which is what it adds to each program's own base.
"""

from collections.abc import Iterator, Sequence
from math import isfinite, nan
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline.certify.groups import listed
from pipeline.certify.measured import Answers
from pipeline.inference.score import difference_of

# Share of the adapter's effect by which a program in fp32 may miss it. Measured: below 2e-5 between
# versions of PEFT; one matrix of ten that is not loaded is above 3e-2.
MISSED = 2e-3
# Below this share of the logits' own size, nothing has moved.
STILL = 1e-6
# By how much the share of an effect may differ from 1 where numbers are rounded; what is not named
# here is quantized.
SHARES = {"f32": 0.05, "f16": 0.1, "bf16": 0.2}
QUANTIZED = 0.3


class Limits(NamedTuple):
    """How near two programs must be, as rms differences of log-probabilities."""

    still: float  # up to this, nothing has moved
    base: float  # how far the base alone is apart
    share: float | None = None  # by which the effect may differ from all of it; None in fp32

    @property
    def compares_groups(self) -> bool:
        """Quantized, what a group changes is below what activations round: a program that rounds
        them to q8_0 moves SmolLM2 by 0.15 to 0.2 whatever changes, where the effect is 0.03.
        """
        return self.share != QUANTIZED

    def acts(self, moved: float) -> bool:
        """Whether logits have moved; NaN have not."""
        return moved > self.still

    def agree(self, missed: float, effect: float, share: float) -> bool:
        """Whether a program has an effect, of which it misses this much."""
        if self.share is None:
            return missed <= MISSED * effect + 2 * self.base + self.still
        return abs(share - 1) <= self.share or effect <= self.still


def limits_of(expected: Answers, found: Answers, rounding: str | None) -> Limits:
    """`rounding`: the kind of numbers of either, such as f16 or q4_k_m; None for fp32."""
    share = None if rounding is None else SHARES.get(rounding, QUANTIZED)
    return Limits(STILL * size(expected.base), distance(expected.base, found.base), share)


def share_of(effect: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    """How much of an effect is in another: 1 for all of it, 0 for nothing, 2 for twice."""
    dot = sum(float((ours * theirs).sum()) for ours, theirs in zip(effect, found, strict=True))
    square = sum(float(ours.square().sum()) for ours in effect)
    return dot / square if square else 0.0


def effect_of(before: Sequence[Tensor], after: Sequence[Tensor]) -> list[Tensor]:
    """What log-probabilities changed by, on as many prompts as both have."""
    return [q.log_softmax(-1) - p.log_softmax(-1) for p, q in zip(before, after, strict=False)]


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
    """What is wrong with it in its own library."""
    limits = Limits(STILL * size(expected.base), 0.0)
    problems = [*_keys(expected)]
    effect = distance(expected.base, expected.tuned)
    if not isfinite(effect):
        return [*problems, "its answers are no finite numbers"]
    if not limits.acts(effect):
        return [*problems, "it changes nothing: it answers as the base does"]
    if not limits.agree(distance(expected.tuned, expected.again), effect, 1):
        # PEFT draws random numbers for pissa_niter, and takes the result from the base
        problems.append("it answers differently each time that it is opened")
    dead = [
        name
        for name, logits in expected.groups.items()
        if not limits.acts(distance(expected.tuned, logits))
    ]
    if dead:
        problems.append(f"no effect of {listed(dead)}")
    return problems


def against(
    expected: Answers, found: Answers, rounding: str | None = None
) -> tuple[dict[str, Any], list[str]]:
    """Entries of the certificate, and what is not as expected. `rounding` as in `limits_of`."""
    if found.opened.rows != expected.opened.rows:
        rows = f"it has {found.opened.rows} tokens, the reference {expected.opened.rows}"
        return {}, [f"{rows} (is it another base?)"]
    limits = limits_of(expected, found, rounding)
    entry = compared(expected, found)
    effect, missed, share = (_number(entry[key]) for key in ("effect", "missed", "share"))
    acting, problems = _groups(expected, found, limits)
    problems = [*_keys(found), *_whole(found, limits, effect, missed, share), *problems]
    groups = {"groups": len(expected.groups), "groups_that_act": acting}
    return {**entry, **groups}, problems


def compared(expected: Answers, found: Answers) -> dict[str, Any]:
    """Entries of the certificate; None for what is no finite number. {} without the same rows."""
    if found.opened.rows != expected.opened.rows:
        return {}
    tuned, base = (
        zip(ours, theirs, strict=True)
        for ours, theirs in ((expected.tuned, found.tuned), (expected.base, found.base))
    )
    effects = effect_of(expected.base, expected.tuned), effect_of(found.base, found.tuned)
    entry = {
        **difference_of(tuned)._asdict(),
        "base_difference": distance(expected.base, found.base),
        "base_divergence": difference_of(base).divergence,
        "effect": distance(expected.base, expected.tuned),
        "missed": distance(expected.tuned, found.tuned),
        "share": share_of(*effects),
        "same_greedy_text": expected.greedy == found.greedy,
    }
    # JSON has no NaN
    return {key: None if _is_none(value) else value for key, value in entry.items()}


def _number(value: float | None) -> float:
    return nan if value is None else value


def _is_none(value: object) -> bool:
    return isinstance(value, float) and not isfinite(value)


def _whole(
    found: Answers, limits: Limits, effect: float, missed: float, share: float
) -> Iterator[str]:
    """What is not as expected with all groups at once."""
    if limits.share is None and not limits.base <= max(limits.still, MISSED * effect):
        yield f"the base alone differs by {limits.base:.1e} (rms of log-probabilities)"
    if not limits.acts(distance(found.base, found.tuned)):
        yield "it has no effect: base and adapter answer as the base does"
    elif not limits.agree(missed, effect, share):
        if limits.share is None:
            yield f"{missed / max(effect, 1e-30):.0%} of the effect is missing"
        else:
            yield f"the effect is {share:.2f} times what it should be"


def _groups(expected: Answers, found: Answers, limits: Limits) -> tuple[int, list[str]]:
    """The number of groups that act, those that should and do not, and that act otherwise."""
    acting, dead, other = 0, [], []
    for name, ours in expected.groups.items():
        theirs = found.groups[name]
        effect, missed = distance(expected.tuned, ours), distance(ours, theirs)
        share = share_of(effect_of(expected.tuned, ours), effect_of(found.tuned, theirs))
        acts = limits.acts(distance(found.tuned, theirs))
        acting += acts
        if limits.acts(effect) and not acts:
            dead.append(name)
        elif limits.compares_groups and not limits.agree(missed, effect, share):
            other.append(name)
    problems = [f"no effect of {listed(dead)}"] * bool(dead)
    return acting, problems + [f"another effect of {listed(other)}"] * bool(other)


def _keys(answers: Answers) -> Iterator[str]:
    for names, what in (
        (answers.opened.unread, "not read as stored"),
        (answers.opened.missing, "not in the files"),
    ):
        if names:
            yield f"{len(names)} keys {what}: {listed(names)}"
