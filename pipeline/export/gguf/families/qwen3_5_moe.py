"""The text models of Qwen 3.5 with a mixture of experts."""

from pipeline.export.gguf.families import mixture
from pipeline.export.gguf.families.qwen3_5 import FAMILY as QWEN3_5

FAMILY = QWEN3_5._replace(
    model_types=("qwen3_5_moe_text",),
    architecture="qwen35moe",
    settings=lambda config: {**QWEN3_5.settings(config), **mixture(config)},
)
