"""Exact counts: every built-in model against transformers and PEFT on the meta device, and the
published ones.
"""

import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import IA3Config, LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

from bench.memory import shortened
from pipeline.calc.architecture import Architecture
from pipeline.calc.families import architecture
from pipeline.calc.method import projections, trainable, why_they_differ
from pipeline.calc.sources.open_model import built_in, entry, names
from pipeline.errors import UserError
from pipeline.stages.methods.freeze import Freeze
from pipeline.stages.methods.full import COUNTED as FULL
from pipeline.stages.methods.ia3 import FEED_FORWARD, IA3, KEYS_VALUES
from pipeline.stages.methods.lora import COUNTED as LORA
from pipeline.stages.methods.lora import Lora
from pipeline.stages.methods.prefix import Prefix
from pipeline.stages.methods.prompt import Prompt

NOT_IN_TRANSFORMERS = ("gpt-3-175b", "minigpt")
STOCK = [name for name in names() if name not in NOT_IN_TRANSFORMERS]
# blocks of all kinds
PERIODS = {"qwen3_5_text": 4, "qwen3_5_moe_text": 4, "gemma4_text": 6, "llama4_text": 4}
CHOICES: dict[str, list[tuple[str, ...]]] = {  # by the attention linears that a model has
    "q_a_proj": [
        ("q_a_proj", "kv_b_proj"),
        ("attention",),
        ("kv_a_proj_with_mqa",),
        ("q_b_proj", "o_proj"),
    ],
    "in_proj_qkv": [
        ("in_proj_qkv", "q_proj"),
        ("attention",),
        ("out_proj",),
        ("q_proj", "k_proj", "v_proj", "o_proj"),
    ],
    "q_proj": [
        ("q_proj", "v_proj"),
        ("attention",),
        ("v_proj",),
        ("q_proj", "k_proj", "v_proj", "o_proj"),
    ],
    "c_attn": [("c_attn",), ("attention",), ("c_proj",), ("attn.c_proj",)],
    "query_key_value": [("query_key_value",), ("attention",), ("dense",), ("attention.dense",)],
    "qkv_proj": [("qkv_proj",), ("attention",), ("o_proj",), ("qkv_proj", "o_proj")],
    "query": [("query", "value"), ("attention",), ("key",), ("attention.output.dense",)],
}


def meta_model(name: str, blocks: int | None = None) -> Any:
    """All of its blocks, or the first ones."""
    config = AutoConfig.for_model(**(shortened(name, blocks) if blocks else entry(name)["config"]))
    kind = AutoModelForMaskedLM if name.startswith("roberta") else AutoModelForCausalLM
    with torch.device("meta"):
        return kind.from_config(config)


def trainable_count(model: Any) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def linears(model: Any) -> dict[str, Any]:
    return {n: m for n, m in model.named_modules() if type(m).__name__ in ("Linear", "Conv1D")}


def peft_targets(shapes: Architecture, wanted: tuple[str, ...], model: Any) -> list[str] | str:
    """Full module names for our groups; PEFT's own reading of names and of all-linear otherwise."""
    if wanted == ("all-linear",):
        return "all-linear"
    if not set(wanted) & {"attention", "feed_forward"}:
        return [re.sub("^o_proj$", "out_proj", w) if shapes.family == "opt" else w for w in wanted]
    suffixes = {
        linear.name
        for block in shapes.blocks
        for group in wanted
        for linear in getattr(block, group)
    }
    return [
        n for n in linears(model) if any(re.search(rf"\.\d+\.{suffix}$", n) for suffix in suffixes)
    ]


def targets_of(shapes: Architecture) -> list[tuple[str, ...]]:
    last = {linear.name.rsplit(".", 1)[-1] for linear in shapes.blocks[0].attention}
    first = next(choices for key, choices in CHOICES.items() if key in last)
    dense = all(linear.experts == 1 for block in shapes.blocks for linear in block.feed_forward)
    single = [
        (name,) for name in ("k_proj", "o_proj") if name in last or "in_proj_qkv" in last
    ] or [("o_proj",)]
    feed_forward = (
        [("feed_forward",), ("attention", "feed_forward")] if dense else [*single, (*last,)]
    )
    return [*first, ("all-linear",), *feed_forward]


