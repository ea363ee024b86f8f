"""The text models of Qwen 3.5: Qwen3-Next's blocks, other orders of heads."""

from collections.abc import Mapping
from typing import Any

import torch

from pipeline.export.gguf.families import (
    Config,
    Family,
    Layout,
    gate_and_up,
    head_size,
    unsupported,
)
from pipeline.export.gguf.families.qwen3 import FAMILY as QWEN3
from pipeline.export.gguf.families.qwen3_next import NET, delta_net, net_layout

SECTIONS = [11, 11, 10]  # pairs of a head for time, height and width, as in transformers


def _settings(config: Config) -> dict[str, Any]:
    sections = config["rope_parameters"].get("mrope_section") or SECTIONS
    if sum(sections) > head_size(config):
        raise unsupported("rope_parameters.mrope_section", sections)
    return {**delta_net(config), "rope.dimension_sections": [*sections, 0]}


def _layout(config: Config, name: str) -> Layout:
    """Value heads in turns of the key heads, which llama.cpp repeats: 0, 1, 2, 3 → 0, 2, 1, 3."""
    keys, size = config["linear_num_key_heads"], config["linear_value_head_dim"]
    heads = torch.arange(config["linear_num_value_heads"]).view(keys, -1).T.flatten()
    rows = (heads[:, None] * size + torch.arange(size)).flatten()
    width = 2 * keys * config["linear_key_head_dim"]  # q and k, which stand before
    qkv = torch.cat([torch.arange(width), width + rows])
    orders = {
        **{"in_proj_qkv.weight": qkv, "conv1d.weight": qkv, "in_proj_z.weight": rows},
        **dict.fromkeys(("in_proj_a.weight", "in_proj_b.weight", "A_log", "dt_bias"), heads),
    }
    part = name.rpartition(NET)[2]
    columns = rows if part == "out_proj.weight" else None
    return net_layout(config, name)._replace(order=orders.get(part), columns=columns)


def _split(config: Config, name: str) -> Mapping[str, Layout]:
    """llama.cpp's name of dt, and experts apart."""
    if name.endswith(f"{NET}dt_bias"):
        return {f"{name.removesuffix('dt_bias')}dt_proj.bias": _layout(config, name)}
    return gate_and_up(config, name)


FAMILY = Family(
    {"qwen3_5_text": "qwen35", "qwen3_5_moe_text": "qwen35moe"},
    _settings,
    QWEN3.fixed,
    _layout,
    split=_split,
)
