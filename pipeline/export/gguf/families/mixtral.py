"""Mixtral: a Llama with a mixture of experts."""

from pipeline.export.gguf.families import gate_and_up, mixture
from pipeline.export.gguf.families.llama import FAMILY as LLAMA

FAMILY = LLAMA._replace(
    model_types=("mixtral",),
    settings=lambda config: {**LLAMA.settings(config), **mixture(config)},
    split=gate_and_up,
)
