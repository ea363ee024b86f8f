"""Any causal language model that transformers opens, taken apart into body and head."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.models.base import CausalLM, Checkpointing, Shape, checkpointed
from pipeline.models.importing.transformers_io import generation_of, open_whole, quiet, reported, save_whole
from pipeline.models.kernels import packed_attention
from pipeline.models.kernels.fp32_compute import exact
from pipeline.models.virtual_tokens import Prefix

AGREEMENT = 1e-3  # of the largest logit, in fp32
NOISE = (  # what makes training random, in the names of many configs
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
    """The transformers model's own children under their own names; its body makes hidden states, its head logits.

    Dropout is off, in training too: a run gives the same numbers whenever it is repeated or resumed.
    """

    def __init__(self, whole: Any, stored: Mapping[str, Any] | None = None, generation: str | None = None) -> None:
        """`stored` and `generation`: settings, and generation_config.json, as `save` is to write them."""
        super().__init__()
        for name, child in whole.named_children():
            self.add_module(name, child)
        self._whole = [whole]  # in a list, so that its modules are not listed a second time
        self._stored, self._generation = {**(stored or {}), "pad_token_id": whole.config.pad_token_id}, generation
        self._body = _body_of(whole)
        self._takes = frozenset(signature(self.body.forward).parameters)
        for module in whole.modules():
            if isinstance(module, nn.Dropout):  # whatever the config calls it
                module.p = 0.0
        ends = whole.get_input_embeddings(), whole.get_output_embeddings()
        # nothing is padded here, and a model whose end token is its pad token must learn to read it
        whole.config.pad_token_id = ends[0].padding_idx = None
        names = {id(module): name for name, module in whole.named_modules()}
        self.embedding_name, self.head_name = (names[id(end)] for end in ends)
        self._tied = ends[0].weight is ends[1].weight
        config = whole.config.get_text_config()
        self._cap = getattr(config, "final_logit_softcapping", None)
        self._scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)

    @property
    def config(self) -> Any:
        return self._whole[0].config.get_text_config()

    @property
    def shape(self) -> Shape:
        c = self.config
        positions = getattr(c, "max_position_embeddings", None) or 2**31 - 1
        return Shape(c.vocab_size, positions, c.num_hidden_layers, c.num_attention_heads, self._tied)

    @property
    def body(self) -> nn.Module:
        return self.get_submodule(self._body)

    @property
    def blocks(self) -> nn.ModuleList:
        lists = [m for m in self.body.modules() if isinstance(m, nn.ModuleList)]
        return next(m for m in lists if len(m) == self.config.num_hidden_layers)

    def plain(
        self,
        read: Tensor,
        positions: Tensor | None = None,
        segments: Sequence[int] | None = None,
        cache: Any = None,
        prefix: Prefix | None = None,
    ) -> Tensor:
        options: dict[str, Any] = {"use_cache": cache is not None}
        options["inputs_embeds" if read.is_floating_point() else "input_ids"] = read
        if cache is not None:
            options["cache" if "cache" in self._takes else "past_key_values"] = cache
        if "position_ids" in self._takes:  # others tell a token's place by its distance alone
            past = cache.get_seq_length() if cache is not None else 0
            places = torch.arange(past, past + read.shape[1], device=read.device).expand(read.shape[:2])
            options["position_ids"] = places if positions is None else positions
        options |= {key: given for key, given in (("segments", segments), ("prefix", prefix)) if given is not None}
        out: Tensor = self.body(**options).last_hidden_state
        return out

    def logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.head(hidden)
        if self._scale != 1:
            logits = logits * self._scale
        return logits if self._cap is None else torch.tanh(logits / self._cap) * self._cap

    def new_cache(self) -> Any:
        from transformers import DynamicCache

        return DynamicCache(config=self.config)

    def cache_length(self, cache: Any) -> int:
        return int(cache.get_seq_length())

    def append_to_cache(self, cache: Any, block: int, keys: Tensor, values: Tensor) -> None:
        cache.update(keys, values, block)

    def keys_and_values(self, ids: Tensor) -> list[tuple[Tensor, Tensor]]:
        from transformers import DynamicCache

        cache = DynamicCache()  # told of no config, it keeps also what a sliding window leaves behind
        self.plain(ids, cache=cache)
        return [(layer.keys, layer.values) for layer in cache.layers]

    def describe(self) -> dict[str, Any]:
        described: dict[str, Any] = {**self._whole[0].config.to_dict(), **self._stored}
        return described

    def set_rows(self, rows: int, tied: bool) -> None:
        self._tied = tied
        for config in (self._whole[0].config, self.config):
            config.vocab_size = rows
            config.tie_word_embeddings = tied
        self.embeddings.num_embeddings = rows  # type: ignore[assignment]
        self.head.out_features = rows  # type: ignore[assignment]

    def use_attention(self, name: str) -> None:
        """One of transformers' implementations instead of ours."""
        self._whole[0].set_attn_implementation(name)

    def checkpoint_blocks(self, how: Checkpointing) -> None:
        for block in self.blocks:
            block.gradient_checkpointing = False  # type: ignore[assignment]
        if how == "none":
            return
        whole = self._whole[0]
        with warnings.catch_warnings():  # transformers 5.24 renames it; 5.0 knows the old name alone
            warnings.simplefilter("ignore", FutureWarning)
            whole.gradient_checkpointing_enable({"use_reentrant": False})
        # re-entrant checkpoints alone need inputs that want gradients; frozen blocks would keep tensors for them
        whole.disable_input_require_grads()
        for number, block in enumerate(self.blocks):
            block.gradient_checkpointing = checkpointed(how, number)  # type: ignore[assignment]

    def save(self, folder: Path) -> None:
        whole = self._whole[0]
        for name, child in self.named_children():
            setattr(whole, name, child)
        with _settings(whole.config, self._stored):
            save_whole(whole, folder, self._generation)


