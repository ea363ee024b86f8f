"""Prompt and prefix tuning: how their virtual tokens start, and how they lie on disk in PEFT's format."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.adapters.folder import CONFIG, VIRTUAL, WEIGHTS, read_config
from pipeline.adapters.peft.tensors import read_tensors
from pipeline.errors import UserError
from pipeline.files import artifact
from pipeline.files.safetensors_header import refuse_difference
from pipeline.models.base import CausalLM
from pipeline.models.save import save_tensors
from pipeline.models.virtual_tokens import PrefixTokens, PromptTokens, VirtualTokens, prefix_of

KEY = "prompt_embeddings"
# PEFT's options with the only value that is understood here, those that decide nothing once an adapter is trained
_PLAIN: dict[str, Any] = {"task_type": "CAUSAL_LM", "num_transformer_submodules": 1}
_READ = {"peft_type", "num_virtual_tokens", "token_dim", "num_attention_heads", "num_layers"}
_HARMLESS = {
    *("auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
    *("prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs"),
    *("encoder_hidden_size", "init_weights"),
    "prefix_projection",  # what it made is stored, not what it was made of
}


@dataclass(frozen=True)
class VirtualSpec:
    """`tokens` virtual tokens before every sequence; kind prefix or prompt."""

    kind: str
    tokens: int


@torch.no_grad()
def start(model: CausalLM, spec: VirtualSpec, words: int, seed: int) -> None:
    """Freeze `model` and have it read virtual tokens that are to be trained, in place.

    They start as random ones of the tokenizer's `words`: their embeddings, as the base gives them out (Lester et al.
    2021, §3.2, sampled vocabulary), or the keys and values that it computes for them (Li & Liang 2021, §7.4).
    Raises UserError where they leave no position for a sequence.
    """
    if spec.tokens >= model.shape.positions:
        raise UserError(
            f"finetune_{spec.kind}.virtual_tokens must be below {model.shape.positions}, the model's positions, "
            f"got {spec.tokens}. Lower it."
        )
    chosen = torch.randint(words, (1, spec.tokens), generator=torch.Generator().manual_seed(seed)).to(model.device)
    if spec.kind == "prompt":
        virtual: VirtualTokens = PromptTokens(model.embeddings(chosen)[0].clone())
    else:
        virtual = prefix_of(model.keys_and_values(chosen), len(model.blocks))
    model.requires_grad_(False)
    model.set_virtual_tokens(virtual)


def in_precision(virtual: VirtualTokens, dtype: torch.dtype) -> None:
    """Train it in `dtype`, in place."""
    virtual.prompt_embeddings.data = virtual.prompt_embeddings.data.to(dtype)


def save_virtual(folder: Path, model: CausalLM, base_name: str) -> None:
    """adapter_config.json and adapter_model.safetensors."""
    assert model.virtual is not None
    save_tensors(folder / WEIGHTS, {KEY: model.virtual.prompt_embeddings})
    artifact.write_json(folder / CONFIG, config_of(model, model.virtual, base_name))


def config_of(model: CausalLM, virtual: VirtualTokens, base_name: str) -> dict[str, Any]:
    """adapter_config.json, as PEFT writes it."""
    n, width = virtual.prompt_embeddings.shape
    heads, own = model.shape.heads, dict[str, Any]()
    if isinstance(virtual, PrefixTokens):
        heads, width = virtual.groups, width // (2 * virtual.layers)
        own = {"encoder_hidden_size": width, "prefix_projection": False}
    else:
        own = {"prompt_tuning_init": "RANDOM", "prompt_tuning_init_text": None, "tokenizer_name_or_path": None}
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
        **own,
    }


def load_virtual(model: CausalLM, folder: Path) -> VirtualSpec:
    """Have `model`, or its skeleton, read the virtual tokens in `folder`, whose base was looked at before.

    Raises UserError for tensors that its config or this model do not call for, or that are not finite.
    """
    config, place = read_config(folder), folder / CONFIG
    _refuse_options(config, place)
    kind, n = VIRTUAL[config["peft_type"]], config.get("num_virtual_tokens")
    if not isinstance(n, int) or isinstance(n, bool) or n < 1:
        raise UserError(f"{place}: num_virtual_tokens must be a whole number from 1, got {n!r}.")
    if n >= model.shape.positions:
        raise UserError(f"{place}: num_virtual_tokens is {n}; the base has {model.shape.positions} positions.")
    likeness = _likeness(model, kind)  # one virtual token's shape on this model
    values = read_tensors(folder)
    expected = {KEY: (n, likeness.prompt_embeddings.shape[1])}
    refuse_difference(expected, {key: tuple(t.shape) for key, t in values.items()}, str(folder / WEIGHTS))
    _refuse_heads(config, place, likeness)
    model.set_virtual_tokens(_filled(likeness, values[KEY], model))
    model.requires_grad_(False)
    return VirtualSpec(kind, n)


def _refuse_options(config: Mapping[str, Any], place: Path) -> None:
    for key, plain in _PLAIN.items():
        if (config.get(key) or plain) != plain:
            raise UserError(f"{place}: {key} is {config[key]!r}; only {plain!r} is supported so far.")
    for key in sorted(config.keys() - _PLAIN.keys() - _READ - _HARMLESS):
        if config[key]:
            raise UserError(f"{place}: {key} is {config[key]!r}; it is not supported so far.")


@torch.no_grad()
def _likeness(model: CausalLM, kind: str) -> VirtualTokens:
    """One virtual token that is one word."""
    word = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    if kind == "prompt":
        return PromptTokens(model.embeddings(word)[0])
    return prefix_of(model.keys_and_values(word), len(model.blocks))


def _refuse_heads(config: Mapping[str, Any], place: Path, virtual: VirtualTokens) -> None:
    """The same numbers as other heads or blocks would be another prefix."""
    if isinstance(virtual, PrefixTokens):
        for key, own in (("num_attention_heads", virtual.groups), ("num_layers", virtual.layers)):
            if config.get(key) != own:
                raise UserError(f"{place}: {key} is {config.get(key)!r}, the base has {own}.")


def _filled(likeness: VirtualTokens, values: Tensor, model: CausalLM) -> VirtualTokens:
    values = values.to("cpu" if model.device.type == "meta" else model.device, copy=True)
    if isinstance(likeness, PrefixTokens):
        return PrefixTokens(values, likeness.layers, likeness.groups)
    return PromptTokens(values)
