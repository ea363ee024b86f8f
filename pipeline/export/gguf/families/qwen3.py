"""Qwen 3, whose queries and keys are normalized."""

from pipeline.export.gguf.families import Family, rotary

FAMILY = Family(
    ("qwen3",),
    "qwen3",
    lambda config: rotary(config, ("default", "linear", "yarn")),
    {"hidden_act": ("silu",), "attention_bias": (False,)},
)
