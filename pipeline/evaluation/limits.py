"""The gate: whether the models keep to evaluate.limits."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pipeline.data.answers.match import share
from pipeline.project.gate import MINIMUMS, Broken


def verdict(
    limits: Mapping[str, Any], metrics: Mapping[str, Any], variants: Sequence[str]
) -> dict[str, Any]:
    """For metrics.json: whether all `variants` keep all limits, and what was broken."""
    broken = [one for name in variants for one in _broken(limits, metrics[name], name)]
    return {
        "passed": not broken,
        "variants": list(variants),
        "broken": [one._asdict() for one in broken],
    }


def _broken(
    limits: Mapping[str, Any], numbers: Mapping[str, Any], variant: str
) -> Iterator[Broken]:
    for key, wanted, value in _compared(limits, numbers):
        at_least = key.partition(".")[0] in MINIMUMS
        # NaN keeps no limit
        if value is None or not (value >= wanted if at_least else value <= wanted):
            yield Broken(variant, key, wanted, value)


def _compared(
    limits: Mapping[str, Any], numbers: Mapping[str, Any]
) -> Iterator[tuple[str, float, float | None]]:
    """Each limit's name, its number, and what was measured."""
    forgetting, tasks = numbers.get("forgetting", {}), numbers.get("tasks", {})
    measured = {
        "new_loss": numbers.get("new_loss"),
        "old_loss_rise": forgetting.get("loss_rise"),
        "answers_kept": forgetting.get("answers_kept"),
        "divergence": forgetting.get("divergence"),
        "answers": share(numbers.get("answers", {})),
    }
    if prompts := numbers.get("old_prompts"):
        measured["must_keep"] = numbers["old_prompts_kept"] / prompts
    for key, wanted in limits.items():
        if key == "tasks":
            yield from (
                (f"tasks.{name}", least, tasks.get(name, {}).get("score"))
                for name, least in wanted.items()
            )
        elif key == "task_drop":
            yield from (
                (f"task_drop.{name}", wanted, -task["difference"]["score"])
                for name, task in tasks.items()
            )
        elif key != "variants":
            yield key, wanted, measured.get(key)
