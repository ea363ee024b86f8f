"""What is advised: each rule at its boundary, and a project that follows the advice is left
alone.
"""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.project.advice import RULES, Advice, Facts, advise
from pipeline.project.params.load import parse
from pipeline.project.stage_graph import Project
from pipeline.stages.registry import GRAPH

GOOD: dict[str, Any] = {
    **{"rank": 8, "alpha": 16, "learning_rate": 2e-4, "target_modules": ["all-linear"]},
    **{
        "epochs": 3,
        "batch_size": 4,
        "gradient_accumulation_steps": 8,
        "window": 0,
        "train_embeddings": "none",
    },
}


def advised(base: str = "org/model", facts: Facts | None = None, **settings: Any) -> list[Advice]:
    """What is advised for a LoRA that agrees with every rule except for these settings."""
    lines = "".join(f"  {key}: {value}\n" for key, value in {**GOOD, **settings}.items())
    params = parse(f"base: {base}\n\nfinetune_lora:\n{lines}", Path("params.yaml"), GRAPH.sections)
    return advise(Project(Path(), params, GRAPH), facts or Facts("finetune_lora"))


def keys(advice: list[Advice]) -> list[str]:
    return [one.key.removeprefix("finetune_lora.") for one in advice]


@pytest.mark.parametrize(
    ("settings", "known", "broken"),
    [
        ({}, {}, []),
        ({"learning_rate": 4e-5}, {}, []),
        ({"learning_rate": 1e-5}, {}, ["learning_rate"]),
        ({"learning_rate": 2e-3}, {}, ["learning_rate"]),
        ({"learning_rate": 2e-3, "rank": 64, "alpha": 128}, {}, ["learning_rate"]),
        ({"learning_rate": 0.1, "optimizer": "sgd"}, {}, []),
        ({"precision": "bf16"}, {"precision": "fp32"}, ["precision"]),
        ({"precision": "bf16"}, {"precision": "bf16"}, []),
        ({"precision": "fp32"}, {"precision": "fp32"}, []),
        ({"window": 63}, {}, ["window"]),
        ({"window": 64}, {}, []),
        ({"train_embeddings": "all"}, {}, ["train_embeddings"]),
        ({"train_embeddings": "new_rows"}, {}, []),
        ({"target_modules": ["attention"]}, {}, ["target_modules"]),
        ({"target_modules": ["attention", "feed_forward"]}, {"adapted": 1.0}, []),
        ({"target_modules": ["q_proj", "v_proj"]}, {}, []),
        ({"target_modules": ["q_proj", "v_proj"]}, {"adapted": 0.1}, ["target_modules"]),
        ({"target_modules": ["q_proj", "up_proj"]}, {"adapted": 0.6}, []),
        ({"target_modules": ["all-linear"]}, {"adapted": 0.1}, []),  # experts have none
        ({"batch_size": 5}, {}, ["batch_size"]),
        ({"rank": 4, "alpha": 1}, {}, ["alpha"]),
        ({"rank": 32, "alpha": 16}, {}, ["alpha"]),
        ({"rank": 256, "alpha": 32}, {}, []),
        ({"rank": 256, "alpha": 16, "rslora": "true"}, {}, []),
        ({"rank": 16}, {"left": True}, ["alpha"]),
        ({"rank": 16, "alpha": 32}, {"left": True}, []),
        ({"epochs": 15}, {"examples": 999}, []),
        ({"epochs": 16}, {"examples": 5}, ["epochs"]),
        ({"epochs": 4}, {"examples": 1000}, []),
        ({"epochs": 5}, {"examples": 1000}, ["epochs"]),
        ({"epochs": 500}, {}, []),
        ({"epochs": 500, "max_steps": 100}, {"examples": 800}, []),  # 32 a step: each 4 times
        ({"epochs": 1, "max_steps": 101}, {"examples": 200}, ["epochs"]),
        ({"max_steps": 9999}, {"examples": 20_000, "more": True}, []),
        ({"epochs": 9}, {"examples": 20_000, "more": True}, ["epochs"]),
        ({}, {"cut": 0.05}, []),
        ({}, {"cut": 0.06}, ["max_length"]),
        ({"quantization": "nf4-dq"}, {"base": 135_000_000}, ["quantization"]),
        ({"quantization": "nf4"}, {"base": 8_000_000_000}, []),
        ({"quantization": "int8"}, {"base": 135_000_000}, []),
        ({"quantization": "nf4"}, {}, []),
    ],
)
def test_a_rule_speaks_where_its_setting_breaks_it_and_a_fact_that_it_needs_is_known(
    settings: dict[str, Any], known: dict[str, Any], broken: list[str]
) -> None:
    assert keys(advised(facts=Facts("finetune_lora", **known), **settings)) == broken


