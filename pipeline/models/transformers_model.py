"""Any causal language model that transformers opens, split into body and head."""

import re
import warnings
from collections.abc import Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.models.base import (
    CausalLM,
    Checkpointing,
    Prefix,
    Shape,
    checkpointed,
    compute_in_fp32,
    next_positions,
)
from pipeline.models.device import keep_freed_memory
from pipeline.models.experts import mixture
from pipeline.models.kernels import packed_attention, short_attention, uses_cpu_kernels
from pipeline.models.kernels.llama_block import TrainingBlock, fuse_llama_blocks
from pipeline.models.kernels.rms_norm import fuse_rms_norms
from pipeline.models.pages import PackedCache
from pipeline.models.save import generation_of, load_strict, quiet, reported, save_checkpoint
from pipeline.project.process import resume_collection

AGREEMENT = 1e-3  # of the largest logit, in fp32
CHUNK = 64  # tokens, of gated delta nets
NOISE = (  # settings that make training random, by their names in different configs
    "attention_dropout",
    "hidden_dropout",
    "resid_pdrop",
    "embd_pdrop",
    "attn_pdrop",
    "dropout",
    "activation_dropout",
    "layerdrop",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "resid_dropout",
    "embd_dropout",
    "embed_dropout",
    "router_jitter_noise",
    "input_jitter_noise",
)


