"""Prompt and prefix tuning: initialize virtual tokens, save and load them in PEFT's format."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.adapters.config import CONFIG, VIRTUAL, WEIGHTS
from pipeline.adapters.folder import read_config
from pipeline.adapters.peft.config import refuse_options
from pipeline.adapters.peft.tensors import read_tensors
from pipeline.errors import UserError
from pipeline.files import artifact
from pipeline.files.safetensors_file import refuse_difference
from pipeline.models.base import CausalLM, VirtualTokens
from pipeline.models.save import save_tensors
from pipeline.models.virtual_tokens import PrefixTokens, PromptTokens, prefix_of

KEY = "prompt_embeddings"
# PEFT's options with their only supported value, those that are read, those without effect once an adapter is trained
_PLAIN: dict[str, Any] = {"task_type": "CAUSAL_LM", "num_transformer_submodules": 1}
_READ = {"peft_type", "num_virtual_tokens", "token_dim", "num_attention_heads", "num_layers"}
_HARMLESS = {
    *("auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
    *("prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs"),
    *("encoder_hidden_size", "init_weights"),
    "prefix_projection",  # its result is stored, not the projection
}


@dataclass(frozen=True)
class VirtualSpec:
    """`tokens` virtual tokens before every sequence; kind prefix or prompt."""

    kind: str
    tokens: int


@torch.no_grad()
def attach_virtual_tokens(model: CausalLM, spec: VirtualSpec, vocabulary: int, seed: int) -> None:
    """Freeze `model` and give it trainable virtual tokens, in place.

    They are initialized with random tokens of the tokenizer's `vocabulary`: their embeddings in the base (Lester et
    al. 2021, §3.2, sampled vocabulary), or the keys and values it computes for them (Li & Liang 2021, §7.4).
    Raises UserError if they leave no position for a sequence.
    """
    if spec.tokens >= model.shape.positions:
        raise UserError(
            f"finetune_{spec.kind}.virtual_tokens must be below {model.shape.positions}, the model's positions, "
            f"got {spec.tokens}. Reduce it."
        )
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocabulary, (1, spec.tokens), generator=generator).to(model.device)
    virtual = _virtual_tokens(model, spec.kind, ids)
    model.requires_grad_(False)
    model.set_virtual_tokens(virtual)


def cast_virtual_tokens(virtual: VirtualTokens, dtype: torch.dtype) -> None:
    """Cast the trained parameter to `dtype`, in place."""
    virtual.prompt_embeddings.data = virtual.prompt_embeddings.data.to(dtype)


def save_virtual(folder: Path, model: CausalLM, base_name: str) -> None:
    """adapter_config.json and adapter_model.safetensors."""
    assert model.virtual is not None
    save_tensors(folder / WEIGHTS, {KEY: model.virtual.prompt_embeddings})
    artifact.write_json(folder / CONFIG, config_of(model, model.virtual, base_name))


def config_of(model: CausalLM, virtual: VirtualTokens, base_name: str) -> dict[str, Any]:
    """adapter_config.json, as PEFT writes it."""
    n, width = virtual.prompt_embeddings.shape
    heads, options = model.shape.heads, dict[str, Any]()
    if isinstance(virtual, PrefixTokens):
        heads, width = virtual.groups, width // (2 * virtual.layers)
        options = {"encoder_hidden_size": width, "prefix_projection": False}
    else:
        options = {"prompt_tuning_init": "RANDOM", "prompt_tuning_init_text": None, "tokenizer_name_or_path": None}
    return {
        "peft_type": next(name for name, kind in VIRTUAL.items() if kind == virtual.kind),
        **_PLAIN,
        "base_model_name_or_path": base_name,
        "revision": None,
        "inference_mode": True,
        "num_virtual_tokens": n,
        "token_dim": width,
        "num_attention_heads": heads,
        "num_layers": len(model.blocks),
        **options,
    }


@torch.no_grad()
def load_virtual(model: CausalLM, _base_folder: Path, folder: Path) -> VirtualSpec:
    """Give `model`, or its skeleton, the virtual tokens in `folder`; their base was checked before.

    Raises UserError for tensors that its config and this model do not require, or that are not finite.
    """
    config, path = read_config(folder), folder / CONFIG
    refuse_options(config, path, _PLAIN, _READ | _HARMLESS)
    kind, n = VIRTUAL[config["peft_type"]], config.get("num_virtual_tokens")
    if not isinstance(n, int) or isinstance(n, bool) or n < 1:
        raise UserError(f"{path}: num_virtual_tokens must be a whole number from 1, got {n!r}.")
    if n >= model.shape.positions:
        raise UserError(
            f"{path}: num_virtual_tokens must be below the base's {model.shape.positions} positions, got {n}."
        )
    one = _virtual_tokens(model, kind, torch.zeros(1, 1, dtype=torch.long, device=model.device))  # for the shape
    values = read_tensors(folder)
    expected = {KEY: (n, one.prompt_embeddings.shape[1])}
    refuse_difference(expected, {key: tuple(t.shape) for key, t in values.items()}, str(folder / WEIGHTS))
    tokens = values[KEY].to("cpu" if model.device.type == "meta" else model.device, copy=True)
    virtual: VirtualTokens = PromptTokens(tokens)
    if isinstance(one, PrefixTokens):
        # a prefix of other heads or blocks can have as many numbers
        for key, count in (("num_attention_heads", one.groups), ("num_layers", one.layers)):
            if config.get(key) != count:
                raise UserError(f"{path}: {key} is {config.get(key)!r}, but the base has {count}.")
        virtual = PrefixTokens(tokens, one.layers, one.groups)
    model.set_virtual_tokens(virtual)
    model.requires_grad_(False)
    return VirtualSpec(kind, n)


def _virtual_tokens(model: CausalLM, kind: str, ids: Tensor) -> VirtualTokens:
    """Virtual tokens that compute what the tokens `ids` (1, n) do."""
    if kind == "prompt":
        return PromptTokens(model.embeddings(ids)[0].clone())
    return prefix_of(model.keys_and_values(ids), len(model.blocks))