def test_examples_seen_a_little_more_often_than_advised_are_not_said_to_be_seen_as_often() -> None:
    facts = Facts("finetune_lora", examples=1000)
    (advice,) = advised(facts=facts, max_steps=132)  # 32 a step
    assert "seen 4.2 times each" in advice.why and advice.advised == "at most 4"
    (advice,) = advised(facts=facts, epochs=50)
    assert "seen 50 times each" in advice.why


def test_the_worst_setting_comes_first() -> None:
    facts = Facts("finetune_lora", examples=150)
    broken: dict[str, Any] = {
        "epochs": 50,
        "learning_rate": 2e-3,
        "alpha": 0.5,
        "train_embeddings": "all",
    }
    order = ["alpha", "learning_rate", "epochs", "train_embeddings"]  # 16, 10 and 3.3 times off
    assert keys(advised(facts=facts, **broken)) == order
    assert keys(advised(facts=facts, **broken, window=4)) == ["window", *order]
    assert keys(advised(facts=facts, **{**broken, "epochs": 600})) == [
        "epochs",
        *(k for k in order if k != "epochs"),
    ]


def test_of_an_adapter_that_training_goes_on_from_nothing_is_advised_that_it_brings() -> None:
    facts = Facts("finetune_lora", trained=1, tokens=100, adapted=0.1, left=True)
    broken: dict[str, Any] = {
        "alpha": 1,
        "target_modules": ["q_proj"],
        "train_embeddings": "all",
        "batch_size": 64,
    }
    assert {"rank", "alpha", "target_modules", "train_embeddings"} <= set(
        keys(advised(facts=facts, **broken))
    )
    assert keys(advised(facts=facts, **broken, init_from="old")) == ["batch_size"]


@pytest.mark.parametrize("section", ["finetune_lora", "finetune_dpo"])
def test_no_rule_disagrees_with_the_defaults_of_a_pretrained_base(section: str) -> None:
    params = parse(f"base: org/model\n{section}: {{}}\n", Path("params.yaml"), GRAPH.sections)
    assert not advise(
        Project(Path(), params, GRAPH), Facts(section, base=10**8, adapted=1.0, examples=50)
    )


@given(st.integers(1, 512), st.integers(1, 10**6), st.integers(0, 10**9))
def test_data_needs_more_rank_than_the_adapter_has_only_above_two_tokens_a_parameter_and_the_advised_rank_holds_it(
    rank: int, per_rank: int, tokens: int
) -> None:
    def capacity(rank: int) -> list[Advice]:
        facts = Facts("finetune_lora", trained=rank * per_rank, tokens=tokens)
        return [
            one
            for one in advised(facts=facts, rank=rank, alpha=32)
            if one.key == "finetune_lora.rank"
        ]

    said = capacity(rank)
    assert bool(said) == (tokens > 2 * rank * per_rank)
    if said:
        least = int(said[0].advised.removeprefix("at least "))
        assert not capacity(least) and capacity(least - 1)


def test_what_large_models_taught_is_not_held_against_minigpt() -> None:
    broken: dict[str, Any] = {
        "learning_rate": 1,
        "target_modules": ["attention"],
        "batch_size": 64,
        "alpha": 1,
    }
    broken |= {"window": 4, "train_embeddings": "all"}
    facts = Facts(
        "finetune_lora",
        base=10,
        trained=1,
        examples=3,
        tokens=100,
        cut=0.5,
        precision="fp32",
    )
    assert keys(advised("minigpt", facts, **broken, epochs=90)) == ["rank", "max_length"]
    assert len(advised("org/model", facts, **broken, epochs=90, quantization="nf4")) == len(RULES)


@pytest.mark.parametrize("fast", ["fp16", "fp32"])
def test_instead_of_bf16_what_the_device_multiplies_is_advised(fast: str) -> None:
    facts = Facts("finetune_lora", precision=fast)
    (advice,) = advised(facts=facts, precision="bf16")
    assert advice.advised.startswith(fast)


def test_every_rule_says_why_in_a_sentence_and_names_its_source() -> None:
    facts = Facts(
        "finetune_lora",
        base=10,
        trained=1,
        adapted=0.2,
        examples=3,
        tokens=100,
        cut=0.5,
        precision="fp32",
    )
    broken: dict[str, Any] = {
        "learning_rate": 1,
        "target_modules": ["q_proj"],
        "batch_size": 64,
        "alpha": 1,
    }
    broken |= {"window": 4, "train_embeddings": "all"}
    for one in advised(facts=facts, **broken, epochs=90, quantization="nf4"):
        assert all((one.advised, one.why, one.source)) and not one.why.endswith(".")
    page = " ".join(
        (Path(__file__).parents[3] / "docs/how-to/advice.md").read_text(encoding="utf-8").split()
    )
    for keys_, _, source, function in RULES:
        assert (
            f"`{keys_[0]}`" in page
            and source in page
            and " ".join((function.__doc__ or "-").split()) in page
        )
