"""Qwen 2 and 2.5."""

from typing import Any

from pipeline.export.gguf.families import Config, Family, head_size, rotary, unsupported


def _settings(config: Config) -> dict[str, Any]:
    if (size := head_size(config)) * config["num_attention_heads"] != config["hidden_size"]:
        raise unsupported("head_dim", size)
    return rotary(config, ("default", "linear", "yarn"))


FAMILY = Family(("qwen2",), "qwen2", _settings, {"hidden_act": ("silu",)})
