"""Several adapters as one: linear, concatenated, cut to a rank, TIES (Yadav et al. 2023), DARE (Yu et al. 2024)."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pipeline.adapters.low_rank import LowRank
from pipeline.errors import UserError

Method = Literal["linear", "cat", "svd", "ties", "dare", "dare-ties"]


class Part(NamedTuple):
    """One adapter's update of a module, and how much of it is wanted."""

    update: LowRank
    weight: float


@dataclass(frozen=True)
class CombineOptions:
    """`rank` is what svd, ties and dare are cut to; `density` the share of numbers that ties and dare keep."""

    method: Method = "cat"
    rank: int = 8
    density: float = 0.5
    seed: int = 0


class Combined(NamedTuple):
    """The updates by module, and ‖it − exact sum‖ / ‖exact sum‖ over all of them (Frobenius norms)."""

    updates: Mapping[str, LowRank]
    error: float


def combine(adapters: Sequence[Mapping[str, LowRank]], weights: Sequence[float], how: CombineOptions) -> Combined:
    """Σ wᵢ·sᵢ·BᵢAᵢ of each module, or what `how` makes of it. Raises UserError where a method does not fit."""
    torch.manual_seed(how.seed)  # of what DARE drops
    updates, off, size = {}, 0.0, 0.0
    for name in dict.fromkeys(name for one in adapters for name in one):
        parts = [Part(one[name], weight) for one, weight in zip(adapters, weights, strict=True) if name in one]
        exact = concatenated(parts)
        updates[name] = _WAYS[how.method](parts, how, name)
        off += concatenated([Part(updates[name], 1.0), Part(exact, -1.0)]).squared_norm()
        size += exact.squared_norm()
    return Combined(updates, math.sqrt(max(off, 0.0) / size) if size else 0.0)


def concatenated(parts: Sequence[Part]) -> LowRank:
    """The sum itself, of rank ΣR."""
    a = torch.cat([update.a.float() for update, _ in parts])
    b = torch.cat([weight * update.scale * update.b.float() for update, weight in parts], dim=1)
    return LowRank(a, b, 1.0, parts[0].update.embedding)


def _linear(parts: Sequence[Part], _how: CombineOptions, name: str) -> LowRank:
    """As PEFT's linear: A and B are summed apart, which mixes every A with every B. Exact for one adapter alone."""
    ranks = {update.rank for update, _ in parts}
    if len(ranks) > 1:
        raise UserError(f"linear takes adapters of one rank; {name} has {sorted(ranks)}. Take --method cat or svd.")
    shares = [(update, weight * update.scale) for update, weight in parts]
    a = sum(
        (math.copysign(math.sqrt(abs(share)), share) * update.a.float() for update, share in shares),
        start=torch.zeros(()),
    )
    b = sum((math.sqrt(abs(share)) * update.b.float() for update, share in shares), start=torch.zeros(()))
    return LowRank(a, b, 1.0, parts[0].update.embedding)


def _cut(parts: Sequence[Part], how: CombineOptions, _name: str) -> LowRank:
    """The best approximation of that rank (Eckart and Young 1936), from the small factors alone.

    With B = QS and Aᵀ = PT, the singular vectors of BA are Q and P times those of STᵀ.
    """
    exact = concatenated(parts)
    q, s = torch.linalg.qr(exact.b.double())
    p, t = torch.linalg.qr(exact.a.double().T)
    left, values, right = torch.linalg.svd(s @ t.T)
    return _of_svd(q @ left, values, right @ p.T, how.rank, exact.embedding)


def _of_svd(left: Tensor, values: Tensor, right: Tensor, rank: int, embedding: bool) -> LowRank:
    rank = min(rank, len(values))
    root = values[:rank].sqrt()  # in both factors alike, so that neither is much the larger
    return LowRank((root[:, None] * right[:rank]).float(), (left[:, :rank] * root).float(), 1.0, embedding)


def _dense(
    merge: Callable[[Tensor, Tensor, float], Tensor], parts: Sequence[Part], how: CombineOptions, _name: str
) -> LowRank:
    """What needs the whole (O, I) update of each adapter, cut to a rank at the end."""
    deltas = torch.stack([update.delta() for update, _ in parts])
    weights = torch.tensor([weight for _, weight in parts]).view(-1, 1, 1)
    left, values, right = torch.linalg.svd(merge(deltas, weights, how.density), full_matrices=False)
    return _of_svd(left, values, right, how.rank, parts[0].update.embedding)


def _ties(deltas: Tensor, weights: Tensor, density: float) -> Tensor:
    """Keep each one's largest numbers, elect a sign for each place, and average those that have it."""
    return _of_one_sign(torch.stack([_largest(delta, density) for delta in deltas]), weights)


def _dare(deltas: Tensor, weights: Tensor, density: float) -> Tensor:
    """Drop numbers at random, and raise the others so that the expected sum stays."""
    return (weights * _dropped(deltas, density)).sum(dim=0)


def _dare_ties(deltas: Tensor, weights: Tensor, density: float) -> Tensor:
    return _of_one_sign(_dropped(deltas, density), weights)


def _largest(delta: Tensor, density: float) -> Tensor:
    kept = delta.abs().flatten().topk(int(density * delta.numel())).indices
    return torch.zeros_like(delta).flatten().index_copy(0, kept, delta.flatten()[kept]).view_as(delta)


def _dropped(deltas: Tensor, density: float) -> Tensor:
    kept = torch.stack([torch.bernoulli(torch.full_like(delta, density)) for delta in deltas])
    return deltas * kept / density


def _of_one_sign(deltas: Tensor, weights: Tensor) -> Tensor:
    elected = torch.where(deltas.sum(dim=0) >= 0, 1.0, -1.0)
    agree = deltas.sign() == elected
    return (weights * deltas * agree).sum(dim=0) / agree.sum(dim=0).clamp(min=1)


_WAYS: Mapping[Method, Callable[[Sequence[Part], CombineOptions, str], LowRank]] = {
    "linear": _linear,
    "cat": lambda parts, _how, _name: concatenated(parts),
    "svd": _cut,
    "ties": partial(_dense, _ties),
    "dare": partial(_dense, _dare),
    "dare-ties": partial(_dense, _dare_ties),
}
