"""Phi 1, 1.5 and 2: attention and MLP side by side, a head with a bias."""

from typing import Any

from pipeline.export.gguf.families import Config, Family, partly_rotary, refuse_narrow_heads


def _settings(config: Config) -> dict[str, Any]:
    refuse_narrow_heads(config)
    return partly_rotary(config, ("default", "linear"))


FAMILY = Family(
    {"phi": "phi2"},
    _settings,
    {
        "hidden_act": ("gelu_new", "gelu_pytorch_tanh"),
        "qk_layernorm": (False,),
        "tie_word_embeddings": (False,),
    },
)
