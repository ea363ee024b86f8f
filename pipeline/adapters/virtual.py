"""Attach, save and load the virtual tokens of prefix and prompt tuning, in PEFT's format."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.adapters.attach import read_tensors
from pipeline.adapters.config import CONFIG, VIRTUAL, WEIGHTS, AdapterConfig, refuse_options
from pipeline.errors import UserError
from pipeline.files import artifact
from pipeline.files.safetensors_file import refuse_difference
from pipeline.models.base import CausalLM, VirtualTokens
from pipeline.models.save import save_tensors
from pipeline.models.virtual_tokens import PrefixTokens, PromptTokens, prefix_of

KEY = "prompt_embeddings"
# PEFT's options of virtual tokens that have only one supported value
_VIRTUAL_PLAIN: dict[str, Any] = {"task_type": "CAUSAL_LM", "num_transformer_submodules": 1}
# its other options that may be set: they are read here, or have no effect on trained tokens
_VIRTUAL_KNOWN = {
    "peft_type",
    "num_virtual_tokens",
    "token_dim",
    "num_attention_heads",
    "num_layers",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "prompt_tuning_init",
    "prompt_tuning_init_text",
    "tokenizer_name_or_path",
    "tokenizer_kwargs",
    "encoder_hidden_size",
    "init_weights",
    "prefix_projection",  # its result is stored, not the projection
}


@torch.no_grad()
def attach_virtual_tokens(
    model: CausalLM,
    kind: str,
    count: int,
    vocabulary: int,
    seed: int,
    dtype: torch.dtype | None = None,
) -> None:
    """Freeze `model` and give it `count` trainable virtual tokens, a prefix or a prompt.

    They are initialized with random tokens of the tokenizer's `vocabulary`: their embeddings in the
    base (Lester et al. 2021, section 3.2, sampled vocabulary), or the keys and values it computes
    for them (Li & Liang 2021, section 7.4); then cast to `dtype`, if given. Raises UserError if
    they leave no position for a sequence.
    """
    if count >= model.shape.positions:
        raise UserError(
            f"finetune_{kind}.virtual_tokens must be below {model.shape.positions}, the model's "
            f"positions, got {count}. Reduce it."
        )
    # drawn on the CPU, so that a seed gives the same tokens on every device
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocabulary, (1, count), generator=generator)
    virtual = _virtual_tokens(model, kind, ids.to(model.device))
    virtual.prompt_embeddings.data = virtual.prompt_embeddings.data.to(dtype)
    model.requires_grad_(False)
    model.set_virtual_tokens(virtual)


def save_virtual(folder: Path, model: CausalLM, base_name: str) -> None:
    """adapter_config.json, as PEFT writes it, and adapter_model.safetensors."""
    virtual = model.virtual
    assert virtual is not None
    save_tensors(folder / WEIGHTS, {KEY: virtual.prompt_embeddings})
    n, width = virtual.prompt_embeddings.shape
    heads = model.shape.heads
    options: dict[str, Any]
    # PEFT's sizes of a prefix are those of the keys, which heads may share
    if isinstance(virtual, PrefixTokens):
        heads, width = virtual.groups, width // (2 * virtual.layers)
        options = {"encoder_hidden_size": width, "prefix_projection": False}
    else:
        options = {"prompt_tuning_init": "RANDOM"}
        options |= {"prompt_tuning_init_text": None, "tokenizer_name_or_path": None}
    config = {
        "peft_type": next(name for name, kind in VIRTUAL.items() if kind == virtual.kind),
        **_VIRTUAL_PLAIN,
        "base_model_name_or_path": base_name,
        "revision": None,
        "inference_mode": True,
        "num_virtual_tokens": n,
        "token_dim": width,
        "num_attention_heads": heads,
        "num_layers": len(model.blocks),
        **options,
    }
    artifact.write_json(folder / CONFIG, config)


@torch.no_grad()
def load_virtual(model: CausalLM, config: AdapterConfig) -> VirtualTokens:
    """Give `model`, or its skeleton, stored virtual tokens. Callers check that it is their base.

    Raises UserError for an option that is not supported, and for tensors that do not fit the config
    and the model.
    """
    path, weights = config.path, config.path.parent / WEIGHTS
    refuse_options(config.values, path, _VIRTUAL_PLAIN, _VIRTUAL_KNOWN)
    n = config.get("num_virtual_tokens")
    if not isinstance(n, int) or isinstance(n, bool) or n < 1:
        raise UserError(f"{path}: num_virtual_tokens must be a whole number from 1, got {n!r}.")
    if n >= model.shape.positions:
        raise UserError(
            f"{path}: num_virtual_tokens must be below the base's {model.shape.positions} "
            f"positions, got {n}."
        )
    one_token = torch.zeros(1, 1, dtype=torch.long, device=model.device)  # for the shape
    virtual = _virtual_tokens(model, VIRTUAL[config.kind], one_token)
    values = read_tensors(weights.parent)
    expected = {KEY: (n, virtual.prompt_embeddings.shape[1])}
    actual = {key: tuple(tensor.shape) for key, tensor in values.items()}
    refuse_difference(expected, actual, str(weights))
    if isinstance(virtual, PrefixTokens):
        # a prefix of other heads or blocks can have as many numbers
        for key, count in (("num_attention_heads", virtual.groups), ("num_layers", virtual.layers)):
            if config.get(key) != count:
                raise UserError(f"{path}: {key} is {config.get(key)!r}, but the base has {count}.")
    tokens = values[KEY].to("cpu" if model.device.type == "meta" else model.device, copy=True)
    virtual.prompt_embeddings = nn.Parameter(tokens)
    model.set_virtual_tokens(virtual)
    model.requires_grad_(False)
    return virtual


def _virtual_tokens(model: CausalLM, kind: str, ids: Tensor) -> VirtualTokens:
    """Virtual tokens that compute what the tokens `ids` (1, n) do."""
    if kind == "prompt":
        return PromptTokens(model.embeddings(ids)[0].clone())
    return prefix_of(model.keys_and_values(ids), len(model.blocks))
