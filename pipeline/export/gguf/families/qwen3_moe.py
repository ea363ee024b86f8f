"""Qwen 3 with a mixture of experts in every block."""

from typing import Any

from pipeline.export.gguf.families import gate_and_up, mixture
from pipeline.export.gguf.families.qwen3 import FAMILY as QWEN3

# llama.cpp makes the weights of a token's experts sum to 1
MIXTURE: dict[str, tuple[Any, ...]] = {
    "norm_topk_prob": (True,),
    "decoder_sparse_step": (1,),
    "mlp_only_layers": ([], None),
}

FAMILY = QWEN3._replace(
    model_types=("qwen3_moe",),
    architecture="qwen3moe",
    settings=lambda config: {**QWEN3.settings(config), **mixture(config)},
    fixed={**QWEN3.fixed, **MIXTURE},
    split=gate_and_up,
)
