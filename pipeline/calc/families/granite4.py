"""Granite 4 without Mamba layers or experts: micro, 1B and 350M. Its H models are hybrids."""

from msgspec.structs import replace

from pipeline.calc.architecture import Architecture, BlockStyle, Linear
from pipeline.calc.families import Config, UnsupportedLayer
from pipeline.calc.families.llama_like import Defaults, decoder

ATTENTION = ("attention", "full_attention")


def granitemoehybrid(config: Config) -> Architecture:
    """Llama's attention; gate and up of the feed-forward are one linear."""
    rotary = 1.0 if config.get("position_embedding_type") == "rope" else 0
    style = BlockStyle(rotary=rotary, scaled_embeddings=True, scaled_branches=True)
    built = decoder(config, style, Defaults(reads_bias=True, inner=1))
    key = "layers_block_type" if config.get("layers_block_type") else "layer_types"
    if not config.layer_types(key, len(built.blocks), ATTENTION):
        raise UnsupportedLayer(
            f"{config.source}: layer 0 is a Mamba layer, the default, which is not supported."
        )
    if config.count("num_local_experts", default=8):
        raise UnsupportedLayer(
            f"{config.source}: layer 0 has Granite's experts, which is not supported."
        )
    inner = config.size("shared_intermediate_size", default=1024)
    feed_forward = (
        Linear("shared_mlp.input_linear", built.hidden, 2 * inner),
        Linear("shared_mlp.output_linear", inner, built.hidden),
    )
    return built.with_every_block(replace(built.blocks[0], feed_forward=feed_forward))


FAMILIES = {"granitemoehybrid": granitemoehybrid}
