"""The text models of Gemma 4: per-layer embeddings, larger heads where attention is full, keys and
values of earlier blocks, experts beside an MLP.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pipeline.export.gguf.families import (
    Config,
    Family,
    Layout,
    attention,
    mixture,
    rope,
    unsupported,
)
from pipeline.export.gguf.families.gemma2 import FIXED

# parameters that are no module's weight
RENAMED = {
    "layer_scalar": "layer_scalar.weight",
    "scale": "router.proj.scale",
    "per_expert_scale": "experts.down_proj.scale",
    "gate_up_proj": "gate_up_proj.weight",
    "down_proj": "down_proj.weight",
}


def _settings(config: Config) -> dict[str, Any]:
    blocks = _blocks(config)
    in_windows = [block["layer_type"] == "sliding_attention" for block in blocks]
    width = config["hidden_size_per_layer_input"] or 0
    if width and config["vocab_size_per_layer_input"] != config["vocab_size"]:
        raise unsupported("vocab_size_per_layer_input", config["vocab_size_per_layer_input"])
    # the last block has full attention; blocks of a kind have heads of one size
    whole = blocks[-1]["head_dim"]
    local = blocks[in_windows.index(True)]["head_dim"] if any(in_windows) else whole
    full = config["rope_parameters"]["full_attention"]
    windows = config["rope_parameters"].get("sliding_attention") or full
    experts = {}
    if config["enable_moe_block"]:
        experts = mixture({**config, "num_experts_per_tok": config["top_k_experts"]})
    shared = config["num_kv_shared_layers"]
    inner = [config["intermediate_size"]] * len(blocks)
    if config["use_double_wide_mlp"] and shared:
        inner[-shared:] = [2 * config["intermediate_size"]] * shared
    return {
        **attention(config),
        **experts,
        **rope({**full, "partial_rotary_factor": None}, ("default", "proportional")),
        "rope.freq_base_swa": rope(windows, ("default",))["rope.freq_base"],
        "rope.dimension_count": whole,
        "rope.dimension_count_swa": local,
        "feed_forward_length": inner,
        "attention.head_count_kv": [block["num_key_value_heads"] for block in blocks],
        "attention.key_length": whole,
        "attention.value_length": whole,
        "attention.key_length_swa": local,
        "attention.value_length_swa": local,
        "attention.shared_kv_layers": shared,
        "attention.sliding_window": config["sliding_window"],
        "attention.sliding_window_pattern": in_windows,
        "embedding_length_per_layer_input": width,
        # llama.cpp caps with a default if it is told nothing
        "final_logit_softcapping": float(config["final_logit_softcapping"] or 0.0),
    }


def _blocks(config: Config) -> list[dict[str, Any]]:
    """The settings of each block."""
    listed = config.get("per_layer_config") or {}
    changes = {int(number): values for number, values in listed.items()}
    return [
        {**config, **changes.get(number, {}), "layer_type": kind}
        for number, kind in enumerate(config["layer_types"])
    ]


def _renamed(_config: Config, name: str) -> dict[str, Layout]:
    block, _, last = name.rpartition(".")
    if last in RENAMED:
        return {f"{block.removesuffix('.router')}.{RENAMED[last]}": Layout()}
    return {}


def _frequency_factors(config: Config) -> Mapping[str, Tensor]:
    """Divisors of the frequencies of full attention: endless where no position rotates."""
    parameters = config["rope_parameters"]["full_attention"]
    half = _blocks(config)[-1]["head_dim"] // 2
    factors = torch.ones(half)
    if parameters.get("rope_type") == "proportional":
        factors *= parameters.get("factor") or 1.0
        factors[int(parameters.get("partial_rotary_factor", 1.0) * half) :] = 1e30
    return {"rope_freqs.weight": factors}


FAMILY = Family(
    {"gemma4_text": "gemma4"},
    _settings,
    {**FIXED, "use_bidirectional_attention": (None, "vision")},
    extra=_frequency_factors,
    split=_renamed,
    # updates of the experts' outputs would not be multiplied by the scales of experts
    without_lora=("per_layer_model_projection", "embed_tokens_per_layer", "experts.down_proj"),
)
