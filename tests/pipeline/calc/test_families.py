"""Shapes of each family of models, module by module, against those that transformers builds."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

from bench.memory import shortened
from pipeline.calc.architecture import Architecture
from pipeline.calc.families import architecture
from pipeline.calc.sources.open_model import built_in, entry, names
from pipeline.errors import UserError

SMALL = {
    "hidden_size": 96,
    "num_attention_heads": 6,
    "num_hidden_layers": 2,
    "vocab_size": 50,
    "intermediate_size": 80,
}
CHANGED = {
    **{
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": False,
        "num_key_value_heads": 2,
    },
    **{"enable_bias": False, "attention_k_eq_v": False},
}
# by the second, among others, this project knows its own models
MARKS = {"model_type", "layerdrop"}
NEEDED = {
    *("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers"),
    *("n_embd", "n_head", "n_layer", "ffn_dim"),  # GPT-2's and OPT's
}
# blocks of all kinds
PERIODS = {"qwen3_5_text": 4, "qwen3_5_moe_text": 4, "gemma4_text": 6, "llama4_text": 4}
ONE_OF_EACH = {entry(name)["config"]["model_type"]: name for name in reversed(names())}
# of transformers
each_family = pytest.mark.parametrize("family", sorted({*ONE_OF_EACH} - {"minigpt", "gpt3"}))


def modules_of(values: dict[str, Any]) -> dict[str, tuple[int, int, int, bool]]:
    """Of each linear, and each stacked tensor of experts: inputs, outputs, experts, and whether it
    has a bias.
    """
    config = AutoConfig.for_model(**values)
    kind = AutoModelForMaskedLM if values["model_type"] == "roberta" else AutoModelForCausalLM
    with torch.device("meta"):
        model = kind.from_config(config)
    found = {}
    for path, module in model.named_modules():
        weight: Any = getattr(module, "weight", None)
        bias = getattr(module, "bias", None) is not None
        if type(module).__name__ == "Conv1D":  # GPT-2's, whose weight is transposed
            found[path] = (*weight.shape, 1, bias)
        elif isinstance(module, torch.nn.Linear) or (
            weight is not None and weight.ndim == 2 and is_router(path, module)
        ):
            found[path] = (*reversed(weight.shape), 1, bias)
        for key in ("gate_up_proj", "down_proj"):
            stacked = getattr(module, key, None)
            if isinstance(stacked, torch.nn.Parameter):
                bias = hasattr(module, f"{key}_bias")
                found[f"{path}.{key}"] = (*sorted(stacked.shape[1:]), len(stacked), bias)
    return found


def is_router(path: str, module: torch.nn.Module) -> bool:
    """Whether it is one that is no linear."""
    return "router" in path or "router" in type(module).__name__.lower()


def config_of(name: str) -> dict[str, Any]:
    return shortened(name, PERIODS.get(entry(name)["config"]["model_type"], 2))


def linears_of(shapes: Architecture) -> dict[str, tuple[int, int, int, bool]]:
    found = {}
    for name, linear in shapes.linears():
        sizes = (linear.inputs, linear.outputs)
        found[name] = (
            *(sorted(sizes) if linear.experts > 1 else sizes),
            linear.experts,
            linear.bias,
        )
    return found


@pytest.mark.parametrize("changed", [{}, CHANGED], ids=["released", "changed"])
@each_family
def test_linears_have_the_names_shapes_and_biases_of_the_modules_of_transformers(
    family: str, changed: dict[str, Any]
) -> None:
    """They are what targets name, and what a rank multiplies; also with the other value of what a
    config may set.
    """
    config = config_of(ONE_OF_EACH[family])
    config |= {
        key: value for key, value in changed.items() if hasattr(AutoConfig.for_model(family), key)
    }
    shapes, theirs = architecture(config, family), modules_of(config)
    ours = linears_of(shapes)
    assert {name: theirs.get(name) for name in ours} == ours
    beside = {name.rsplit(".", 1)[-1] for name in theirs.keys() - ours.keys()}
    assert beside <= {"gate", "router", "proj"}, "of the others only routers are not adapted"


@each_family
def test_what_a_config_leaves_out_is_what_transformers_takes_for_it(family: str) -> None:
    config = config_of(ONE_OF_EACH[family])
    # Granite 4 without layer_types has layers of a kind that is refused.
    refused = {"layer_types"} if family == "granitemoehybrid" else set()
    for key in AutoConfig.for_model(family).to_dict().keys() - NEEDED - refused - MARKS:
        rest = {name: value for name, value in config.items() if name != key}
        said = rest | {key: AutoConfig.for_model(**rest).to_dict()[key]}
        assert shape_or_message(rest) == shape_or_message(said), key


def shape_or_message(config: dict[str, Any]) -> Architecture | str:
    try:
        return architecture(config, "it")
    except UserError as error:
        return str(error)


def test_a_router_of_each_block_is_counted_with_its_own_shape() -> None:
    for name, experts, hidden in (
        ("qwen3-30b-a3b", 128, 2048),
        ("gpt-oss-20b", 32, 2880),
        ("deepseek-v3", 256, 7168),
    ):
        routers = [block.router for block in built_in(name).shapes.blocks if block.router]
        assert {(router.inputs, router.outputs) for router in routers} == {(hidden, experts)}


def test_heads_must_divide_the_width_unless_their_size_is_given() -> None:
    uneven = SMALL | {"model_type": "llama", "num_attention_heads": 7}
    with pytest.raises(
        UserError, match="hidden_size 96 is not a multiple of num_attention_heads 7"
    ):
        architecture(uneven, "config.json")
    assert architecture(uneven | {"head_dim": 16}, "config.json").head_size == 16
    with pytest.raises(
        UserError, match="num_attention_heads 6 is not a multiple of key/value heads 4"
    ):
        architecture(SMALL | {"model_type": "llama", "num_key_value_heads": 4}, "config.json")
    with pytest.raises(UserError, match="the width 96 is not a multiple of the 7 heads"):
        architecture(uneven | {"model_type": "gpt_neox"}, "config.json")


def test_the_cache_of_a_token_is_its_keys_and_values_a_latent_or_a_state() -> None:
    """DeepSeek-V2 (2024), §2.1: a latent of 512 and 64 rotated elements per layer, whatever the
    number of heads.
    """
    latent = built_in("deepseek-v3").shapes
    assert latent.kv_bytes(3, 1000) == 3 * 1000 * 61 * (512 + 64) * 2
    plain = built_in("qwen3-8b").shapes
    assert plain.kv_bytes(2, 1000) == 2 * 1000 * 36 * 2 * 8 * 128 * 2
    assert plain.kv_bytes(1, 10, width=4) == 10 * 36 * 2 * 8 * 128 * 4
    hybrid = built_in("qwen3.5-4b")
    assert hybrid.config is not None
    config = hybrid.config
    full = sum((index + 1) % 4 == 0 for index in range(config["num_hidden_layers"]))
    states = (config["num_hidden_layers"] - full) * config["linear_num_value_heads"] * 128 * 128
    keys = full * 2 * config["num_key_value_heads"] * config["head_dim"]
    assert hybrid.shapes.kv_bytes(2, 500) == 2 * (500 * keys * 2 + states * 4)


def test_components_are_what_their_names_say() -> None:
    dense, sparse = (built_in(name).shapes.components() for name in ("qwen3-8b", "qwen3-30b-a3b"))
    assert (
        dense["feed-forward"] == 36 * 3 * 4096 * 12288
        and "experts" not in dense
        and "router" not in dense
    )
    assert sparse["experts"] == 48 * 128 * 3 * 2048 * 768 and "feed-forward" not in sparse
    assert sparse["router"] == 48 * 2048 * 128
    assert dense["attention"] == 36 * (2 * 4096 * 4096 + 2 * 4096 * 1024)
    assert dense["norms"] == 36 * (2 * 4096 + 2 * 128) + 4096
    assert dense["embeddings"] == dense["head"] == 151_936 * 4096
    assert built_in("gpt2").shapes.components()["positions"] == 1024 * 768
    assert built_in("opt-350m").shapes.components()["other linears"] == 2 * 512 * 1024


def test_shapes_that_no_memory_holds_are_refused() -> None:
    """A product above 2^62: so that no sum of a few overflows 64 bits."""
    huge = {
        "model_type": "llama",
        "hidden_size": 2**31 - 1,
        "vocab_size": 2**31 - 1,
        "num_attention_heads": 1,
    }
    fits = {**huge, "intermediate_size": 64, "num_hidden_layers": 1}
    assert architecture(fits, "config.json").total > 2**62
    with pytest.raises(
        UserError,
        match=r"config.json: the shapes overflow: [\d,]+ parameters are more than any memory",
    ):
        architecture({**fits, "num_hidden_layers": 2}, "config.json")


def test_of_a_model_of_text_and_images_the_text_model_is_counted_with_its_own_tie() -> None:
    text = {**SMALL, "num_key_value_heads": 2, "head_dim": 16}
    for tied in (True, False):
        shapes = architecture(
            {"model_type": "gemma3", "tie_word_embeddings": tied, "text_config": text},
            "config.json",
        )
        assert shapes.notes == ("text model only: the image encoder is not counted",)
        assert (shapes.family, shapes.source, shapes.tied) == ("gemma3_text", "config.json", tied)


def test_projections_of_narrow_embeddings_have_the_names_of_opts() -> None:
    config = {**SMALL, "model_type": "opt", "ffn_dim": 80, "word_embed_proj_dim": 32}
    shapes, theirs = architecture(config, "config.json"), modules_of(config)
    suffixes = {linear.name: (linear.inputs, linear.outputs) for linear in shapes.outside}
    assert suffixes == {"project_out": (96, 32), "project_in": (32, 96)}
    for name, sizes in suffixes.items():
        assert theirs[f"model.decoder.{name}"][:2] == sizes


MIXTURES = [
    "mixtral",
    "qwen3_moe",
    "qwen3_5_moe_text",
    "gpt_oss",
    "glm4_moe",
    "glm4_moe_lite",
    "deepseek_v3",
    "llama4_text",
]


@pytest.mark.parametrize("family", MIXTURES)
def test_a_token_meets_as_many_experts_as_the_config_says_or_the_library_does(family: str) -> None:
    library = AutoConfig.for_model(family, num_hidden_layers=4)
    values = {
        key: value for key, value in library.to_dict().items() if key != "num_experts_per_tok"
    }
    values |= {"layer_types": None, "mlp_layer_types": None}
    assert architecture(values, family).style.top_k == library.num_experts_per_tok
    assert architecture({**values, "num_experts_per_tok": 3}, family).style.top_k == 3
