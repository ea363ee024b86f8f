"""Loads models with or without an adapter and prompts them: behind `lora prompt`, `compare` and evaluate."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pipeline.adapters.folder import quantization_of
from pipeline.adapters.peft.load import load_adapter
from pipeline.data.tokenizers.word import Tokenizer
from pipeline.errors import UserError
from pipeline.models.base import CausalLM
from pipeline.models.device import move_for_inference
from pipeline.models.generate import GREEDY, Sampling, finite, generate
from pipeline.models.load import load_base
from pipeline.project.params.sections import Quantization
from pipeline.project.stage_graph import Project


@dataclass(frozen=True)
class LoadedModel:
    """A model ready for prompts, with its name and folders."""

    name: str
    model: CausalLM
    tokenizer: Tokenizer
    base: Path
    adapter: Path | None = None


@dataclass(frozen=True)
class TokenProbability:
    """A candidate for the next token."""

    token: str
    probability: float


def load(
    base: Path,
    adapter: Path | None = None,
    name: str = "",
    trust_remote_code: bool = False,
    quantization: Quantization | None = None,
) -> LoadedModel:
    """The checkpoint at `base`, with the adapter at `adapter` if given, in eval mode on the best device.

    The base is quantized as when the adapter was trained, or as `quantization` says. Raises UserError, and never
    returns the base alone if the adapter does not load.
    """
    model, tokenizer = load_base(base, None, trust_remote_code, quantization or quantization_of(adapter))
    move_for_inference(model)
    if adapter is not None:
        load_adapter(model, base, adapter)
    return LoadedModel(name or (adapter or base).name, model.eval(), tokenizer, base, adapter)


def variants(project: Project) -> Iterator[LoadedModel]:
    """Every model that the project's stages, and its parent's, have produced so far, in the order of the report."""
    for name, (base, adapter) in project.variants.items():
        folders = project.artifact(base), project.artifact(adapter) if adapter else None
        if all(folder is None or folder.is_dir() for folder in folders):
            yield load(*folders, name, project.params.pretrain.trust_remote_code)


def encode(loaded: LoadedModel, text: str) -> tuple[int, ...]:
    """The prompt's ids. Raises UserError if it is empty, too long, or has a word that is not in the vocabulary."""
    unknown, ids = loaded.tokenizer.unknown_words(text), loaded.tokenizer.encode(text)
    if not ids:
        raise UserError("The prompt is empty. Give at least one word.")
    if unknown:
        raise UserError(
            f"{loaded.name} does not know: {', '.join(unknown)}. It is a word-level model: use words from its "
            "training data, or add them with expand_vocab."
        )
    if len(ids) > loaded.model.max_length:
        raise UserError(f"The prompt has {len(ids)} tokens; {loaded.name} takes {loaded.model.max_length}.")
    return ids


@torch.no_grad()
def next_probabilities(loaded: LoadedModel, text: str) -> Tensor:
    """Probabilities of the next token, (V,), on the CPU. Raises UserError if the model overflows."""
    model = loaded.model
    hidden = model.hidden_states(torch.tensor([encode(loaded, text)], device=model.device))
    return finite(model.logits(hidden[0, -1]).float().cpu()).softmax(0)


def top_k(loaded: LoadedModel, text: str, k: int) -> list[TokenProbability]:
    """The `k` most likely next tokens, in descending order."""
    return top_tokens(loaded, next_probabilities(loaded, text), k)


def top_tokens(loaded: LoadedModel, probabilities: Tensor, k: int) -> list[TokenProbability]:
    """The `k` most likely tokens of probabilities (V,), in descending order."""
    values, ids = probabilities.topk(min(k, len(loaded.tokenizer)))
    return [TokenProbability(loaded.tokenizer.word(int(i)), float(v)) for v, i in zip(values, ids, strict=True)]


def continued(loaded: LoadedModel, text: str, limit: int = 20, sampling: Sampling = GREEDY) -> str:
    """The generated text after `text`, with leading white space: up to an end token or `limit` tokens."""
    decode_next = loaded.tokenizer.stream()
    ids = generate(loaded.model, encode(loaded, text), loaded.tokenizer.end_ids, limit, sampling)
    return "".join(map(decode_next, ids))


def complete(loaded: LoadedModel, text: str, limit: int = 20, sampling: Sampling = GREEDY) -> str:
    """`continued` without white space around it."""
    return continued(loaded, text, limit, sampling).strip()
