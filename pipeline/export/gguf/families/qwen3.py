"""Qwen 3, whose queries and keys are normalized."""

from pipeline.export.gguf.families import Family, attention, rope, within_window

FAMILY = Family(
    ("qwen3",),
    "qwen3",
    lambda config: {
        **attention(config),
        **within_window(config),
        **rope(config["rope_parameters"], ("default", "linear", "yarn")),
    },
    {"hidden_act": ("silu",), "attention_bias": (False,)},
)
