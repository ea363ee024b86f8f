"""Later blocks with experts and a shared one: GLM-4.5, GLM-4.7-Flash, DeepSeek-V3.

DeepSeek-V3 and GLM-4.7-Flash have multi-head latent attention: queries, keys and values are
expanded from compressed ones, and only a part of each head is rotated.
"""

from typing import NamedTuple

from msgspec.structs import replace

from pipeline.calc.architecture import Architecture, Block, BlockStyle, Heads, Linear
from pipeline.calc.families import MOST_LAYERS, Config
from pipeline.calc.families.llama_like import Defaults, decoder, gated, with_experts


class Latent(NamedTuple):
    """The library's default sizes: ranks of queries and keys, two parts of a head, its value."""

    q_rank: int
    kv_rank: int
    plain: int
    rotated: int
    value: int


def glm4_moe(config: Config) -> Architecture:
    rope = Config(config.section("rope_parameters"), config.source)
    style = BlockStyle(
        qk_norm="head" if config.flag("use_qk_norm", False) else "",
        rotary=config.share("partial_rotary_factor", rope.share("partial_rotary_factor", 0.5)),
        rejoins=True,
        top_k=config.size("num_experts_per_tok", default=8),
        split_experts=True,
        router32=True,
    )
    # rounded down by the library
    size = config.size("hidden_size") // config.size("num_attention_heads")
    default = Defaults(head_size=size, kv_heads=8, context=131_072, reads_bias=True, out_bias=False)
    built = decoder(config, style, default)
    dense = config.count("first_k_dense_replace", default=1, most=MOST_LAYERS)
    return _with_shared(config, built, dense, experts=128, inner=1408)


def deepseek_v3(config: Config) -> Architecture:
    built = _latent(config, Latent(1536, 512, 128, 64, 128), top_k=8, context=4096)
    dense = config.count("first_k_dense_replace", default=3, most=MOST_LAYERS)
    return _with_shared(config, built, dense, experts=256, inner=2048)


def glm4_moe_lite(config: Config) -> Architecture:
    built = _latent(config, Latent(768, 512, 192, 64, 256), top_k=4, context=202_752)
    layers = config.layer_types("mlp_layer_types", len(built.blocks), ("dense", "sparse"))
    dense = layers.count("dense") if layers else 1  # they come first
    return _with_shared(config, built, dense, experts=64, inner=1536)


def _latent(config: Config, default: Latent, top_k: int, context: int) -> Architecture:
    """A model of dense blocks with latent attention."""
    hidden, heads = config.size("hidden_size"), config.size("num_attention_heads")
    layers = config.size("num_hidden_layers", most=MOST_LAYERS)
    bias = config.flag("attention_bias", False)
    q_rank = (
        0 if config.is_null("q_lora_rank") else config.size("q_lora_rank", default=default.q_rank)
    )
    kv_rank = config.size("kv_lora_rank", default=default.kv_rank)
    plain = config.size("qk_nope_head_dim", default=default.plain)
    rotated = config.size("qk_rope_head_dim", default=default.rotated)
    value = config.size("v_head_dim", default=default.value)
    q = heads * (plain + rotated)
    queries: tuple[Linear, ...] = (Linear("self_attn.q_proj", hidden, q),)
    if q_rank:
        queries = (
            Linear("self_attn.q_a_proj", hidden, q_rank, bias),
            Linear("self_attn.q_b_proj", q_rank, q),
        )
    attention = (
        *queries,
        Linear("self_attn.kv_a_proj_with_mqa", hidden, kv_rank + rotated, bias),
        Linear("self_attn.kv_b_proj", kv_rank, heads * (plain + value)),
        Linear("self_attn.o_proj", heads * value, hidden, bias),
    )
    block = Block(
        attention,
        gated("mlp", hidden, config.size("intermediate_size")),
        norms=2 * hidden + q_rank + kv_rank,
        kind="latent",
        heads=Heads(heads, heads, plain + rotated, value),
    )
    return Architecture(
        family="",
        hidden=hidden,
        heads=heads,
        kv_heads=heads,
        head_size=rotated,  # the tables of positions have this width
        vocabulary=config.size("vocab_size"),
        context=config.size("max_position_embeddings", default=context),
        blocks=(block,) * layers,
        embedding_width=hidden,
        final_norm=hidden,
        tied=config.flag("tie_word_embeddings", False),
        style=BlockStyle(
            top_k=config.size("num_experts_per_tok", default=top_k),
            split_experts=True,
            router32=True,
        ),
    )


def _with_shared(
    config: Config, built: Architecture, dense: int, experts: int, inner: int
) -> Architecture:
    """`built` with experts and a shared one in every block after the first `dense`.

    `experts`, `inner`: the library's defaults.
    """
    first = built.blocks[0]
    inner = config.size("moe_intermediate_size", default=inner)
    routed = config.size("n_routed_experts", "num_local_experts", default=experts)
    sparse = with_experts(first, built.hidden, routed, inner)
    shared = gated(
        "mlp.shared_experts", built.hidden, inner * config.size("n_shared_experts", default=1)
    )
    sparse = replace(sparse, feed_forward=(*sparse.feed_forward, *shared))
    blocks = tuple(first if index < dense else sparse for index in range(len(built.blocks)))
    return replace(built, blocks=blocks)


FAMILIES = {build.__name__: build for build in (deepseek_v3, glm4_moe, glm4_moe_lite)}
