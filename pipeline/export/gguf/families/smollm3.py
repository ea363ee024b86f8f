"""SmolLM3: a Llama whose every fourth block has no positions."""

from typing import Any

from pipeline.export.gguf.families import Config, Family, rotary, unsupported
from pipeline.export.gguf.families.llama import rotated_by_neighbours

PERIOD = 4


def _settings(config: Config) -> dict[str, Any]:
    rotated = [bool(value) for value in config["no_rope_layers"]][: config["num_hidden_layers"]]
    if rotated != [number % PERIOD != 0 for number in range(1, len(rotated) + 1)]:
        raise unsupported("no_rope_layers", config["no_rope_layers"])
    return rotary(config, ("default", "linear", "yarn"))


FAMILY = Family(
    {"smollm3": "smollm3"},
    _settings,
    {"hidden_act": ("silu",), "attention_bias": (False,), "mlp_bias": (False,)},
    rotated_by_neighbours,
)
