"""Each limit is kept at its number and broken beyond; what was not measured keeps none."""

import math
from collections.abc import Mapping
from typing import Any

import pytest

from pipeline.errors import UserError
from pipeline.evaluation.kinds import KINDS
from pipeline.evaluation.limits import verdict
from pipeline.project.gate import AGAIN, RETAIN, Verdict, read_verdict
from pipeline.project.params.schema import ValueSource, check_value, hints
from pipeline.project.params.sections import LIMITS, Evaluate
from tests.helpers.errors import user_error
from tests.helpers.projects import ROOT

MEASURED: dict[str, Any] = {
    "new_loss": 2.0,
    "forgetting": {"loss_rise": 0.1, "answers_kept": 0.9, "divergence": 0.5},
    "answers": {"n": 20, "as_expected": 15},
    "old_prompts": 4,
    "old_prompts_kept": 3,
    "tasks": {
        "capitals": {"score": 0.8, "difference": {"score": -0.05}},
        "sums": {"score": 1.0, "difference": {"score": 0.5}},
    },
}
# limit → a number that is just kept, one that is just broken, its name in the verdict, the value
AT = {
    "new_loss": (2.0, 1.999, "new_loss", 2.0),
    "old_loss_rise": (0.1, 0.099, "old_loss_rise", 0.1),
    "answers_kept": (0.9, 0.901, "answers_kept", 0.9),
    "divergence": (0.5, 0.499, "divergence", 0.5),
    "answers": (0.75, 0.751, "answers", 0.75),
    "must_keep": (0.75, 0.751, "must_keep", 0.75),
    "tasks": ({"capitals": 0.8, "sums": 1}, {"capitals": 0.801, "sums": 1}, "tasks.capitals", 0.8),
    "task_drop": (0.05, 0.049, "task_drop.capitals", 0.05),
}
FILES: dict[str, Any] = {"old_data": "old.txt", "prompts": "prompts.yaml", "tasks": "tasks.yaml"}


def test_every_limit_and_every_kind_is_tried_and_documented() -> None:
    assert {*AT, "variants"} == set(LIMITS)
    page = "".join(
        (ROOT / f"docs/how-to/{name}.md").read_text(encoding="utf-8")
        for name in ("gate", "evaluation")
    )
    assert [name for name in (*LIMITS, *KINDS) if f"\n| `{name}` |" not in page] == []


@pytest.mark.parametrize("limit", AT)
def test_a_limit_is_kept_at_its_number_and_broken_just_beyond(limit: str) -> None:
    kept, broken, name, value = AT[limit]
    metrics = {"lora": MEASURED}
    assert verdict({limit: kept}, metrics, ["lora"]) == {
        "passed": True,
        "variants": ["lora"],
        "broken": [],
    }
    wanted = broken["capitals"] if isinstance(broken, dict) else broken
    assert verdict({limit: broken}, metrics, ["lora"]) == {
        "passed": False,
        "variants": ["lora"],
        "broken": [{"variant": "lora", "limit": name, "wanted": wanted, "value": value}],
    }


@pytest.mark.parametrize("limit", [name for name in AT if name != "task_drop"])
def test_what_was_not_measured_or_is_no_number_keeps_no_limit(limit: str) -> None:
    kept, _, name, _ = AT[limit]
    (broken, *_) = verdict({limit: kept}, {"lora": {}}, ["lora"])["broken"]
    assert (broken["limit"], broken["value"]) == (name, None)
    assert not verdict({"new_loss": 2.0}, {"lora": {"new_loss": math.nan}}, ["lora"])["passed"]


def test_only_the_named_variants_must_keep_them() -> None:
    metrics = {"full": {"new_loss": 3.0}, "lora": {"new_loss": 1.0}}
    assert verdict({"new_loss": 2.0}, metrics, ["lora"])["passed"]
    gate = verdict({"new_loss": 2.0, "variants": ["lora", "full"]}, metrics, ["full", "lora"])
    assert [one["variant"] for one in gate["broken"]] == ["full"]
    verdicts = [read_verdict({"gate": gate}, name) for name in ("full", "lora", "freeze", None)]
    assert [each and each.badge for each in verdicts] == [
        "failed: 1 limit",
        "passed",
        None,
        "failed: 1 limit",
    ]


