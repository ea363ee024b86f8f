"""What a variant knows: losses, completions, kept answers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.data import Example
from pipeline.engine import Loaded, complete
from pipeline.errors import UserError
from pipeline.tokenizer import split


@dataclass(frozen=True)
class Scored:
    """Every next-token prediction on some examples: cross-entropies in nats (N,) and first choices (N,)."""

    losses: Tensor
    choices: Tensor

    @property
    def loss(self) -> float:
        return float(self.losses.mean())

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)


@torch.no_grad()
def score(loaded: Loaded, examples: Sequence[Example]) -> Scored:
    """Each whole sentence with its end token, every token after the first predicted from all before it."""
    losses, choices = [], []
    for example in examples:
        ids = torch.tensor(loaded.tokenizer.encode_example(example, loaded.model.config.max_positions))
        logits = loaded.model(ids[None, :-1])[0]  # (T, V)
        losses.append(F.cross_entropy(logits, ids[1:], reduction="none"))
        choices.append(logits.argmax(dim=-1))
    return Scored(torch.cat(losses), torch.cat(choices))


def completes(loaded: Loaded, example: Example, given: int) -> bool:
    """Does the greedy completion of the first `given` words give the rest, and end there?"""
    words = split(example.text)
    if given >= len(words):
        raise UserError(
            f"evaluate.prompt_words is {given}, but {example.place} has {len(words)} words: nothing is left to say."
        )
    return complete(loaded, " ".join(words[:given]), limit=len(words)) == " ".join(words[given:])
