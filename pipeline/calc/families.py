"""From a Hugging Face `config.json` to shapes: one short function for each way of building a block.

Defaults are those of `transformers`, whose files leave out what equals them.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from pipeline.calc.shapes import Architecture, Block, Linear, Style
from pipeline.errors import UserError

LARGEST = 2**31 - 1  # no dimension of a tensor that a GPU holds is larger

MOST_LAYERS = 10_000


class Config:
    """A config whose values are checked as they are read: errors name file, key, rule and value."""

    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        self._values, self.source = values, source

    def size(self, *keys: str, default: int | None = None, most: int = LARGEST) -> int:
        """A whole number from 1 to `most`, under the first of `keys` that is there."""
        for key in keys:
            value = self._values.get(key)
            if value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
                raise UserError(f"{self.source}: {key} must be a whole number from 1 to {most:,}, got {value!r}.")
            return value
        if default is None:
            raise UserError(f"{self.source}: {keys[0]} is missing, and the shapes depend on it.")
        return default

    def flag(self, key: str, default: bool) -> bool:
        value = self._values.get(key)
        if value is not None and not isinstance(value, bool):
            raise UserError(f"{self.source}: {key} must be true or false, got {value!r}.")
        return default if value is None else value

    def get(self, key: str, default: Any = None) -> Any:
        value = self._values.get(key)
        return default if value is None else value


def architecture(values: Mapping[str, Any], source: str) -> Architecture:
    """The shapes that a config describes. Raises UserError, naming an architecture that is not known."""
    if isinstance(values.get("text_config"), Mapping):  # a model of text and images: its language model
        text = architecture({"model_type": f"{values.get('model_type')}_text", **values["text_config"]}, source)
        return replace(text, notes=(*text.notes, "text model only: the image encoder is not counted"))
    family = values.get("model_type")
    if family == "opt" and values.get("activation_function") == "gelu":
        family = "minigpt"  # OPT's own checkpoints have relu
    build = FAMILIES.get(family) if isinstance(family, str) else None
    if build is None:
        raise UserError(
            f"{source}: the architecture {family!r} is not known. Known: {', '.join(sorted(FAMILIES))}. "
            "Its .safetensors files would do: their headers hold every shape. Give their folder instead."
        )
    built = replace(build(Config(values, source)), family=str(family), source=source)
    if built.hidden * built.vocabulary * len(built.blocks) > 2**62:
        raise UserError(f"{source}: the shapes overflow: {built.total:,} parameters are more than any memory holds.")
    return built


def _decoder(config: Config, *, style: Style, defaults: Mapping[str, Any] | None = None) -> Architecture:
    """Llama and all that differ from it by flags: RMSNorm, rotary positions, grouped queries, gated feed-forward."""
    fixed = {"tie": False, "bias": False, "out_bias": None, "head_size": None, **(defaults or {})}
    hidden, heads = config.size("hidden_size"), config.size("num_attention_heads")
    layers = config.size("num_hidden_layers", most=MOST_LAYERS)
    kv_heads = config.size("num_key_value_heads", default=fixed.get("kv_heads", heads))
    if not config.get("head_dim") and fixed["head_size"] is None and hidden % heads:
        raise UserError(f"{config.source}: hidden_size {hidden} is not a multiple of num_attention_heads {heads}.")
    if heads % kv_heads:
        raise UserError(
            f"{config.source}: num_attention_heads {heads} is not a multiple of key/value heads {kv_heads}."
        )
    head_size = config.size("head_dim", default=fixed["head_size"] or hidden // heads)
    bias = config.flag("attention_bias", fixed["bias"])
    out_bias = bias if fixed["out_bias"] is None else fixed["out_bias"]
    q, kv = heads * head_size, kv_heads * head_size
    attention: tuple[Linear, ...] = (
        Linear("self_attn.q_proj", hidden, q, bias),
        Linear("self_attn.k_proj", hidden, kv, bias),
        Linear("self_attn.v_proj", hidden, kv, bias),
        Linear("self_attn.o_proj", q, hidden, out_bias),
    )
    if fixed.get("fused"):
        attention = (Linear("self_attn.o_proj", q, hidden), Linear("self_attn.qkv_proj", hidden, q + 2 * kv))
    qk_norm = {"": 0, "head": 2 * head_size, "width": q + kv}[style.qk_norm]
    norms = hidden * (4 if style.norms == "both" else 2) + qk_norm
    dense = Block(attention, _feed_forward(config, hidden, bool(fixed.get("fused"))), norms)
    return Architecture(
        family="",
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_size=head_size,
        vocabulary=config.size("vocab_size"),
        context=config.size("max_position_embeddings", default=2048),
        blocks=(dense,) * layers,
        embedding_width=hidden,
        final_norm=hidden,
        tied=config.flag("tie_word_embeddings", fixed["tie"]),
        style=style,
    )


def _feed_forward(config: Config, hidden: int, fused: bool) -> tuple[Linear, ...]:
    inner, bias = config.size("intermediate_size"), config.flag("mlp_bias", False)
    if fused:
        return (Linear("mlp.gate_up_proj", hidden, 2 * inner), Linear("mlp.down_proj", inner, hidden))
    return (
        Linear("mlp.gate_proj", hidden, inner, bias),
        Linear("mlp.up_proj", hidden, inner, bias),
        Linear("mlp.down_proj", inner, hidden, bias),
    )


def _llama(config: Config) -> Architecture:
    return _decoder(config, style=Style())


def _smollm3(config: Config) -> Architecture:
    return _decoder(config, style=Style(), defaults={"tie": True})


def _mistral(config: Config) -> Architecture:
    return _decoder(config, style=Style(), defaults={"kv_heads": 8})


def _qwen2(config: Config) -> Architecture:
    return _decoder(config, style=Style(), defaults={"bias": True, "out_bias": False})


def _qwen3(config: Config) -> Architecture:
    return _decoder(config, style=Style(qk_norm="head"), defaults={"head_size": 128})


def _olmo2(config: Config) -> Architecture:
    return _decoder(config, style=Style(norm="rms32", norms="inside", qk_norm="width"))


def _gemma2(config: Config) -> Architecture:
    style = Style(
        norm="rms32",
        norms="both",
        activation="gelu",
        softcap=config.get("attn_logit_softcapping", 50.0) is not None,
        final_softcap=config.get("final_logit_softcapping", 30.0) is not None,
        scaled_embeddings=True,
    )
    return _decoder(config, style=style, defaults={"tie": True, "head_size": 256, "kv_heads": 4})


def _gemma3(config: Config) -> Architecture:
    style = Style(norm="rms32", norms="both", qk_norm="head", activation="gelu", scaled_embeddings=True)
    return _decoder(config, style=style, defaults={"tie": True, "head_size": 256, "kv_heads": 4})


def _phi3(config: Config) -> Architecture:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rotary = config.get("partial_rotary_factor", rope.get("partial_rotary_factor", 1.0))
    return _decoder(config, style=Style(rotary=rotary, rejoins=True), defaults={"fused": True})


def _mixtral(config: Config) -> Architecture:
    built = _decoder(config, style=Style(top_k=config.size("num_experts_per_tok", default=2), split_experts=True))
    return _with_experts(
        built, config.size("num_local_experts", "num_experts", default=8), config.size("intermediate_size")
    )


def _qwen3_moe(config: Config) -> Architecture:
    style = Style(qk_norm="head", top_k=config.size("num_experts_per_tok", default=8), split_experts=True)
    built = _decoder(config, style=style, defaults={"kv_heads": 4})
    experts = config.size("num_experts", "num_local_experts", default=128)
    sparse = _with_experts(built, experts, config.size("moe_intermediate_size", default=768))
    step, dense = config.size("decoder_sparse_step", default=1), set(config.get("mlp_only_layers", []))
    chosen = (
        sparse.blocks[i] if i not in dense and (i + 1) % step == 0 else built.blocks[i]
        for i in range(len(built.blocks))
    )
    return replace(built, blocks=tuple(chosen))


def _gpt_oss(config: Config) -> Architecture:
    style = Style(norm="rms32", sinks=True, clamps=True, top_k=config.size("num_experts_per_tok", default=4))
    built = _decoder(config, style=style, defaults={"bias": True, "head_size": 64, "kv_heads": 8})
    experts = config.size("num_local_experts", "num_experts", default=128)
    sparse = _with_experts(built, experts, config.size("intermediate_size"), bias=True)
    block = replace(sparse.blocks[0], other=built.heads)
    return replace(sparse, blocks=(block,) * len(built.blocks))


def _with_experts(built: Architecture, experts: int, inner: int, bias: bool = False) -> Architecture:
    """`built` with a router and experts, each stacked in two tensors a layer, for every feed-forward."""
    linears = (
        Linear("mlp.experts.gate_up_proj", built.hidden, 2 * inner, bias, experts),
        Linear("mlp.experts.down_proj", inner, built.hidden, bias, experts),
    )
    router = Linear("mlp.gate", built.hidden, experts, bias)
    block = replace(built.blocks[0], feed_forward=linears, router=router)
    return replace(built, blocks=(block,) * len(built.blocks))


def _gpt2(config: Config) -> Architecture:
    hidden, layers = config.size("n_embd", "hidden_size"), config.size("n_layer", "num_hidden_layers", most=MOST_LAYERS)
    heads, context = config.size("n_head", "num_attention_heads"), config.size("n_positions", default=1024)
    inner = config.size("n_inner", default=4 * hidden)
    block = Block(
        (Linear("attn.c_attn", hidden, 3 * hidden, True), Linear("attn.c_proj", hidden, hidden, True)),
        (Linear("mlp.c_fc", hidden, inner, True), Linear("mlp.c_proj", inner, hidden, True)),
        norms=4 * hidden,
    )
    activation = config.get("activation_function", "gelu_new")
    style = Style(norm="layer", gated=False, rotary=0, activation=activation, softmax32=False)
    return _layer_norm_model(config, block, hidden, heads, layers, context, context * hidden, True, style)


def _gpt3(config: Config) -> Architecture:
    """GPT-3 has no checkpoint: GPT-2's shapes, with the separate q, k, v and o that the LoRA paper adapts."""
    built = _gpt2(config)
    first = built.blocks[0]
    attention = tuple(Linear(f"attn.{name}_proj", built.hidden, built.hidden, True) for name in "qkvo")
    return replace(built, blocks=(replace(first, attention=attention),) * len(built.blocks))


