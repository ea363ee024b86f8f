"""A checkpoint folder as a model and its tokenizer, and back."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.artifact import read_json, write_json
from pipeline.errors import UserError
from pipeline.models.minigpt import MiniGPT, MiniGPTConfig
from pipeline.tensors import refuse_difference, shapes
from pipeline.tokenizer import WordTokenizer

CONFIG, WEIGHTS = "config.json", "model.safetensors"
HEAD_WEIGHT = "lm_head.weight"


class Base(NamedTuple):
    """A model with the tokenizer it was trained with."""

    model: MiniGPT
    tokenizer: WordTokenizer


def load_base(folder: Path) -> Base:
    """The checkpoint in `folder`, in evaluation mode, on the CPU. Raises UserError; never loads in part."""
    config = MiniGPTConfig.from_opt(read_config(folder), str(folder / CONFIG))
    tokenizer = WordTokenizer.load(folder)
    if len(tokenizer) != config.vocab_size:
        raise UserError(f"{folder}: the tokenizer has {len(tokenizer)} words, the model {config.vocab_size} rows.")
    model = MiniGPT(config)
    expected = {name: tuple(tensor.shape) for name, tensor in state(model).items()}
    refuse_difference(expected, shapes(folder / WEIGHTS), str(folder / WEIGHTS))
    model.load_state_dict(load_tensors(folder / WEIGHTS), strict=not config.tie_embeddings)
    return Base(model.eval(), tokenizer)


def save_base(folder: Path, base: Base) -> None:
    """config.json, model.safetensors and the tokenizer's files."""
    model, tokenizer = base
    write_json(folder / CONFIG, model.config.to_opt())
    save_tensors(folder / WEIGHTS, state(model))
    tokenizer.save(folder, model.config.max_positions)


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a checkpoint folder. Raises UserError if there is none."""
    adapter = (folder / "adapter_config.json").exists()
    hint = "It is an adapter: give it with --adapter" if adapter else "Make the models with `dvc repro`"
    if not (folder / CONFIG).exists():
        raise UserError(f"{folder} is not a model folder: it has no {CONFIG}. {hint}.")
    return read_json(folder / CONFIG, hint)


def state(model: MiniGPT) -> dict[str, Tensor]:
    """The model's tensors by checkpoint name; a tied head is the embedding and is not listed twice."""
    tensors = dict(model.state_dict())
    if model.config.tie_embeddings:
        del tensors[HEAD_WEIGHT]
    return tensors


def resized(model: MiniGPT, vocab_size: int) -> MiniGPT:
    """A new model with `vocab_size` rows; the old rows are copied bit for bit, the others keep a fresh draw."""
    larger = MiniGPT(replace(model.config, vocab_size=vocab_size))
    with torch.no_grad():
        for name, tensor in state(larger).items():
            old = model.state_dict()[name]
            tensor[: old.shape[0]].copy_(old)
    return larger.eval()


def count(model: torch.nn.Module) -> dict[str, int]:
    """Parameters in all and trainable; fixed sinusoids are not parameters."""
    parameters = list(model.parameters())
    return {
        "total": sum(p.numel() for p in parameters),
        "trainable": sum(p.numel() for p in parameters if p.requires_grad),
    }


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write safetensors with PEFT's and transformers' one metadata entry. Raises UserError on a full disk."""
    try:
        save_file({n: t.detach().contiguous().clone() for n, t in tensors.items()}, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise UserError(f"cannot write {path}: {error}. Free some space or choose another folder.") from None


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file. Raises UserError if it cannot be read."""
    shapes(path)  # a damaged file is refused with a reason that the library does not give
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read: {error}.") from None