def few_blocks(name: str) -> bool:
    return len(built_in(name).shapes.blocks) <= 16


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if few_blocks(n) else pytest.mark.slow) for n in STOCK]
)
def test_counts_are_those_of_transformers_and_peft(name: str) -> None:
    """The whole model, and LoRA at rank 8 for six choices of targets and more."""
    assert_counts_are_theirs(built_in(name).shapes, meta_model(name))


@pytest.mark.parametrize("name", STOCK)
@pytest.mark.sampled(3)
def test_counts_of_two_blocks_are_those_of_transformers_and_peft(name: str) -> None:
    """The same for a few blocks of each built-in model, one of each kind: PEFT's time grows with
    their number.
    """
    blocks = PERIODS.get(entry(name)["config"]["model_type"], 2)
    shapes = architecture(shortened(name, blocks), name)
    assert len(shapes.blocks) == blocks
    assert set(shapes.blocks) == set(built_in(name).shapes.blocks)
    assert_counts_are_theirs(shapes, meta_model(name, blocks))


def assert_counts_are_theirs(shapes: Architecture, model: Any) -> None:
    assert shapes.total == sum(p.numel() for p in model.parameters())
    choices = targets_of(shapes)
    assert len(choices) >= 6
    for wanted in choices:
        config = LoraConfig(r=8, target_modules=peft_targets(shapes, wanted, model))
        adapted = get_peft_model(model, config, low_cpu_mem_usage=True)
        assert trainable(shapes, Lora(targets=wanted)) == trainable_count(adapted), wanted
        model = adapted.unload()


@pytest.mark.parametrize(
    "name", ["qwen3-0.6b", "gpt2", "opt-350m", "gpt-neox-20b", "phi-4-mini", "gemma-3-1b"]
)
@pytest.mark.slow
def test_dora_patterns_and_new_rows_are_those_of_peft(name: str) -> None:
    shapes, wanted = built_in(name).shapes, ("attention",)
    model = meta_model(name)
    modules = peft_targets(shapes, wanted, model)
    dora = get_peft_model(model, LoraConfig(r=4, target_modules=modules, use_dora=True))
    assert trainable(shapes, Lora(rank=4, targets=wanted, dora=True)) == trainable_count(dora)
    model = dora.unload()
    last = shapes.blocks[0].attention[-1].name.rsplit(".", 1)[-1]
    for pattern in (last, rf"\w+\.1\..*{last}", rf".*\.0\..*{last}"):
        ranked = get_peft_model(
            model, LoraConfig(r=4, target_modules=modules, rank_pattern={pattern: 16})
        )
        assert trainable(
            shapes, Lora(rank=4, targets=wanted, rank_pattern=((pattern, 16),))
        ) == trainable_count(ranked)
        model = ranked.unload()
    rows = get_peft_model(
        model, LoraConfig(r=4, target_modules=modules, trainable_token_indices=[1, 5, 9])
    )
    ours = trainable(shapes, Lora(rank=4, targets=wanted, embeddings="new_rows", new_rows=3))
    # PEFT was asked for the embedding's rows alone
    head = 0 if shapes.tied else 3 * shapes.embedding_width
    assert ours - head == trainable_count(rows)


@pytest.mark.parametrize("name", ["qwen3-8b", "llama-2-7b", "gpt-neox-20b", "mistral-7b-v0.3"])
def test_embeddings_and_head_in_full_are_those_of_peft(name: str) -> None:
    shapes, model = built_in(name).shapes, meta_model(name)
    ends = ["embed_in", "lm_head"] if "neox" in name else ["embed_tokens", "lm_head"]
    adapted = get_peft_model(
        model,
        LoraConfig(
            r=8, target_modules=peft_targets(shapes, ("attention",), model), modules_to_save=ends
        ),
    )
    assert trainable(shapes, Lora(embeddings="all")) == trainable_count(adapted)