def opened(folder: Path, dtype: torch.dtype | None = None, trust_remote_code: bool = False) -> TransformersModel:
    """The checkpoint in `folder` on the CPU, in `dtype` or its own. Raises UserError as `open_whole`.

    A model that leaves attention to transformers' interface gets ours, which reads sequences end to end.
    """
    config, noise = _quiet_config(folder, trust_remote_code)
    whole = open_whole(folder, str(folder), trust_remote_code, config=config, dtype=dtype or "auto")
    return _with_attention(TransformersModel(whole, noise, generation_of(folder)))


def without_weights(folder: Path, trust_remote_code: bool = False) -> TransformersModel:
    """The same model with weights that nobody trained, on the device that torch makes tensors on. Raises UserError."""
    from transformers import AutoModelForCausalLM

    config, noise = _quiet_config(folder, trust_remote_code)
    with quiet(), reported(str(folder), trust_remote_code):
        whole = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code, dtype=torch.float32)
    return _with_attention(TransformersModel(whole.eval(), noise, generation_of(folder)))


def _quiet_config(folder: Path, trust_remote_code: bool) -> tuple[Any, dict[str, Any]]:
    """config.json with nothing in it that makes training random, and what was taken out."""
    from transformers import AutoConfig

    with quiet(), reported(str(folder), trust_remote_code):
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    noise = {key: getattr(config, key) for key in NOISE if hasattr(config, key)}
    config.update(dict.fromkeys(noise, 0.0))
    return config, noise


def _with_attention(model: TransformersModel) -> TransformersModel:
    if model._whole[0].is_backend_compatible():
        model.use_attention(packed_attention.register())
    return model


def from_config(config: Mapping[str, Any], dtype: torch.dtype) -> TransformersModel:
    """A model of that shape with random weights, or fake ones under fake tensors."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = AutoConfig.for_model(**{**config, **dict.fromkeys(NOISE, 0.0)})
    whole = AutoModelForCausalLM.from_config(settings, dtype=dtype, attn_implementation=packed_attention.register())
    return TransformersModel(whole)


def _body_of(whole: Any) -> str:
    """The name of the part that makes hidden states. Raises UserError for what is built in another way."""
    needed = ("vocab_size", "num_hidden_layers", "num_attention_heads")
    names = [name for name in (whole.base_model_prefix, "model") if hasattr(whole, name)]
    config, head = whole.config.get_text_config(), whole.get_output_embeddings()
    if not names or head is None or not all(hasattr(config, key) for key in needed):
        raise UserError(
            f"{type(whole).__name__} is not built of an embedding, Transformer blocks and a head. Choose another base."
        )
    return names[0]


@torch.no_grad()
def refuse_unlike(model: TransformersModel, source: str) -> None:
    """Raises UserError if body, head and our attention are not together the model that transformers runs."""
    ids = torch.arange(min(24, model.shape.rows, model.shape.positions), device=model.device)[None]
    whole = model._whole[0]
    attention = whole.config._attn_implementation
    with quiet(), exact(whole):
        ours = model(ids).float()
        model.use_attention("eager")
        theirs = whole(input_ids=ids, use_cache=False).logits.float()
        model.use_attention(attention)
    if not torch.allclose(ours, theirs, rtol=AGREEMENT, atol=AGREEMENT * float(theirs.abs().max())):
        raise UserError(
            f"base: {source}: {type(whole).__name__} makes its logits otherwise than this project knows. "
            "Choose another base."
        )


@contextmanager
def _settings(config: Any, values: Mapping[str, Any]) -> Iterator[None]:
    """`config` with `values` while entered."""
    before = {name: getattr(config, name) for name in values}
    config.update(values)
    try:
        yield
    finally:
        config.update(before)
