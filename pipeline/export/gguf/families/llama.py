"""Llama, and what has its architecture: Mistral, SmolLM2, Mixtral."""

import math

import torch
from torch import Tensor

from pipeline.export.gguf.families import (
    Config,
    Family,
    Layout,
    gate_and_up,
    head_size,
    mixture,
    rotary,
)


def rotated_by_neighbours(config: Config, name: str) -> Layout:
    """llama.cpp rotates neighbours, transformers the halves of a head: reorder rows of q and k."""
    for module, key in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
        if f".{module}." in name:
            heads = config.get(key) or config["num_attention_heads"]
            rows = torch.arange(heads * head_size(config)).view(heads, 2, -1)  # (H, half, K/2)
            return Layout(order=rows.transpose(1, 2).flatten())
    return Layout()


def _frequency_factors(config: Config) -> dict[str, Tensor]:
    """Llama 3's divisors of frequencies: 1 for short wavelengths, `factor` for long ones."""
    parameters = config["rope_parameters"]
    if parameters.get("rope_type") != "llama3":
        return {}
    size = head_size(config)
    frequencies = parameters["rope_theta"] ** -(torch.arange(0, size, 2).double() / size)
    # rotations within the original context
    turns = parameters["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high, factor = (
        parameters[key] for key in ("low_freq_factor", "high_freq_factor", "factor")
    )
    share = ((turns - low) / (high - low)).clamp(0, 1)  # 1: unchanged; blended in between
    return {"rope_freqs.weight": (1 / (share + (1 - share) / factor)).float()}


FAMILY = Family(
    {"llama": "llama", "mistral": "llama", "mixtral": "llama"},
    lambda config: {**rotary(config, ("default", "linear", "yarn", "llama3")), **mixture(config)},
    {"hidden_act": ("silu",)},
    rotated_by_neighbours,
    _frequency_factors,
    split=gate_and_up,
)
