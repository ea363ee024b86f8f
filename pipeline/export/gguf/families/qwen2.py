"""Qwen 2 and 2.5."""

from typing import Any

from pipeline.export.gguf.families import Config, Family, refuse_narrow_heads, rotary


def _settings(config: Config) -> dict[str, Any]:
    refuse_narrow_heads(config)
    return rotary(config, ("default", "linear", "yarn"))


FAMILY = Family({"qwen2": "qwen2"}, _settings, {"hidden_act": ("silu",)})
