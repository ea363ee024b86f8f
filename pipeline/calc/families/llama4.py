"""Llama 4: shared and routed experts; every fourth block has no positions."""

from msgspec.structs import replace

from pipeline.calc.architecture import Architecture, BlockStyle, Linear
from pipeline.calc.families import Config
from pipeline.calc.families.llama_like import Defaults, decoder, gated, with_experts
from pipeline.errors import UserError
from pipeline.files.text import abbreviate_repr


def llama4_text(config: Config) -> Architecture:
    style = BlockStyle(
        qk_norm="rotated" if config.flag("use_qk_norm", True) else "",
        complex_rotary=True,
        softmax32=False,
        top_k=config.size("num_experts_per_tok", default=1),
        all_experts=True,
        linear_router=True,
    )
    built = decoder(
        config, style, Defaults(head_size=128, kv_heads=8, context=131_072, reads_bias=True)
    )
    hidden, layers = built.hidden, len(built.blocks)
    inner = config.size("intermediate_size")
    wide = gated("feed_forward", hidden, config.size("intermediate_size_mlp", default=16384))
    dense = replace(built.blocks[0], feed_forward=wide)
    sparse = with_experts(dense, hidden, config.size("num_local_experts", default=16), inner)
    assert sparse.router is not None
    routed = (
        linear._replace(name=linear.name.replace("mlp.", "feed_forward."))
        for linear in sparse.feed_forward
    )
    shared = gated("feed_forward.shared_expert", hidden, inner)
    router = Linear("feed_forward.router", hidden, sparse.router.outputs)
    sparse = replace(sparse, feed_forward=(*routed, *shared), router=router)
    every = config.size("no_rope_layer_interval", default=4)
    step = config.size("interleave_moe_layer_step", default=1)
    positions = config.get("no_rope_layers") or [
        int((index + 1) % every != 0) for index in range(layers)
    ]
    if not isinstance(positions, list) or len(positions) < layers:
        raise UserError(
            f"{config.source}: no_rope_layers must list 0 or 1 for each of the {layers} layers, "
            f"got {abbreviate_repr(positions)}."
        )
    chosen = config.layers("moe_layers", layers)
    if config.get("moe_layers") is None:
        chosen = set(range(step - 1, layers, step))
    made = {}
    for is_sparse, block in ((False, dense), (True, sparse)):
        for rotates in (False, True):
            made[is_sparse, rotates] = replace(block, rotates=rotates)
    blocks = tuple(made[index in chosen, bool(positions[index])] for index in range(layers))
    notes = (
        "every token passes through every expert, as in transformers: other libraries need less",
    )
    return replace(built, blocks=blocks, notes=notes)


FAMILIES = {"llama4_text": llama4_text}
