"""Gemma 2: norms that multiply by 1 + w, capped logits, every second block in a sliding window."""

from typing import Any

from pipeline.export.gguf.families import (
    Config,
    Family,
    Layout,
    attention,
    rope,
    unsupported,
    window_period,
)

FIXED = {
    "hidden_activation": ("gelu_pytorch_tanh", None),
    "attention_bias": (False,),
    "use_bidirectional_attention": (None, False),
}
LARGE = 46  # blocks of the 27B, whose queries llama.cpp scales by its width per head


def query_scale(config: Config, large: int) -> None:
    """Raises UserError unless llama.cpp computes the same scale of queries from the shapes."""
    width_per_head = config["hidden_size"] // config["num_attention_heads"]
    expected = width_per_head if config["num_hidden_layers"] == large else config["head_dim"]
    if config["query_pre_attn_scalar"] != expected:
        raise unsupported("query_pre_attn_scalar", config["query_pre_attn_scalar"])


def norm_layout(_config: Config, name: str) -> Layout:
    """transformers multiplies by 1 + w, llama.cpp by w."""
    return Layout(shift=1.0 if name.endswith("norm.weight") else 0.0)


def _settings(config: Config) -> dict[str, Any]:
    query_scale(config, LARGE)
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if config[key] is None:  # llama.cpp caps with a default then
            raise unsupported(key, None)
    if window_period(config) != 2:
        raise unsupported("layer_types", config["layer_types"])
    return {
        **attention(config),
        **rope(config["rope_parameters"], ("default",)),
        "attention.sliding_window": config["sliding_window"],
        "attn_logit_softcapping": float(config["attn_logit_softcapping"]),
        "final_logit_softcapping": float(config["final_logit_softcapping"]),
    }


FAMILY = Family(
    {"gemma2": "gemma2"},
    _settings,
    FIXED,
    norm_layout,
    own_head=False,
)
