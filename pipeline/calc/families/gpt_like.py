"""LayerNorm, biases, a plain feed-forward: GPT-2, GPT-3, GPT-NeoX, OPT, MiniGPT, RoBERTa."""

from collections.abc import Sequence

from msgspec.structs import replace

from pipeline.calc.architecture import Architecture, Block, BlockStyle, Linear
from pipeline.calc.families import MOST_LAYERS, Config
from pipeline.errors import UserError


def gpt2(config: Config) -> Architecture:
    hidden, context = config.size("n_embd", "hidden_size"), config.size("n_positions", default=1024)
    inner = config.size("n_inner", default=4 * hidden)
    block = Block(
        (
            Linear("attn.c_attn", hidden, 3 * hidden, True),
            Linear("attn.c_proj", hidden, hidden, True),
        ),
        (Linear("mlp.c_fc", hidden, inner, True), Linear("mlp.c_proj", inner, hidden, True)),
        norms=4 * hidden,
    )
    activation = config.get("activation_function", "gelu_new")
    style = BlockStyle(norm="layer", gated=False, rotary=0, activation=activation, softmax32=False)
    keys = ("n_head", "num_attention_heads"), ("n_layer", "num_hidden_layers")
    built = _build(config, block, hidden, context, style, positions=context, keys=keys)
    return replace(built, layers="transformer.h")


def gpt3(config: Config) -> Architecture:
    """GPT-2 with separate q, k, v and o, as in the LoRA paper; no checkpoint is public."""
    built = gpt2(config)
    first = built.blocks[0]
    attention = tuple(
        Linear(f"attn.{name}_proj", built.hidden, built.hidden, True) for name in "qkvo"
    )
    return built.with_every_block(replace(first, attention=attention))


def gpt_neox(config: Config) -> Architecture:
    hidden, inner = config.size("hidden_size"), config.size("intermediate_size")
    bias = config.flag("attention_bias", True)
    block = Block(
        (
            Linear("attention.query_key_value", hidden, 3 * hidden, bias),
            Linear("attention.dense", hidden, hidden, bias),
        ),
        (
            Linear("mlp.dense_h_to_4h", hidden, inner, True),
            Linear("mlp.dense_4h_to_h", inner, hidden, True),
        ),
        norms=4 * hidden,
    )
    style = BlockStyle(
        norm="layer",
        norms="parallel" if config.flag("use_parallel_residual", True) else "before",
        gated=False,
        rotary=config.share("rotary_pct", 0.25),
        rejoins=True,
        activation=config.get("hidden_act", "gelu"),
    )
    context = config.size("max_position_embeddings", default=2048)
    return replace(
        _build(config, block, hidden, context, style, tie=False), layers="gpt_neox.layers"
    )


def opt(config: Config) -> Architecture:
    hidden, inner = config.size("hidden_size"), config.size("ffn_dim")
    bias = config.flag("enable_bias", True)
    affine = config.flag("layer_norm_elementwise_affine", True)
    block = Block(
        tuple(
            Linear(f"self_attn.{name}", hidden, hidden, bias)
            for name in ("k_proj", "v_proj", "q_proj", "out_proj")
        ),
        (Linear("fc1", hidden, inner, bias), Linear("fc2", inner, hidden, bias)),
        norms=4 * hidden if affine else 0,
    )
    before = config.flag("do_layer_norm_before", True)
    style = BlockStyle(
        norm="layer",
        norms="before" if before else "after",
        gated=False,
        rotary=0,
        activation=config.get("activation_function", "relu"),
        scaled_queries=True,
    )
    context = config.size("max_position_embeddings", default=2048)
    # OPT's table has two unused rows
    built = _build(config, block, hidden, context, style, positions=context + 2)
    width = config.size("word_embed_proj_dim", default=hidden)
    outside: tuple[Linear, ...] = ()
    if width != hidden:
        outside = (Linear("project_out", hidden, width), Linear("project_in", width, hidden))
    has_final_norm = before and not config.flag("_remove_final_layer_norm", False)
    return replace(
        built,
        embedding_width=width,
        outside=outside,
        final_norm=2 * hidden if has_final_norm and affine else 0,
        layers="model.decoder.layers",
    )


def minigpt(config: Config) -> Architecture:
    """OPT's names, with sinusoidal positions: a table, not parameters."""
    built = opt(config)
    style = built.style._replace(scaled_queries=False, ours=True)
    return replace(built, positions=0, fixed_positions=built.positions, style=style)


def roberta(config: Config) -> Architecture:
    hidden, inner = config.size("hidden_size"), config.size("intermediate_size")
    block = Block(
        (
            *(
                Linear(f"attention.self.{name}", hidden, hidden, True)
                for name in ("query", "key", "value")
            ),
            Linear("attention.output.dense", hidden, hidden, True),
        ),
        (
            Linear("intermediate.dense", hidden, inner, True),
            Linear("output.dense", inner, hidden, True),
        ),
        norms=4 * hidden,
    )
    style = BlockStyle(
        norm="layer",
        norms="after",
        gated=False,
        rotary=0,
        activation=config.get("hidden_act", "gelu"),
    )
    context = config.size("max_position_embeddings", default=512)
    # with the rows of another table, that of the tokens' types
    built = _build(
        config,
        block,
        hidden,
        context,
        style,
        positions=context + config.size("type_vocab_size", default=2),
    )
    return replace(
        built,
        final_norm=0,
        extra_norms=4 * hidden,
        outside=(Linear("lm_head.dense", hidden, hidden, True),),
        head_bias=built.vocabulary,
        layers="roberta.encoder.layer",
        head_name="lm_head.decoder",
    )


def _build(
    config: Config,
    block: Block,
    hidden: int,
    context: int,
    style: BlockStyle,
    *,
    positions: int = 0,  # rows of the table
    tie: bool = True,
    keys: tuple[Sequence[str], Sequence[str]] = (("num_attention_heads",), ("num_hidden_layers",)),
) -> Architecture:
    heads, layers = config.size(*keys[0]), config.size(*keys[1], most=MOST_LAYERS)
    if hidden % heads:
        raise UserError(
            f"{config.source}: the width {hidden} is not a multiple of the {heads} heads."
        )
    return Architecture(
        family="",
        hidden=hidden,
        heads=heads,
        kv_heads=heads,
        head_size=hidden // heads,
        vocabulary=config.size("vocab_size"),
        context=context,
        blocks=(block,) * layers,
        embedding_width=hidden,
        final_norm=2 * hidden,
        tied=config.flag("tie_word_embeddings", tie),
        positions=positions * hidden,
        style=style,
    )


FAMILIES = {build.__name__: build for build in (gpt2, gpt3, gpt_neox, minigpt, opt, roberta)}