@pytest.mark.parametrize(
    "gate",
    [
        *(None, [], "passed", 1, {}),
        *({"variants": 1, "broken": []}, {"variants": ["lora"], "broken": [1]}),
        {
            "variants": ["lora"],
            "broken": [{"variant": "lora", "limit": "new_loss", "wanted": 10**999, "value": 1}],
        },
    ],
)
def test_a_manifest_from_elsewhere_gives_no_verdict(gate: Any) -> None:
    assert read_verdict({"gate": gate}, "lora") is None
    assert read_verdict({}, "lora") is None


def judged(limits: Mapping[str, Any], *variants: str) -> Verdict:
    """The verdict on variants that measured the same."""
    found = read_verdict({"gate": verdict(limits, dict.fromkeys(variants, MEASURED), variants)})
    assert found is not None
    return found


@pytest.mark.parametrize(
    "limit", ["answers_kept", "old_loss_rise", "divergence", "must_keep", "task_drop"]
)
def test_a_broken_limit_of_forgetting_names_retention_as_the_next_step(limit: str) -> None:
    broken = judged({limit: AT[limit][1]}, "lora")
    assert "retention_data" in RETAIN and broken.next_step == RETAIN
    assert broken.error == f"evaluate.limits: 1 limit is broken, by lora. {RETAIN}"
    assert judged({limit: AT[limit][1], "new_loss": 1}, "lora").next_step == RETAIN


def test_a_broken_limit_of_learning_does_not() -> None:
    assert (
        judged({"new_loss": 1}, "lora").next_step
        == judged({"tasks": {"sums": 2}}, "lora").next_step
        == AGAIN
    )


def test_a_verdict_says_what_was_wanted_and_measured() -> None:
    broken = judged(
        {"answers_kept": 0.95, "new_loss": 1.5, "must_keep": 1, "divergence": 0.1}, "lora"
    )
    assert broken.reasons[:2] == [
        "answers_kept 0.9, wanted at least 0.95",
        "new_loss 2, wanted at most 1.5",
    ]
    assert broken.warning("x").startswith(
        "x breaks evaluate.limits: answers_kept 0.9, wanted at least 0.95; new_loss 2"
    )
    assert broken.warning("x").endswith(f"; 1 more. {RETAIN}")
    both = judged({"new_loss": 1.5}, "lora", "full")
    assert (both.badge, both.reasons[1]) == (
        "failed: 2 limits",
        "full: new_loss 2, wanted at most 1.5",
    )


def limits(value: Any) -> Any:
    return check_value(
        hints(Evaluate)["limits"], value, "evaluate.limits", ValueSource("params.yaml")
    )


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (
            [1],
            "evaluate.limits must be a mapping of limits, such as {old_loss_rise: 0.1, tasks: "
            "{capitals: 0.8}}, got",
        ),
        (
            {"newloss": 1},
            "params.yaml: unknown key evaluate.limits.newloss. Did you mean new_loss?",
        ),
        (
            {"new_loss": "low"},
            "evaluate.limits.new_loss must be a finite number, got 'low'. Edit params.yaml.",
        ),
        ({"new_loss": -1}, "evaluate.limits.new_loss must be at least 0, got -1"),
        ({"answers_kept": 90}, "evaluate.limits.answers_kept must be at most 1, got 90"),
        (
            {"tasks": 0.8},
            "evaluate.limits.tasks must be a mapping of tasks to scores, such as {capitals: 0.8}, "
            "got 0.8",
        ),
        ({"tasks": {"capitals": 80}}, "evaluate.limits.tasks.capitals must be at most 1, got 80"),
        ({"variants": 1}, "evaluate.limits.variants must be a name or a list of names, got 1"),
    ],
)
def test_a_wrong_limit_is_refused_by_its_key(value: Any, said: str) -> None:
    reason = user_error(limits, value)
    assert reason.startswith(said)


def test_a_limit_on_what_is_not_measured_is_refused() -> None:
    for limit, needed in (
        ("divergence", "old_data"),
        ("must_keep", "prompts"),
        ("task_drop", "tasks"),
    ):
        Evaluate(limits={limit: 0.5}, **FILES)
        with pytest.raises(
            UserError,
            match=f"^limits.{limit} is set, but evaluate.{needed} names no file to measure it",
        ):
            Evaluate(limits={limit: 0.5}, **{**FILES, needed: ""})
    Evaluate(limits={"new_loss": 0.5})
