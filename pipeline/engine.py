"""Load a model with or without an adapter, ask it, compare several: behind `lora prompt`, `compare` and evaluate."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pipeline.adapters.peft_format import load_adapter
from pipeline.dag import VARIANTS, Project
from pipeline.errors import UserError
from pipeline.generate import GREEDY, Sampling, finite, generate
from pipeline.models.base import load_base
from pipeline.models.minigpt import MiniGPT
from pipeline.tokenizer import WordTokenizer


@dataclass(frozen=True)
class Loaded:
    """A model ready to be asked, and where it came from."""

    name: str
    model: MiniGPT
    tokenizer: WordTokenizer
    base: Path
    adapter: Path | None = None


@dataclass(frozen=True)
class Choice:
    """A candidate for the next token."""

    token: str
    probability: float


def load(base: Path, adapter: Path | None = None, name: str = "") -> Loaded:
    """The checkpoint at `base` with the adapter at `adapter` on it. Raises UserError; never the base in its place."""
    model, tokenizer = load_base(base)
    if adapter is not None:
        load_adapter(model, base, adapter)
    return Loaded(name or (adapter or base).name, model.eval(), tokenizer, base, adapter)


def variants(project: Project) -> Iterator[Loaded]:
    """Every model that the pipeline has made so far, in the order of the report."""
    for name, (base, adapter) in VARIANTS.items():
        folders = project.artifact(base), project.artifact(adapter) if adapter else None
        if all(folder is None or folder.is_dir() for folder in folders):
            yield load(*folders, name=name)


def encode(loaded: Loaded, text: str) -> tuple[int, ...]:
    """The prompt's ids. Raises UserError if it is empty, too long, or has a word the model never saw."""
    unknown, ids = loaded.tokenizer.unknown_words(text), loaded.tokenizer.encode(text)
    if not ids:
        raise UserError("The prompt is empty. Give at least one word.")
    if unknown:
        raise UserError(
            f"{loaded.name} does not know: {', '.join(unknown)}. It is a word-level model: use words of its training "
            f"data, or add them with expand_vocab."
        )
    if len(ids) > loaded.model.config.max_positions:
        raise UserError(f"The prompt has {len(ids)} tokens; {loaded.name} takes {loaded.model.config.max_positions}.")
    return ids


@torch.no_grad()
def next_probabilities(loaded: Loaded, text: str) -> Tensor:
    """Probabilities of the next token, (V,), on the CPU. Raises UserError if the model overflows."""
    logits: Tensor = loaded.model(torch.tensor([encode(loaded, text)], device=loaded.model.device))
    return finite(logits[0, -1].cpu()).softmax(0)


def top_k(loaded: Loaded, text: str, k: int) -> list[Choice]:
    """The `k` likeliest next tokens, likeliest first."""
    return likeliest(loaded, next_probabilities(loaded, text), k)


def likeliest(loaded: Loaded, probabilities: Tensor, k: int) -> list[Choice]:
    """The `k` likeliest of probabilities (V,), likeliest first."""
    values, ids = probabilities.topk(min(k, len(loaded.tokenizer)))
    return [Choice(loaded.tokenizer.word(int(i)), float(v)) for v, i in zip(values, ids, strict=True)]


def complete(loaded: Loaded, text: str, limit: int = 20, sampling: Sampling = GREEDY) -> str:
    """The words that follow `text`, until the model ends its sentence or `limit` tokens."""
    return loaded.tokenizer.decode(generate(loaded.model, encode(loaded, text), limit, sampling))