def _gpt_neox(config: Config) -> Architecture:
    hidden, inner = config.size("hidden_size"), config.size("intermediate_size")
    bias = config.flag("attention_bias", True)
    block = Block(
        (
            Linear("attention.query_key_value", hidden, 3 * hidden, bias),
            Linear("attention.dense", hidden, hidden, bias),
        ),
        (Linear("mlp.dense_h_to_4h", hidden, inner, True), Linear("mlp.dense_4h_to_h", inner, hidden, True)),
        norms=4 * hidden,
    )
    parallel = config.flag("use_parallel_residual", True)
    style = Style(
        norm="layer",
        norms="parallel" if parallel else "before",
        gated=False,
        rotary=config.get("rotary_pct", 0.25),
        rejoins=True,
        activation=config.get("hidden_act", "gelu"),
    )
    heads, layers = config.size("num_attention_heads"), config.size("num_hidden_layers", most=MOST_LAYERS)
    context = config.size("max_position_embeddings", default=2048)
    return _layer_norm_model(config, block, hidden, heads, layers, context, 0, False, style)


def _opt(config: Config) -> Architecture:
    hidden, inner = config.size("hidden_size"), config.size("ffn_dim")
    bias, affine = config.flag("enable_bias", True), config.flag("layer_norm_elementwise_affine", True)
    block = Block(
        tuple(Linear(f"self_attn.{name}", hidden, hidden, bias) for name in ("k_proj", "v_proj", "q_proj", "out_proj")),
        (Linear("fc1", hidden, inner, bias), Linear("fc2", inner, hidden, bias)),
        norms=4 * hidden if affine else 0,
    )
    before = config.flag("do_layer_norm_before", True)
    style = Style(
        norm="layer",
        norms="before" if before else "after",
        gated=False,
        rotary=0,
        activation=config.get("activation_function", "relu"),
        scaled_queries=True,
    )
    heads, layers = config.size("num_attention_heads"), config.size("num_hidden_layers", most=MOST_LAYERS)
    context = config.size("max_position_embeddings", default=2048)
    rows = (context + 2) * hidden  # two rows that no position uses
    built = _layer_norm_model(config, block, hidden, heads, layers, context, rows, True, style)
    width = config.size("word_embed_proj_dim", default=hidden)
    outside = (Linear("project_out", hidden, width), Linear("project_in", width, hidden)) if width != hidden else ()
    last = before and not config.flag("_remove_final_layer_norm", False)
    return replace(built, embedding_width=width, outside=outside, final_norm=2 * hidden if last and affine else 0)


