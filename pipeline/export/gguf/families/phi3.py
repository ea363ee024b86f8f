"""Phi 3 and 4: q, k and v in one matrix, gate and up in another."""

from collections.abc import Mapping
from math import log, sqrt
from typing import Any

import torch
from torch import Tensor

from pipeline.export.gguf.families import Config, Family, partly_rotary, refuse_narrow_heads


def _settings(config: Config) -> dict[str, Any]:
    refuse_narrow_heads(config)
    settings = partly_rotary(config, ("default", "longrope"))
    parameters = config["rope_parameters"]
    if parameters["rope_type"] != "longrope":
        return settings
    context = parameters["original_max_position_embeddings"]
    factor = parameters.get("factor") or config["max_position_embeddings"] / context
    return {
        **settings,
        # llama.cpp divides by the long factors if its context is longer, however short the text
        "context_length": min(settings["context_length"], context),
        "rope.scaling.original_context_length": context,
        "rope.scaling.attn_factor": sqrt(1 + log(factor) / log(context)) if factor > 1 else 1.0,
    }


def _frequency_factors(config: Config) -> Mapping[str, Tensor]:
    """LongRoPE's divisors of frequencies, for texts within the original context and beyond it."""
    return {
        f"rope_factors_{which}.weight": torch.tensor(factors, dtype=torch.float32)
        for which in ("short", "long")
        if (factors := config["rope_parameters"].get(f"{which}_factor"))
    }


FAMILY = Family({"phi3": "phi3"}, _settings, {"hidden_act": ("silu",)}, extra=_frequency_factors)
