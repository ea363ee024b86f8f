"""Causal attention on the CPU as plain batched matrix products, several times as fast as flash attention where
sequences are short: a flash kernel's backward there spends its time outside the products.

Dimensions as in attend.py. A head group's R·T queries are the rows of one product, so that keys and values are not
repeated and their gradients need no sum. Queries go in blocks, so that few scores are computed that a later
position masks.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

LONGEST = 512  # tokens; beyond it the kept weights, T² a head, outweigh what they save
BLOCK = 128  # queries


def packed(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], scale: float) -> Tensor:
    """(B, T, H, K) for q (B, H, T, K), k and v (B, G, T, K), whose T holds sequences of `lengths` end to end."""
    out: Tensor = _Packed.apply(q, k, v, tuple(lengths), scale)  # type: ignore[no-untyped-call]
    return out


class _Packed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], scale: float) -> Tensor:
        B, H, T, K = q.shape
        out = q.new_empty(B, T, H, K)
        kept = []
        for first, start, stop in _blocks(lengths):
            rows, keys, values = _rows(q, start, stop, k.shape[1]), _seen(k, first, stop), _seen(v, first, stop)
            scores = torch.bmm(rows, keys.transpose(1, 2)).mul_(scale)  # (BG, R·t, s)
            _hide_later(scores, start - first, stop - start)
            weights = scores.softmax(-1, dtype=torch.float32).to(q.dtype)  # torch's 16-bit softmax is slower
            kept.append(weights)
            out[:, start:stop] = torch.bmm(weights, values).view(B, H, stop - start, K).transpose(1, 2)
        ctx.save_for_backward(q, k, v, *kept)
        ctx.lengths, ctx.scale = lengths, scale
        return out

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        """dV = PᵀdO; dS = P ∘ (dP − rows' sums of P ∘ dP) with dP = dO Vᵀ; dQ = dS K; dK = dSᵀ Q."""
        q, k, v, *kept = ctx.saved_tensors
        B, H, _, K = q.shape
        of_q = q.new_empty(B, q.shape[2], H, K)  # gradients lie as the projections want them
        of_k, of_v = (k.new_zeros(B, k.shape[2], k.shape[1], K) for _ in range(2))
        wanted = outputs[0].transpose(1, 2)  # (B, H, T, K)
        for (first, start, stop), weights in zip(_blocks(ctx.lengths), kept, strict=True):
            rows, of_rows = (_rows(x, start, stop, k.shape[1]) for x in (q, wanted))
            keys, values = _seen(k, first, stop), _seen(v, first, stop)
            of_weights = torch.bmm(of_rows, values.transpose(1, 2))
            of_scores = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype).mul_(ctx.scale)
            _add(of_v, torch.bmm(weights.transpose(1, 2), of_rows), first, stop)
            _add(of_k, torch.bmm(of_scores.transpose(1, 2), rows), first, stop)
            of_q[:, start:stop] = torch.bmm(of_scores, keys).view(B, H, stop - start, K).transpose(1, 2)
        return of_q.transpose(1, 2), of_k.transpose(1, 2), of_v.transpose(1, 2), None, None


def _blocks(lengths: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(first key, first query, query to stop before) of each block."""
    first = 0
    for length in lengths:
        for start in range(first, first + length, BLOCK):
            yield first, start, min(start + BLOCK, first + length)
        first += length


def _rows(x: Tensor, start: int, stop: int, groups: int) -> Tensor:
    """Queries start:stop as rows of their group, (BG, R·t, K)."""
    B, H, _, K = x.shape
    return x[:, :, start:stop].reshape(B * groups, H // groups * (stop - start), K)


def _seen(x: Tensor, start: int, stop: int) -> Tensor:
    return x[:, :, start:stop].flatten(0, 1)  # (BG, s, K)


def _hide_later(scores: Tensor, before: int, queries: int) -> None:
    """-∞ where a key comes after the query; the first `before` keys come before them all."""
    square = scores.new_full((queries, queries), -torch.inf).triu_(1)
    scores.view(-1, queries, scores.shape[2])[:, :, before:] += square


def _add(total: Tensor, part: Tensor, start: int, stop: int) -> None:
    B, _, G, K = total.shape
    total[:, start:stop] += part.view(B, G, stop - start, K).transpose(1, 2)