def _minigpt(config: Config) -> Architecture:
    """OPT's names, with sinusoids for positions: a table, but no parameters (the document's Introduction)."""
    built = _opt(config)
    style = replace(built.style, scaled_queries=False, ours=True)
    return replace(built, positions=0, fixed_positions=built.positions, style=style)


def _roberta(config: Config) -> Architecture:
    hidden, inner = config.size("hidden_size"), config.size("intermediate_size")
    block = Block(
        (
            *(Linear(f"attention.self.{name}", hidden, hidden, True) for name in ("query", "key", "value")),
            Linear("attention.output.dense", hidden, hidden, True),
        ),
        (Linear("intermediate.dense", hidden, inner, True), Linear("output.dense", inner, hidden, True)),
        norms=4 * hidden,
    )
    style = Style(norm="layer", norms="after", gated=False, rotary=0, activation=config.get("hidden_act", "gelu"))
    heads, layers = config.size("num_attention_heads"), config.size("num_hidden_layers", most=MOST_LAYERS)
    context = config.size("max_position_embeddings", default=512)
    rows = (context + config.size("type_vocab_size", default=2)) * hidden
    built = _layer_norm_model(config, block, hidden, heads, layers, context, rows, True, style)
    return replace(
        built,
        final_norm=0,
        extra_norms=4 * hidden,
        outside=(Linear("lm_head.dense", hidden, hidden, True),),
        head_bias=built.vocabulary,
    )


def _layer_norm_model(
    config: Config,
    block: Block,
    hidden: int,
    heads: int,
    layers: int,
    context: int,
    positions: int,
    tie: bool,
    style: Style,
) -> Architecture:
    if hidden % heads:
        raise UserError(f"{config.source}: the width {hidden} is not a multiple of the {heads} heads.")
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
        positions=positions,
        style=style,
    )


FAMILIES: dict[str, Callable[[Config], Architecture]] = {
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
    "gpt2": _gpt2,
    "gpt3": _gpt3,
    "gpt_neox": _gpt_neox,
    "gpt_oss": _gpt_oss,
    "llama": _llama,
    "minigpt": _minigpt,
    "mistral": _mistral,
    "mixtral": _mixtral,
    "olmo2": _olmo2,
    "opt": _opt,
    "phi3": _phi3,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "qwen3_moe": _qwen3_moe,
    "roberta": _roberta,
    "smollm3": _smollm3,
}
