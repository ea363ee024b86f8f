"""Qwen3.5 and Qwen3.6: three of four blocks have a gated delta net, a linear attention."""

from msgspec.structs import replace

from pipeline.calc.architecture import Architecture, Block, BlockStyle, Heads, Linear
from pipeline.calc.families import Config
from pipeline.calc.families.llama_like import Defaults, decoder, gated, with_experts

KINDS = ("linear_attention", "full_attention")


def qwen3_5_text(config: Config) -> Architecture:
    return _hybrid(config, kv_heads=4)


def qwen3_5_moe_text(config: Config) -> Architecture:
    """Experts, and a shared one that is scaled by a gate, in every block."""
    built = _hybrid(config, kv_heads=2, top_k=config.size("num_experts_per_tok", default=8))
    hidden = built.hidden
    shared_inner = config.size("shared_expert_intermediate_size", default=512)
    shared = (
        *gated("mlp.shared_expert", hidden, shared_inner),
        Linear("mlp.shared_expert_gate", hidden, 1),
    )
    experts = config.size("num_experts", default=256)
    inner = config.size("moe_intermediate_size", default=512)
    made = {}
    for block in dict.fromkeys(built.blocks):
        sparse = with_experts(block, hidden, experts, inner)
        made[block] = replace(sparse, feed_forward=(*sparse.feed_forward, *shared))
    return replace(built, blocks=tuple(made[block] for block in built.blocks))


def _hybrid(config: Config, kv_heads: int, top_k: int = 0) -> Architecture:
    rotary = Config(config.section("rope_parameters"), config.source).share(
        "partial_rotary_factor", 0.25
    )
    style = BlockStyle(
        norm="rms32",
        qk_norm="head",
        rotary=config.share("partial_rotary_factor", rotary),
        rejoins=True,
        output_gate=True,
        top_k=top_k,
    )
    inner = 1 if top_k else None
    default = Defaults(
        head_size=256, kv_heads=kv_heads, context=32_768, reads_bias=True, inner=inner
    )
    built = decoder(config, style, default)
    q, *others = built.blocks[0].attention
    # queries and their gates
    full = replace(built.blocks[0], attention=(q._replace(outputs=2 * q.outputs), *others))
    linear = _delta_net(config, built)
    every = config.size("full_attention_interval", default=4)
    layers = len(built.blocks)
    kinds = config.layer_types("layer_types", layers, KINDS)
    kinds = kinds or [KINDS[(index + 1) % every == 0] for index in range(layers)]
    return replace(built, blocks=tuple(full if kind == KINDS[1] else linear for kind in kinds))


def _delta_net(config: Config, built: Architecture) -> Block:
    """A short convolution of queries, keys and values; a matrix keys × values per head."""
    keys = config.size("linear_num_key_heads", default=16)
    values = config.size("linear_num_value_heads", default=32)
    size = config.size("linear_key_head_dim", default=128)
    value_size = config.size("linear_value_head_dim", default=128)
    mixed, out = 2 * keys * size + values * value_size, values * value_size
    attention = (
        Linear("linear_attn.in_proj_qkv", built.hidden, mixed),
        Linear("linear_attn.in_proj_z", built.hidden, out),
        Linear("linear_attn.in_proj_b", built.hidden, values),
        Linear("linear_attn.in_proj_a", built.hidden, values),
        Linear("linear_attn.out_proj", out, built.hidden),
    )
    kernel = config.size("linear_conv_kernel_dim", default=4)
    return replace(
        built.blocks[0],
        attention=attention,
        norms=2 * built.hidden + value_size,
        other=mixed * kernel + 2 * values,  # the convolution; each head's decay and its bias
        kind="delta",
        heads=Heads(values, keys, size, value_size),
    )


FAMILIES = {build.__name__: build for build in (qwen3_5_moe_text, qwen3_5_text)}
