"""The gate: whether the models keep to evaluate.limits."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pipeline.data.answers.match import share
from pipeline.project.gate import MINIMUMS, Broken

Numbers = Mapping[str, Any]


def verdict(limits: Numbers, metrics: Numbers, variants: Sequence[str]) -> dict[str, Any]:
    """For metrics.json: whether all `variants` keep all limits, and what was broken."""
    broken = []
    for variant in variants:
        for key, wanted, value in _compared(limits, metrics[variant]):
            at_least = key.partition(".")[0] in MINIMUMS
            # NaN keeps no limit
            if value is None or not (value >= wanted if at_least else value <= wanted):
                broken.append(Broken(variant, key, wanted, value)._asdict())
    return {"passed": not broken, "variants": list(variants), "broken": broken}


def _compared(limits: Numbers, numbers: Numbers) -> Iterator[tuple[str, float, float | None]]:
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
            for name, least in wanted.items():
                yield f"tasks.{name}", least, tasks.get(name, {}).get("score")
        elif key == "task_drop":
            for name, task in tasks.items():
                yield f"task_drop.{name}", wanted, -task["difference"]["score"]
        elif key != "variants":
            yield key, wanted, measured.get(key)
