"""The checks of `lora doctor --gpu` at a toy's sizes."""

from dataclasses import replace

import pytest

from pipeline.stages.gpu_checks import checks

HEADS = {
    "hidden_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "vocab_size": 128,
}
TOY = replace(
    checks.SMALL,
    config={**checks.LLAMA, **HEADS, "intermediate_size": 96, "num_hidden_layers": 2},
    batch=3,
    length=20,
    steps=2,
)


def shrink(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = {
        **checks.WIDE,
        **HEADS,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "sliding_window": 16,
    }
    for name, value in {"SMALL": TOY, "LARGE": TOY, "FAST": TOY, "WIDE": wide, "NEEDED": 0}.items():
        monkeypatch.setattr(checks, name, value)
