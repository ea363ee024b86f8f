"""The text models of Llama 4: attention in chunks, but for every fourth block, which has no
positions; a mixture beside a shared expert in every, or every second, block.
"""

from typing import Any

from pipeline.export.gguf.families import (
    Config,
    Family,
    gate_and_up,
    mixture,
    rotary,
    unsupported,
)
from pipeline.export.gguf.families.llama import FAMILY as LLAMA

PERIOD = 4
UNNORMED = 128  # experts of the model whose queries and keys llama.cpp does not normalize


def _settings(config: Config) -> dict[str, Any]:
    blocks = config["num_hidden_layers"]
    experts, step = config["num_local_experts"], config["interleave_moe_layer_step"]
    rotated = [int(number % PERIOD != 0) for number in range(1, blocks + 1)]
    expected = {
        "no_rope_layers": rotated,
        "layer_types": [
            "chunked_attention" if rotates else "full_attention" for rotates in rotated
        ],
        "moe_layers": list(range(step - 1, blocks, step)),
    }
    for key, value in expected.items():
        if config[key][:blocks] != value:
            raise unsupported(key, config[key])
    if config["use_qk_norm"] != (experts != UNNORMED):
        raise unsupported("use_qk_norm", config["use_qk_norm"])
    return {
        **rotary(config, ("default", "llama3")),
        **mixture({**config, "moe_intermediate_size": config["intermediate_size"]}),
        "feed_forward_length": config["intermediate_size_mlp"],
        "interleave_moe_layer_step": step,
    }


FAMILY = Family(
    {"llama4_text": "llama4"},
    _settings,
    {
        "hidden_act": ("silu",),
        "attention_bias": (False,),
        "attention_chunk_size": (8192,),
        "attn_temperature_tuning": (True,),
        "floor_scale": (8192,),
        "attn_scale": (0.1,),
    },
    extra=LLAMA.extra,
    split=lambda config, name: gate_and_up(config, name, transposed=True),
)
