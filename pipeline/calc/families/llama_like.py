"""Llama and its variants: RMSNorm, rotary positions, grouped queries, gates, experts."""

from collections.abc import Callable
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from pipeline.calc.architecture import Architecture, Block, BlockStyle, Linear
from pipeline.calc.families import MOST_LAYERS, Config
from pipeline.errors import UserError


class Defaults(Struct, frozen=True):
    """Defaults of transformers for missing keys.

    0 means as many as heads (kv_heads), or width / heads (head_size).
    """

    tie: bool = False
    bias: bool = False
    out_bias: bool = True  # o_proj has a bias if q, k and v have one
    head_size: int = 0
    kv_heads: int = 0
    context: int = 2048
    fused: bool = False  # one linear for q, k and v, one for gate and up
    reads_bias: bool = False  # the model class reads attention_bias
    reads_mlp_bias: bool = False
    inner: int | None = None  # of the feed-forward; None: intermediate_size must be there


def decoder(config: Config, style: BlockStyle, default: Defaults) -> Architecture:
    """A model of this family, without experts. Raises UserError."""
    hidden, heads = config.size("hidden_size"), config.size("num_attention_heads")
    layers = config.size("num_hidden_layers", most=MOST_LAYERS)
    kv_heads = config.size("num_key_value_heads", default=default.kv_heads or heads)
    if config.is_null("num_key_value_heads"):
        kv_heads = heads
    if not config.get("head_dim") and not default.head_size and hidden % heads:
        raise UserError(
            f"{config.source}: hidden_size {hidden} is not a multiple of num_attention_heads "
            f"{heads}."
        )
    if heads % kv_heads:
        raise UserError(
            f"{config.source}: num_attention_heads {heads} is not a multiple of key/value heads "
            f"{kv_heads}."
        )
    head_size = config.size("head_dim", default=default.head_size or hidden // heads)
    bias = config.flag("attention_bias", default.bias) if default.reads_bias else default.bias
    out_bias = bias and default.out_bias
    q, kv = heads * head_size, kv_heads * head_size
    inner = config.size("intermediate_size", default=default.inner)
    mlp_bias = default.reads_mlp_bias and config.flag("mlp_bias", False)
    attention: tuple[Linear, ...] = (
        Linear("self_attn.q_proj", hidden, q, bias),
        Linear("self_attn.k_proj", hidden, kv, bias),
        Linear("self_attn.v_proj", hidden, kv, bias),
        Linear("self_attn.o_proj", q, hidden, out_bias),
    )
    feed_forward: tuple[Linear, ...] = (
        Linear("mlp.gate_proj", hidden, inner, mlp_bias),
        Linear("mlp.up_proj", hidden, inner, mlp_bias),
        Linear("mlp.down_proj", inner, hidden, mlp_bias),
    )
    if default.fused:
        attention = (
            Linear("self_attn.o_proj", q, hidden),
            Linear("self_attn.qkv_proj", hidden, q + 2 * kv),
        )
        feed_forward = (
            Linear("mlp.gate_up_proj", hidden, 2 * inner),
            Linear("mlp.down_proj", inner, hidden),
        )
    qk_norm = {"": 0, "head": 2 * head_size, "width": q + kv, "rotated": 0}[style.qk_norm]
    norms = hidden * (4 if style.norms == "both" else 2) + qk_norm
    dense = Block(attention, feed_forward, norms)
    return Architecture(
        family="",
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_size=head_size,
        vocabulary=config.size("vocab_size"),
        context=config.size("max_position_embeddings", default=default.context),
        blocks=(dense,) * layers,
        embedding_width=hidden,
        final_norm=hidden,
        tied=config.flag("tie_word_embeddings", default.tie),
        style=style,
    )


GEMMA = Defaults(tie=True, head_size=256, kv_heads=4, context=131_072, reads_bias=True)


def gemma2(config: Config) -> Architecture:
    style = BlockStyle(
        norm="rms32",
        norms="both",
        activation="gelu",
        softcap=not config.is_null("attn_logit_softcapping"),
        final_softcap=not config.is_null("final_logit_softcapping"),
        scaled_embeddings=True,
    )
    return decoder(config, style, replace(GEMMA, context=8192))


def phi3(config: Config) -> Architecture:
    rope = config.get("rope_parameters") or config.get("rope_scaling")
    inner = Config(rope if isinstance(rope, dict) else {}, config.source)
    rotary = config.share("partial_rotary_factor", inner.share("partial_rotary_factor", 1.0))
    return decoder(
        config, BlockStyle(rotary=rotary, rejoins=True), Defaults(context=4096, fused=True)
    )


def mixtral(config: Config) -> Architecture:
    style = BlockStyle(top_k=config.size("num_experts_per_tok", default=2), split_experts=True)
    built = decoder(config, style, Defaults(kv_heads=8, context=131_072))
    experts = config.size("num_local_experts", "num_experts", default=8)
    block = with_experts(built.blocks[0], built.hidden, experts, config.size("intermediate_size"))
    return built.with_every_block(block)


def qwen3_moe(config: Config) -> Architecture:
    style = BlockStyle(
        qk_norm="head", top_k=config.size("num_experts_per_tok", default=8), split_experts=True
    )
    built = decoder(config, style, Defaults(kv_heads=4, context=32_768, reads_bias=True))
    experts = config.size("num_experts", "num_local_experts", default=128)
    inner = config.size("moe_intermediate_size", default=768)
    sparse = with_experts(built.blocks[0], built.hidden, experts, inner)
    step = config.size("decoder_sparse_step", default=1)
    dense = config.layers("mlp_only_layers", len(built.blocks))
    blocks = tuple(
        sparse if index not in dense and (index + 1) % step == 0 else block
        for index, block in enumerate(built.blocks)
    )
    return replace(built, blocks=blocks)


def gpt_oss(config: Config) -> Architecture:
    style = BlockStyle(
        norm="rms32", sinks=True, clamps=True, top_k=config.size("num_experts_per_tok", default=4)
    )
    default = Defaults(bias=True, head_size=64, kv_heads=8, context=131_072, reads_bias=True)
    built = decoder(config, style, default)
    experts = config.size("num_local_experts", "num_experts", default=128)
    sparse = with_experts(
        built.blocks[0], built.hidden, experts, config.size("intermediate_size"), bias=True
    )
    return built.with_every_block(replace(sparse, other=built.heads))


def with_experts(block: Block, hidden: int, experts: int, inner: int, bias: bool = False) -> Block:
    """The block with a router and experts, stacked in two tensors, as its feed-forward."""
    linears = (
        Linear("mlp.experts.gate_up_proj", hidden, 2 * inner, bias, experts),
        Linear("mlp.experts.down_proj", inner, hidden, bias, experts),
    )
    return replace(block, feed_forward=linears, router=Linear("mlp.gate", hidden, experts, bias))


def gated(prefix: str, hidden: int, inner: int) -> tuple[Linear, ...]:
    """gate, up and down of a feed-forward."""
    return (
        Linear(f"{prefix}.gate_proj", hidden, inner),
        Linear(f"{prefix}.up_proj", hidden, inner),
        Linear(f"{prefix}.down_proj", inner, hidden),
    )


def _family(default: Defaults, **style: Any) -> Callable[[Config], Architecture]:
    """A family that is told apart by its defaults and its blocks' style alone."""
    return lambda config: decoder(config, BlockStyle(**style), default)


_LLAMA = Defaults(reads_bias=True, reads_mlp_bias=True)
FAMILIES = {
    "llama": _family(_LLAMA),
    "granite": _family(_LLAMA, scaled_embeddings=True, scaled_branches=True),
    "smollm3": _family(replace(_LLAMA, tie=True, kv_heads=4, context=32_768)),
    "mistral": _family(Defaults(kv_heads=8, context=131_072)),
    "qwen2": _family(Defaults(bias=True, out_bias=False, kv_heads=32, context=32_768)),
    "qwen3": _family(
        Defaults(head_size=128, kv_heads=32, context=32_768, reads_bias=True), qk_norm="head"
    ),
    **dict.fromkeys(
        ("olmo2", "olmo3"),
        _family(Defaults(reads_bias=True), norm="rms32", norms="inside", qk_norm="width"),
    ),
    "gemma2": gemma2,
    "gemma3_text": _family(
        GEMMA, norm="rms32", norms="both", qk_norm="head", activation="gelu", scaled_embeddings=True
    ),
    "phi3": phi3,
    "mixtral": mixtral,
    "qwen3_moe": qwen3_moe,
    "gpt_oss": gpt_oss,
}
