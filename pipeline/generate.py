"""Generation with a KV cache: greedy, or sampled with temperature, top-k and top-p."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.errors import UserError
from pipeline.models.minigpt import KVCache, MiniGPT


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. Temperature 0 is greedy; top_k 0 and top_p 1 cut nothing."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise UserError(
                "sampling needs temperature at least 0, top-k at least 0 and top-p above 0 up to 1, "
                f"got {self.temperature}, {self.top_k} and {self.top_p}."
            )
        if not 0 <= self.seed < 2**63:
            raise UserError(f"a seed is a whole number below 2^63, got {self.seed}.")


GREEDY = Sampling()
COLDEST = 1e-6  # below it logits would overflow, and the likeliest token is drawn anyway


@torch.no_grad()
def generate(model: MiniGPT, prompt: Sequence[int], limit: int, sampling: Sampling = GREEDY) -> Iterator[int]:
    """Yields up to `limit` token ids after `prompt`, ending before the end token or after the last position."""
    generator = torch.Generator().manual_seed(sampling.seed)
    cache = KVCache()
    new = torch.tensor([list(prompt)])  # (1, T): all of the prompt first, then one token a turn
    for _ in range(min(limit, model.config.max_positions - len(prompt))):
        logits = model(new, cache=cache)[0, -1]  # (V,)
        token = draw(logits, sampling, generator)
        if token == model.config.end_id:
            return
        yield token
        new = torch.tensor([[token]])


def draw(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """One token id from logits (V,)."""
    if sampling.temperature < COLDEST:
        return int(logits.argmax())
    probabilities = distribution(logits, sampling)
    return int(torch.multinomial(probabilities, 1, generator=generator))


def distribution(logits: Tensor, sampling: Sampling) -> Tensor:
    """Probabilities (V,) after temperature, then top-k, then top-p (Holtzman et al. 2020, §3.1)."""
    ordered, ids = (logits / sampling.temperature).sort(descending=True, stable=True)
    if sampling.top_k:
        ordered[sampling.top_k :] = -torch.inf
    probabilities = ordered.softmax(0)
    before = probabilities.cumsum(0) - probabilities  # mass of the likelier tokens
    probabilities[before >= sampling.top_p] = 0
    return torch.zeros_like(probabilities).scatter(0, ids, probabilities / probabilities.sum())
