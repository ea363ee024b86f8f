"""Gemma 4 without per-layer embeddings: heads of two sizes; 26B-A4B has experts too."""

from msgspec.structs import replace

from pipeline.calc.architecture import Architecture, Block, BlockStyle, Heads, Linear
from pipeline.calc.families import Config, UnsupportedLayer
from pipeline.calc.families.llama_like import GEMMA, decoder, with_experts

KINDS = ("sliding_attention", "full_attention")


def gemma4_text(config: Config) -> Architecture:
    if width := config.count("hidden_size_per_layer_input", default=256):
        raise UnsupportedLayer(
            f"{config.source}: layer 0 has per-layer embeddings of {width:,}, as E2B and E4B, "
            "which is not supported."
        )
    if shared := config.count("num_kv_shared_layers", default=0):
        raise UnsupportedLayer(
            f"{config.source}: the last {shared} layers use keys and values of others, which is "
            "not supported."
        )
    experts = config.flag("enable_moe_block", False)
    style = BlockStyle(
        norm="rms32",
        norms="both",
        qk_norm="head",
        value_norm=True,
        activation="gelu",
        scaled_embeddings=True,
        final_softcap=config.get("final_logit_softcapping") is not None,
        top_k=config.size("top_k_experts") if experts else 0,
        linear_router=True,
        experts_beside=experts,
        router32=True,
    )
    built = decoder(config, style, GEMMA)
    sliding, full = built.blocks[0], _full_attention(config, built)
    if experts:
        sliding, full = (_with_experts(config, block, built.hidden) for block in (sliding, full))
    layers = len(built.blocks)
    kinds = config.layer_types("layer_types", layers, KINDS) or [
        KINDS[index % 6 == 5] for index in range(layers)
    ]
    kinds[-1] = KINDS[1]  # the library forces the last one
    return replace(built, blocks=tuple(full if kind == KINDS[1] else sliding for kind in kinds))


def _full_attention(config: Config, built: Architecture) -> Block:
    """Larger heads; with attention_k_eq_v the values are the keys before their norm."""
    bias, same = config.flag("attention_bias", False), config.flag("attention_k_eq_v", False)
    # only configs that the library saved have per_layer_config: what differs from the other layers
    if config.get("per_layer_config") is None:
        size = config.size("global_head_dim", default=512)
        keys = (
            config.size("num_global_key_value_heads", default=built.kv_heads)
            if same
            else built.kv_heads
        )
    else:
        first, *others = list(config.section("per_layer_config").values()) or [{}]
        if not isinstance(first, dict) or any(other != first for other in others):
            raise UnsupportedLayer(
                f"{config.source}: per_layer_config must be the same for all layers that it lists."
            )
        changed = Config(first, config.source)
        size = changed.size("head_dim", default=built.head_size)
        keys = changed.size("num_key_value_heads", default=built.kv_heads)
    hidden, q, kv = built.hidden, built.heads * size, keys * size
    values = () if same else (Linear("self_attn.v_proj", hidden, kv, bias),)
    attention = (
        Linear("self_attn.q_proj", hidden, q, bias),
        Linear("self_attn.k_proj", hidden, kv, bias),
        *values,
        Linear("self_attn.o_proj", q, hidden, bias),
    )
    return replace(
        built.blocks[0],
        attention=attention,
        norms=4 * hidden + 2 * size,
        heads=Heads(built.heads, keys, size, size),
    )


def _with_experts(config: Config, block: Block, hidden: int) -> Block:
    experts, inner = config.size("num_experts"), config.size("moe_intermediate_size")
    sparse = with_experts(block, hidden, experts, inner)
    up, down = (
        linear._replace(name=linear.name.removeprefix("mlp.")) for linear in sparse.feed_forward
    )
    return replace(
        sparse,
        feed_forward=(up, down, *block.feed_forward),
        norms=block.norms + 3 * hidden,
        router=Linear("router.proj", hidden, experts),
        other=hidden + experts,  # scales of the router's input and of each expert's weight
    )


FAMILIES = {"gemma4_text": gemma4_text}
