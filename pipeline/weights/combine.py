"""Combine adapters into one: linear, cat, svd, TIES (Yadav et al. 2023), DARE (Yu et al. 2024)."""

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
    """One adapter's update of a module, and its weight in the combination."""

    update: LowRank
    weight: float


@dataclass(frozen=True)
class CombineOptions:
    """`rank`: of the result of svd, ties and dare; `density`: the share of values that ties and dare keep."""

    method: Method = "cat"
    rank: int = 8
    density: float = 0.5
    seed: int = 0


class Combined(NamedTuple):
    """The updates by module, and ‖result − exact sum‖ / ‖exact sum‖ over all modules (Frobenius norms)."""

    updates: Mapping[str, LowRank]
    error: float


def combine(adapters: Sequence[Mapping[str, LowRank]], weights: Sequence[float], options: CombineOptions) -> Combined:
    """Σ wᵢ·sᵢ·BᵢAᵢ of each module, by the method of `options`. Raises UserError if the adapters do not suit it."""
    torch.manual_seed(options.seed)  # DARE drops values at random
    updates, error, norm = {}, 0.0, 0.0
    for name in dict.fromkeys(name for adapter in adapters for name in adapter):
        parts = [
            Part(adapter[name], weight) for adapter, weight in zip(adapters, weights, strict=True) if name in adapter
        ]
        exact = concatenate(parts)
        updates[name] = _METHODS[options.method](parts, options, name)
        error += concatenate([Part(updates[name], 1.0), Part(exact, -1.0)]).squared_norm()
        norm += exact.squared_norm()
    return Combined(updates, math.sqrt(max(error, 0.0) / norm) if norm else 0.0)


def concatenate(parts: Sequence[Part]) -> LowRank:
    """The exact sum, of rank ΣR."""
    a = torch.cat([update.a.float() for update, _ in parts])  # (ΣR, I)
    b = torch.cat([weight * update.scale * update.b.float() for update, weight in parts], dim=1)  # (O, ΣR)
    return LowRank(a, b, 1.0, parts[0].update.embedding)


def _linear(parts: Sequence[Part], _options: CombineOptions, name: str) -> LowRank:
    """PEFT's linear: sums the As and the Bs separately, which adds cross terms. Exact only for a single adapter."""
    ranks = {update.rank for update, _ in parts}
    if len(ranks) > 1:
        raise UserError(
            f"linear needs adapters of equal rank, got {sorted(ranks)} for {name}. Use --method cat or svd."
        )
    shares = [(update, weight * update.scale) for update, weight in parts]
    a = sum(
        (math.copysign(math.sqrt(abs(share)), share) * update.a.float() for update, share in shares),
        start=torch.zeros(()),
    )
    b = sum((math.sqrt(abs(share)) * update.b.float() for update, share in shares), start=torch.zeros(()))
    return LowRank(a, b, 1.0, parts[0].update.embedding)


def _truncate(parts: Sequence[Part], options: CombineOptions, _name: str) -> LowRank:
    """The best approximation of rank `options.rank` (Eckart and Young 1936), computed from the factors only.

    With B = QS and Aᵀ = PT, the singular vectors of BA are Q and P times those of STᵀ.
    """
    exact = concatenate(parts)
    q, s = torch.linalg.qr(exact.b.double())
    p, t = torch.linalg.qr(exact.a.double().T)
    left, values, right = torch.linalg.svd(s @ t.T)
    return _factors_from_svd(q @ left, values, right @ p.T, options.rank, exact.embedding)


def _factors_from_svd(left: Tensor, values: Tensor, right: Tensor, rank: int, embedding: bool) -> LowRank:
    rank = min(rank, len(values))
    root = values[:rank].sqrt()  # √S in both factors, so that their norms are similar
    return LowRank((root[:, None] * right[:rank]).float(), (left[:, :rank] * root).float(), 1.0, embedding)


def _dense(
    merge: Callable[[Tensor, Tensor, float], Tensor], parts: Sequence[Part], options: CombineOptions, _name: str
) -> LowRank:
    """Methods that need the dense update of each adapter; the result is truncated to `options.rank` by SVD."""
    deltas = torch.stack([update.delta() for update, _ in parts])  # (adapters, O, I)
    weights = torch.tensor([weight for _, weight in parts]).view(-1, 1, 1)
    left, values, right = torch.linalg.svd(merge(deltas, weights, options.density), full_matrices=False)
    return _factors_from_svd(left, values, right, options.rank, parts[0].update.embedding)


def _ties(deltas: Tensor, weights: Tensor, density: float) -> Tensor:
    """Keep each adapter's largest values, elect a sign per entry, and average the values that have it."""
    return _average_elected_sign(torch.stack([_keep_largest(delta, density) for delta in deltas]), weights)


def _dare(deltas: Tensor, weights: Tensor, density: float) -> Tensor:
    """Drop values at random and rescale the rest, which keeps the expected sum."""
    return (weights * _drop_and_rescale(deltas, density)).sum(dim=0)


def _dare_ties(deltas: Tensor, weights: Tensor, density: float) -> Tensor:
    return _average_elected_sign(_drop_and_rescale(deltas, density), weights)


def _keep_largest(delta: Tensor, density: float) -> Tensor:
    indices = delta.abs().flatten().topk(int(density * delta.numel())).indices
    return torch.zeros_like(delta).flatten().index_copy(0, indices, delta.flatten()[indices]).view_as(delta)


def _drop_and_rescale(deltas: Tensor, density: float) -> Tensor:
    mask = torch.stack([torch.bernoulli(torch.full_like(delta, density)) for delta in deltas])
    return deltas * mask / density


def _average_elected_sign(deltas: Tensor, weights: Tensor) -> Tensor:
    sign = torch.where(deltas.sum(dim=0) >= 0, 1.0, -1.0)
    agree = deltas.sign() == sign
    return (weights * deltas * agree).sum(dim=0) / agree.sum(dim=0).clamp(min=1)


_METHODS: Mapping[Method, Callable[[Sequence[Part], CombineOptions, str], LowRank]] = {
    "linear": _linear,
    "cat": lambda parts, _options, _name: concatenate(parts),
    "svd": _truncate,
    "ties": partial(_dense, _ties),
    "dare": partial(_dense, _dare),
    "dare-ties": partial(_dense, _dare_ties),
}