class TransformersModel(CausalLM):
    """The transformers model's children under their own names, split into body and head.

    Dropout is off, in training too: a run gives the same numbers whenever it is repeated or
    resumed.
    """

    compiles = True
    takes_packed_cache = True

    def __init__(
        self, model: Any, stored: Mapping[str, Any] | None = None, generation: str | None = None
    ) -> None:
        """`stored`: config settings that `save` writes.

        `generation`: the text of generation_config.json that it writes, if any.
        """
        super().__init__()
        for name, child in model.named_children():
            self.add_module(name, child)
        # in a list, so that torch does not register its modules a second time
        self._model = [model]
        self._stored = {**(stored or {}), "pad_token_id": model.config.pad_token_id}
        self._generation = generation
        required = ("vocab_size", "num_hidden_layers", "num_attention_heads")
        config = model.config.get_text_config()
        head = model.get_output_embeddings()
        bodies = [name for name in (model.base_model_prefix, "model") if hasattr(model, name)]
        has_parts = bodies and head is not None and all(hasattr(config, key) for key in required)
        if not has_parts or not _block_lists(getattr(model, bodies[0]), config):
            raise UserError(
                f"unsupported model {type(model).__name__}: it does not consist of an embedding, "
                "Transformer blocks and a head. Choose another base."
            )
        self._body = bodies[0]  # the part that computes hidden states
        self._body_arguments = frozenset(signature(self.body.forward).parameters)
        for module in model.modules():
            if isinstance(module, nn.Dropout):  # whatever the config calls it
                module.p = 0.0
        embedding = model.get_input_embeddings()
        # nothing is padded here, and a model whose end token is its pad token must learn to read it
        model.config.pad_token_id = embedding.padding_idx = None
        names = {module: name for name, module in model.named_modules()}
        self.embedding_name, self.head_name = names[embedding], names[head]
        self._tied = embedding.weight is head.weight
        # what families do to the head's logits: Gemma 2 caps, Cohere scales, Granite divides
        self.logit_cap = getattr(config, "final_logit_softcapping", None)
        divisor = getattr(config, "logits_scaling", None) or 1
        self._scale = getattr(config, "logit_scale", None) or 1 / divisor

    @property
    def config(self) -> Any:
        return self._model[0].config.get_text_config()

    @property
    def shape(self) -> Shape:
        c = self.config
        # BLOOM, with ALiBi, has no limit
        positions = getattr(c, "max_position_embeddings", None) or 2**31 - 1
        return Shape(
            c.vocab_size, positions, c.num_hidden_layers, c.num_attention_heads, self._tied
        )

    @property
    def body(self) -> nn.Module:
        return self.get_submodule(self._body)

    @property
    def blocks(self) -> nn.ModuleList:
        return _block_lists(self.body, self.config)[0]

    def labelled_states(
        self, ids: Tensor, positions: Tensor, segments: Sequence[int] | None, index: Tensor | None
    ) -> Tensor:
        has_option = self.virtual is None and isinstance(self.blocks[-1], TrainingBlock)
        if index is None or not has_option:
            return super().labelled_states(ids, positions, segments, index)
        rows = self.run_body(ids, positions, segments, labelled=index).flatten(0, 1)
        return rows if len(rows) == len(index) else rows.index_select(0, index)

    def run_body(
        self,
        inputs: Tensor,
        positions: Tensor | None = None,
        segments: Sequence[int] | None = None,
        cache: Any = None,
        prefix: Prefix | None = None,
        labelled: Tensor | None = None,
    ) -> Tensor:
        """`labelled`: the needed rows of the flattened result, which may have no others."""
        # a cache of ours goes to our attention; any other to transformers
        past = cache if isinstance(cache, PackedCache) else None
        cache = None if past is not None else cache
        options: dict[str, Any] = {"use_cache": cache is not None}
        options["inputs_embeds" if inputs.is_floating_point() else "input_ids"] = inputs
        if cache is not None:
            options["cache" if "cache" in self._body_arguments else "past_key_values"] = cache
        # a model with relative positions only, such as ALiBi, takes none
        if "position_ids" in self._body_arguments:
            if positions is None:
                positions = next_positions(inputs, cache)
            options["position_ids"] = positions
        lengths = None if segments is None else self.wrap_lengths(segments)
        ours = {"segments": lengths, "prefix": prefix, "past": past, "labelled": labelled}
        options |= {key: value for key, value in ours.items() if value is not None}
        out: Tensor = self.body(**options).last_hidden_state
        return out

    def logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.head(hidden)
        if self._scale != 1:
            logits = logits * self._scale
        if self.logit_cap is not None:
            logits = torch.tanh(logits / self.logit_cap) * self.logit_cap
        return logits

    def new_cache(self) -> Any:
        from transformers import DynamicCache

        return DynamicCache(config=self.config)

    def keys_and_values(self, ids: Tensor) -> list[tuple[Tensor, Tensor]]:
        from transformers import DynamicCache

        cache = DynamicCache()  # without a config it also keeps what a sliding window drops
        self.run_body(ids, cache=cache)
        return [(layer.keys, layer.values) for layer in cache.layers]

    def describe(self) -> dict[str, Any]:
        described: dict[str, Any] = {**self._model[0].config.to_dict(), **self._stored}
        return described

    def set_rows(self, rows: int, tied: bool) -> None:
        self._tied = tied
        for config in (self._model[0].config, self.config):
            config.vocab_size = rows
            config.tie_word_embeddings = tied
        self.embeddings.num_embeddings = rows  # type: ignore[assignment]
        self.head.out_features = rows  # type: ignore[assignment]

    @property
    def local_reach(self) -> Sequence[int]:
        sizes = {key: size for key, size in vars(self.config).items() if type(size) is int}
        reaches = [size for key, size in sizes.items() if re.search("window|chunk|conv", key)]
        # A gated delta net, which has a convolution, carries a state from chunk to chunk: only
        # transformers' code has a chunk's size.
        return (*reaches, CHUNK) if any("conv" in key for key in sizes) else reaches

    @property
    def mixes_lengths(self) -> bool:
        # both kinds below scale every token's rotary positions by the forward's longest sequence
        rope = getattr(self.config, "rope_parameters", None) or {}
        parts = [part for part in (rope, *rope.values()) if isinstance(part, Mapping)]
        kinds = {part.get("rope_type") for part in parts}
        return not kinds & {"dynamic", "longrope"}

    def use_attention(self, name: str) -> None:
        """Use the attention implementation that transformers knows by this name."""
        self._model[0].set_attn_implementation(name)

    def checkpoint_blocks(self, how: Checkpointing) -> None:
        for block in self.blocks:
            block.gradient_checkpointing = False  # type: ignore[assignment]
        if how == "none":
            return
        model = self._model[0]
        with warnings.catch_warnings():  # transformers 5.24 renamed it; 5.0 has only the old name
            warnings.simplefilter("ignore", FutureWarning)
            model.gradient_checkpointing_enable({"use_reentrant": False})
        # only re-entrant checkpoints need inputs that require gradients, and frozen blocks would
        # keep tensors for them
        model.disable_input_require_grads()
        for number, block in enumerate(self.blocks):
            block.gradient_checkpointing = checkpointed(how, number)  # type: ignore[assignment]

    def prepare_cpu_training(self) -> None:
        fuse_rms_norms(self)
        fuse_llama_blocks(self)
        keep_freed_memory()

    def prepare_for_accelerator(self, device: torch.device) -> None:
        from pipeline.models.kernels.accelerator import fuse  # a run on a CPU does not load it

        fuse(self, device)

    @property
    def trains_natively(self) -> bool:
        return any(isinstance(block, TrainingBlock) for block in self.blocks)

    def kept_attention_weights(self, lengths: Sequence[int]) -> int | None:
        by_products = uses_cpu_kernels(self.device) and not self.trains_natively
        if not by_products or max(lengths) > short_attention.LONGEST:
            return None
        return sum(block.weights for block in short_attention.blocks(lengths))

    def save(self, folder: Path) -> None:
        model = self._model[0]
        for name, child in self.named_children():
            setattr(model, name, child)  # an adapter or a quantized layer may have replaced it
        changed = {name: getattr(model.config, name) for name in self._stored}
        model.config.update(self._stored)  # the dropout and the pad token that it came with
        try:
            save_checkpoint(model, folder, self._generation)
        finally:
            model.config.update(changed)


