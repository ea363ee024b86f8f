"""Causal attention on the CPU as plain batched matrix products: for short sequences several times as fast as flash
attention, whose backward then spends its time outside the products.

Dimensions as in packed_attention.py. A head group's R·t queries are the rows of one product, so that keys and values
are not repeated and their gradients need no sum. A long sequence's queries are split into blocks, so that few masked
scores are computed; short sequences share a block, because small products cost by their number, not by their size.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

LONGEST = 512  # tokens; beyond it the weights kept for backward, T² per head, cost more than they save
BLOCK = 128  # queries


def packed(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], scale: float) -> Tensor:
    """(B, T, H, K) for q (B, H, T, K), k and v (B, G, T, K); their T tokens are packed sequences of `lengths`."""
    out: Tensor = _Packed.apply(q, k, v, tuple(blocks(lengths)), scale)  # type: ignore[no-untyped-call]
    return out


class Block(NamedTuple):
    """Queries start:stop and keys first:stop; a query sees the keys of its own sequence that are not later."""

    first: int
    start: int
    stop: int
    lengths: tuple[int, ...]  # of the sequences in first:stop

    @property
    def weights(self) -> int:
        """Number of attention weights per head."""
        return (self.stop - self.start) * (self.stop - self.first)


def blocks(lengths: Sequence[int]) -> Iterator[Block]:
    """In order: neighbours with at most BLOCK tokens in total share a block, a longer sequence has several."""
    first, run = 0, list[int]()
    for length in [*lengths, BLOCK + 1]:
        if run and sum(run) + length > BLOCK:
            stop = first + sum(run)
            for start in range(first, stop, BLOCK):
                end = min(start + BLOCK, stop)
                yield Block(first, start, end, tuple(run) if len(run) > 1 else (end - first,))
            first, run = stop, []
        run.append(length)


class _Packed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, parts: tuple[Block, ...], scale: float) -> Tensor:
        B, H, T, K = q.shape
        out = q.new_empty(B, T, H, K)
        kept = []
        for part, mask in zip(parts, _masks_for(q)(parts, H // k.shape[1], q.dtype), strict=True):
            rows, keys, values = _rows(q, part, k.shape[1]), _keys(k, part), _keys(v, part)
            weights = torch.baddbmm(mask, rows, keys.transpose(1, 2), alpha=scale).softmax(-1)  # (BG, R·t, s)
            kept += [rows, weights]
            out[:, part.start : part.stop] = _tokens(torch.bmm(weights, values), B, H)
        ctx.save_for_backward(k, v, *kept)
        ctx.parts, ctx.scale = parts, scale
        return out

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        """dV = PᵀdO; dS = P ∘ (dP − rows' sums of P ∘ dP) with dP = dO Vᵀ; dQ = dS K; dK = dSᵀ Q."""
        k, v, *kept = ctx.saved_tensors
        d_q = torch.empty_like(outputs[0])  # (B, T, H, K): the layout that the projections' backward reads
        d_k, d_v = (torch.zeros_like(x.transpose(1, 2)) for x in (k, v))
        d_out = outputs[0].transpose(1, 2)  # (B, H, T, K)
        B, H, _, _ = d_out.shape
        G = k.shape[1]
        for part, rows, weights in zip(ctx.parts, kept[::2], kept[1::2], strict=True):
            d_rows, keys, values = _rows(d_out, part, G), _keys(k, part), _keys(v, part)
            d_weights = torch.bmm(d_rows, values.transpose(1, 2))
            d_scores = torch._softmax_backward_data(d_weights, weights, -1, weights.dtype).mul_(ctx.scale)
            d_v[:, part.first : part.stop] += _tokens(torch.bmm(weights.transpose(1, 2), d_rows), B, G)
            d_k[:, part.first : part.stop] += _tokens(torch.bmm(d_scores.transpose(1, 2), rows), B, G)
            d_q[:, part.start : part.stop] = _tokens(torch.bmm(d_scores, keys), B, H)
        return d_q.transpose(1, 2), d_k.transpose(1, 2), d_v.transpose(1, 2), None, None


def _rows(x: Tensor, part: Block, groups: int) -> Tensor:
    """The block's queries as rows of their group, (BG, R·t, K)."""
    B, H, _, K = x.shape
    t = part.stop - part.start
    return x[:, :, part.start : part.stop].reshape(B * groups, H // groups * t, K)


def _keys(x: Tensor, part: Block) -> Tensor:
    """The block's keys, or their values, (BG, s, K)."""
    return x[:, :, part.first : part.stop].flatten(0, 1)


def _tokens(x: Tensor, rows: int, heads: int) -> Tensor:
    """(B, t, heads, K) from a product's rows."""
    return x.view(rows, heads, -1, x.shape[-1]).transpose(1, 2)


def _masks(parts: tuple[Block, ...], repeats: int, dtype: torch.dtype) -> list[Tensor]:
    """For each block (1, R·t, s): 0 where a query sees a key, else −∞."""
    masks = []
    for part in parts:
        count, lengths = len(part.lengths), torch.tensor(part.lengths)
        sequence = torch.arange(count).repeat_interleave(lengths, output_size=part.stop - part.first)  # (s,)
        visible = (sequence[:, None] == sequence).tril_()[part.start - part.first :]  # (t, s)
        mask = torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, -torch.inf)
        masks.append(mask.repeat(1, repeats, 1))
    return masks


_cached_masks = lru_cache(maxsize=1)(_masks)  # all layers of a step use the same


def _masks_for(like: Tensor) -> Callable[[tuple[Block, ...], int, torch.dtype], list[Tensor]]:
    """Cached for real tensors only: under FakeTensorMode the masks are fake."""
    return _cached_masks if type(like) is Tensor else _masks
