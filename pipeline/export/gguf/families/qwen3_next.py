"""Qwen3-Next: three of four blocks have a gated delta net, all a mixture beside a shared expert."""

from collections.abc import Mapping
from typing import Any

import torch

from pipeline.export.gguf.families import (
    Config,
    Family,
    Layout,
    gate_and_up,
    mixture,
    partly_rotary,
    unsupported,
    window_period,
)
from pipeline.export.gguf.families.gemma2 import norm_layout
from pipeline.export.gguf.families.qwen3 import FAMILY as QWEN3

NET = ".linear_attn."


def delta_net(config: Config) -> dict[str, Any]:
    """The settings of a model with gated delta nets, with a mixture or without."""
    size = config["linear_key_head_dim"]
    if config["linear_value_head_dim"] != size:
        raise unsupported("linear_value_head_dim", config["linear_value_head_dim"])
    return {
        **mixture(config),
        **partly_rotary(config, ("default", "linear", "yarn")),
        "full_attention_interval": window_period(config),
        "ssm.conv_kernel": config["linear_conv_kernel_dim"],
        "ssm.state_size": size,
        "ssm.group_count": config["linear_num_key_heads"],
        "ssm.time_step_rank": config["linear_num_value_heads"],
        "ssm.inner_size": size * config["linear_num_value_heads"],
    }


def net_layout(config: Config, name: str) -> Layout:
    """The net's norm multiplies by w, all others by 1 + w; llama.cpp has A itself, not its log."""
    if name.endswith(f"{NET}A_log"):
        return Layout(values=lambda log: -log.exp())
    return Layout() if name.endswith(f"{NET}norm.weight") else norm_layout(config, name)


def _split(config: Config, name: str) -> Mapping[str, Layout]:
    """llama.cpp has q, k and v of all heads one after another, and z in a tensor of its own."""
    before, _, part = name.rpartition(NET)
    if part == "dt_bias":
        return {f"{before}{NET}dt_proj.bias": Layout()}
    if part != "in_proj_qkvz.weight":
        return gate_and_up(config, name)
    heads = config["linear_num_key_heads"]
    key = config["linear_key_head_dim"]
    value = config["linear_num_value_heads"] // heads * config["linear_value_head_dim"]
    rows = torch.arange(heads * 2 * (key + value)).view(heads, -1)
    *qkv, z = (part.flatten() for part in torch.split(rows, [key, key, value, value], 1))
    return {
        f"{before}{NET}in_proj_qkv.weight": Layout(order=torch.cat(qkv)),
        f"{before}{NET}in_proj_z.weight": Layout(order=z),
    }


FAMILY = Family(
    {"qwen3_next": "qwen3next"},
    delta_net,
    QWEN3.fixed,
    net_layout,
    split=_split,
)