def _block_lists(body: nn.Module, config: Any) -> list[nn.ModuleList]:
    """The lists of as many modules as `config` counts blocks; the first one holds the blocks."""
    lists = [m for m in body.modules() if isinstance(m, nn.ModuleList)]
    return [m for m in lists if len(m) == config.num_hidden_layers]


def load_pretrained(
    folder: Path, dtype: torch.dtype | None = None, trust_remote_code: bool = False
) -> TransformersModel:
    """The checkpoint in `folder` on the CPU, in `dtype` or its own.

    Raises UserError like `load_strict`.

    A model that uses transformers' attention interface gets our attention, which reads packed
    sequences; one that uses its interface of experts, ours.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    config, noise = _config_without_noise(folder, trust_remote_code)
    with reported(str(folder), trust_remote_code):
        MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)  # imports its classes
    resume_collection()
    model = load_strict(
        folder, str(folder), trust_remote_code, config=config, dtype=dtype or "auto"
    )
    with reported(str(folder), trust_remote_code):
        return _with_kernels(TransformersModel(model, noise, generation_of(folder)))


def without_weights(folder: Path, trust_remote_code: bool = False) -> TransformersModel:
    """The same model, newly initialized in fp32 on torch's default device. Raises UserError."""
    from transformers import AutoModelForCausalLM

    config, noise = _config_without_noise(folder, trust_remote_code)
    with quiet(), reported(str(folder), trust_remote_code):
        model = AutoModelForCausalLM.from_config(
            config, trust_remote_code=trust_remote_code, dtype=torch.float32
        )
        return _with_kernels(TransformersModel(model.eval(), noise, generation_of(folder)))


def _config_without_noise(folder: Path, trust_remote_code: bool) -> tuple[Any, dict[str, Any]]:
    """config.json with every dropout set to 0, and the settings it had before."""
    from transformers import AutoConfig

    with quiet(), reported(str(folder), trust_remote_code):
        config = AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust_remote_code
        )
    noise = {key: getattr(config, key) for key in NOISE if hasattr(config, key)}
    config.update(dict.fromkeys(noise, 0.0))
    return config, noise


def _with_kernels(model: TransformersModel) -> TransformersModel:
    if model._model[0].is_backend_compatible():
        model.use_attention(packed_attention.register())
    _use_our_experts(model._model[0])
    return model


def _use_our_experts(model: Any) -> None:
    if model._can_set_experts_implementation():
        model.set_experts_implementation(mixture.register())


def from_config(config: Mapping[str, Any], dtype: torch.dtype) -> TransformersModel:
    """The model of a config with random weights, or with fake ones under FakeTensorMode."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = AutoConfig.for_model(**{**config, **dict.fromkeys(NOISE, 0.0)})
    model = AutoModelForCausalLM.from_config(
        settings, dtype=dtype, attn_implementation=packed_attention.register()
    )
    _use_our_experts(model)
    return TransformersModel(model)


@torch.no_grad()
def refuse_unlike(model: TransformersModel, source: str) -> None:
    """Raises UserError unless body, head and our attention give transformers' logits."""
    ids = torch.arange(min(24, model.shape.rows, model.shape.positions), device=model.device)[None]
    original = model._model[0]
    attention = original.config._attn_implementation
    with quiet(), compute_in_fp32(original):
        ours = model(ids).float()
        model.use_attention("eager")
        theirs = original(input_ids=ids, use_cache=False).logits.float()
        model.use_attention(attention)
    if not torch.allclose(ours, theirs, rtol=AGREEMENT, atol=AGREEMENT * float(theirs.abs().max())):
        raise UserError(
            f"base: {source}: unsupported model {type(original).__name__}: its logits are not its "
            "head applied to its hidden states. Choose another base, such as a Llama, Qwen3, "
            "Gemma, GPT-2, OPT or Mixtral."
        )