@pytest.mark.slow
def test_experts_are_those_that_peft_adapts() -> None:
    """By target_parameters; or by the names of older checkpoints, with one rank each for gate and
    up.
    """
    shapes, model = built_in("gpt-oss-20b").shapes, meta_model("gpt-oss-20b")
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    adapted = get_peft_model(
        model, LoraConfig(r=2, target_modules=[], target_parameters=parameters)
    )
    asked = Lora(rank=2, targets=("feed_forward",))
    assert trainable(shapes, asked) == trainable_count(adapted)
    assert "target_parameters" in asked.notes(shapes)[0]
    assert "leaves these experts out" in Lora(targets=("all-linear",)).notes(shapes)[0]
    for name, old in (
        ("qwen3-30b-a3b", ["gate_proj", "up_proj", "down_proj"]),
        ("mixtral-8x7b", ["w1", "w2", "w3"]),
    ):
        shapes, model = built_in(name).shapes, meta_model(name)
        adapted = get_peft_model(model, LoraConfig(r=2, target_modules=[*old, "gate", "q_proj"]))
        assert trainable(shapes, Lora(rank=2, targets=(*old, "gate", "q_proj"))) == trainable_count(
            adapted
        )
        assert trainable(shapes, Lora(rank=2, targets=("feed_forward",))) == trainable(
            shapes, Lora(rank=2, targets=tuple(old))
        )
        assert "twice the rank" in asked.notes(shapes)[0]
        with pytest.raises(UserError, match="are one tensor in this model's experts; name both"):
            trainable(shapes, Lora(targets=(old[0],)))


@pytest.mark.parametrize(
    "name", ["llama-3.2-1b", "gpt2", "opt-125m", "mistral-7b-v0.3", "qwen2.5-0.5b"]
)
def test_prefix_and_prompt_tuning_are_those_of_peft(name: str) -> None:
    shapes = built_in(name).shapes
    for method, config in ((Prefix(10), PrefixTuningConfig), (Prompt(10), PromptTuningConfig)):
        adapted = get_peft_model(
            meta_model(name), config(task_type="CAUSAL_LM", num_virtual_tokens=10)
        )
        assert trainable(shapes, method) == trainable_count(adapted), method


@pytest.mark.parametrize(
    "name",
    [
        "llama-3.2-1b",
        "gemma-3-1b",
        "opt-125m",
        "gpt2",
        "gpt-neox-20b",
        "phi-4-mini",
        "qwen3-30b-a3b",
    ],
)
def test_ia3_is_that_of_peft(name: str) -> None:
    """Experts, which are no modules of their own, are left out by both."""
    config = IA3Config(
        target_modules=[*KEYS_VALUES, *FEED_FORWARD], feedforward_modules=[*FEED_FORWARD]
    )
    assert trainable(built_in(name).shapes, IA3()) == trainable_count(
        get_peft_model(meta_model(name), config)
    )


@pytest.mark.parametrize(
    "name", ["llama-3.2-1b", "qwen3-0.6b", "gpt2", "gpt-neox-20b", "opt-350m", "mixtral-8x7b"]
)
def test_freezing_counts_the_last_blocks_embeddings_and_head(name: str) -> None:
    shapes, model = built_in(name).shapes, meta_model(name)
    layers = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))
    for blocks in (0, 1, len(layers)):
        for ends in (True, False):
            model.requires_grad_(False)
            for layer in list(layers)[len(layers) - blocks :]:
                layer.requires_grad_(True)
            model.get_input_embeddings().requires_grad_(ends)
            if ends:
                model.get_output_embeddings().requires_grad_(True)
            assert trainable(
                shapes, Freeze(last_blocks=blocks, train_embeddings=ends)
            ) == trainable_count(model)


@pytest.mark.parametrize("name", names())
def test_totals_are_the_published_ones_to_the_digits_published(name: str) -> None:
    known = entry(name)
    total = built_in(name).shapes.total + known.get("image_encoder", 0)
    assert known["source"] and known["published_source"]
    match = re.fullmatch(r"([\d.,]+)\s*([KMB]?)", known["published"])
    assert match, known["published"]
    number, unit = match[1].replace(",", ""), {"": 1, "K": 1e3, "M": 1e6, "B": 1e9}[match[2]]
    digits = len(number.partition(".")[2])
    shown = total / unit
    truncated = int(shown * 10**digits) / 10**digits
    assert float(number) in (round(shown, digits), truncated)


def test_gpt3_has_the_lora_papers_counts() -> None:
    shapes = built_in("gpt-3-175b").shapes
    assert round(trainable(shapes, Lora(rank=1, targets=("q_proj", "v_proj"))) / 1e6, 1) == 4.7
    assert round(trainable(shapes, Lora(rank=8, targets=("q_proj", "v_proj"))) / 1e6, 1) == 37.7


def test_qwen3_8b_has_the_counts_that_are_known() -> None:
    shapes = built_in("qwen3-8b").shapes
    assert shapes.total == 8_190_735_360
    assert trainable(shapes, LORA) == 7_667_712
    assert trainable(shapes, Lora(rank=16, targets=("all-linear",))) == 43_646_976
    assert LORA.simple_count(shapes) == 9_437_184
    assert why_they_differ(shapes, LORA) == (
        "the rule of thumb takes every projection as 4,096 × 4,096; "
        "here k_proj 4,096 → 1,024, v_proj 4,096 → 1,024"
    )


def test_the_rule_of_thumb_has_no_count_where_it_does_not_apply() -> None:
    qwen, gpt2, mini = (built_in(name).shapes for name in ("qwen3-8b", "gpt2", "minigpt"))
    for method in (
        FULL,
        Lora(targets=("all-linear",)),
        Lora(dora=True),
        Lora(embeddings="all"),
        Prefix(),
    ):
        assert method.simple_count(qwen) is None
    assert LORA.simple_count(gpt2) is None
    assert LORA.simple_count(mini) == trainable(mini, LORA) == 8_192
    assert why_they_differ(mini, LORA) == ""


def test_projections_give_the_shapes_of_a_and_b() -> None:
    q, k, *_ = projections(built_in("qwen3-8b").shapes, LORA)
    assert (q.name, q.inputs, q.outputs, q.rank, q.count, q.parameters_each) == (
        "q_proj",
        4096,
        4096,
        8,
        36,
        65_536,
    )
    assert (k.inputs, k.outputs, k.parameters) == (4096, 1024, 36 * 40_960)


def test_a_rank_above_the_smallest_dimension_is_allowed_with_a_note() -> None:
    shapes = built_in("qwen3-8b").shapes
    assert Lora(rank=2000).notes(shapes) == [
        "rank 2000 is more than k_proj can use: its rank is at most 1024"
    ]
    assert Lora(rank=1024).notes(shapes) == []


@pytest.mark.parametrize("name", ["qwen3-0.6b", "opt-125m", "gpt-neox-20b", "gpt2", "phi-4-mini"])
def test_one_block_and_the_head_are_meant_by_full_names_as_in_peft(name: str) -> None:
    shapes, model = built_in(name).shapes, meta_model(name)
    known = linears(model)
    for full in (
        next(iter(known)),
        next(n for n in known if n.rsplit(".", 1)[-1] == "lm_head" or "h.1." in n),
    ):
        adapted = get_peft_model(model, LoraConfig(r=8, target_modules=[full]))
        assert trainable(shapes, Lora(targets=(full,))) == trainable_count(adapted), full
        model = adapted.unload()


def test_unknown_targets_are_refused_with_those_that_exist() -> None:
    with pytest.raises(
        UserError, match=r"'c_attn' matches no linear layer. The model has down_proj, gate_proj"
    ):
        trainable(built_in("qwen3-8b").shapes, Lora(targets=("attention", "c_attn")))
    with pytest.raises(
        UserError, match="last-blocks must be at most 36, the model's blocks, got 37"
    ):
        trainable(built_in("qwen3-8b").shapes, Freeze(last_blocks=37))


@given(st.sampled_from(names()), st.integers(1, 300), st.integers(1, 300))
def test_a_higher_rank_never_trains_fewer(name: str, one: int, other: int) -> None:
    shapes = built_in(name).shapes
    low, high = sorted((one, other))
    counts = [trainable(shapes, Lora(rank=rank, targets=("all-linear",))) for rank in (low, high)]
    assert counts[0] <= counts[1]
    assert counts[0] * high == counts[1] * low, "they are proportional to the rank"


@given(st.sampled_from(names()), st.integers(1, 64))
def test_components_sum_to_the_total_and_parts_to_the_trainable(name: str, rank: int) -> None:
    shapes = built_in(name).shapes
    assert sum(shapes.components().values()) == shapes.total
    adapted = projections(shapes, Lora(rank=rank))
    assert sum(p.parameters for p in adapted) == trainable(shapes, Lora(rank=rank))
    assert all(p.parameters_each == p.experts * rank * (p.inputs + p.outputs) for p in adapted)
