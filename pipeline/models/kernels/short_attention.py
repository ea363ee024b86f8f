"""Causal attention on the CPU as plain batched matrix products, several times as fast as flash attention where
sequences are short: a flash kernel's backward there spends its time outside the products.

Dimensions as in attend.py. A head group's R·t queries are the rows of one product, so that keys and values are not
repeated and their gradients need no sum. A long sequence's queries go in blocks, so that few scores are computed that
a later position masks; short sequences share a block, because small products cost by their number, not by their size.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

LONGEST = 512  # tokens; beyond it the kept weights, T² a head, outweigh what they save
BLOCK = 128  # queries


def packed(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], scale: float) -> Tensor:
    """(B, T, H, K) for q (B, H, T, K), k and v (B, G, T, K), whose T holds sequences of `lengths` end to end."""
    out: Tensor = _Packed.apply(q, k, v, tuple(blocks(lengths)), scale)  # type: ignore[no-untyped-call]
    return out


class Block(NamedTuple):
    """Queries start:stop, which see of keys first:stop those of their own sequence that are not later."""

    first: int
    start: int
    stop: int
    lengths: tuple[int, ...]  # of the sequences in it, the one from `first` on with its earlier tokens

    @property
    def weights(self) -> int:
        """Numbers a head."""
        return (self.stop - self.start) * (self.stop - self.first)


def blocks(lengths: Sequence[int]) -> Iterator[Block]:
    """In order: neighbours that together have at most BLOCK tokens in one, longer sequences alone, in several."""
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
        for part, hidden in zip(parts, _hidden(q)(parts, H // k.shape[1], q.dtype), strict=True):
            rows, keys, values = _rows(q, part, k.shape[1]), _seen(k, part), _seen(v, part)
            weights = torch.baddbmm(hidden, rows, keys.transpose(1, 2), alpha=scale).softmax(-1)  # (BG, R·t, s)
            kept += [rows, weights]
            out[:, part.start : part.stop] = _tokens(torch.bmm(weights, values), B, H)
        ctx.save_for_backward(k, v, *kept)
        ctx.parts, ctx.scale = parts, scale
        return out

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        """dV = PᵀdO; dS = P ∘ (dP − rows' sums of P ∘ dP) with dP = dO Vᵀ; dQ = dS K; dK = dSᵀ Q."""
        k, v, *kept = ctx.saved_tensors
        of_q = torch.empty_like(outputs[0])  # gradients lie as the projections want them
        of_k, of_v = (torch.zeros_like(x.transpose(1, 2)) for x in (k, v))
        wanted = outputs[0].transpose(1, 2)  # (B, H, T, K)
        B, H, _, _ = wanted.shape
        G = k.shape[1]
        for part, rows, weights in zip(ctx.parts, kept[::2], kept[1::2], strict=True):
            of_rows, keys, values = _rows(wanted, part, G), _seen(k, part), _seen(v, part)
            of_weights = torch.bmm(of_rows, values.transpose(1, 2))
            of_scores = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype).mul_(ctx.scale)
            of_v[:, part.first : part.stop] += _tokens(torch.bmm(weights.transpose(1, 2), of_rows), B, G)
            of_k[:, part.first : part.stop] += _tokens(torch.bmm(of_scores.transpose(1, 2), rows), B, G)
            of_q[:, part.start : part.stop] = _tokens(torch.bmm(of_scores, keys), B, H)
        return of_q.transpose(1, 2), of_k.transpose(1, 2), of_v.transpose(1, 2), None, None


def _rows(x: Tensor, part: Block, groups: int) -> Tensor:
    """The block's queries as rows of their group, (BG, R·t, K)."""
    B, H, _, K = x.shape
    t = part.stop - part.start
    return x[:, :, part.start : part.stop].reshape(B * groups, H // groups * t, K)


def _seen(x: Tensor, part: Block) -> Tensor:
    return x[:, :, part.first : part.stop].flatten(0, 1)  # (BG, s, K)


def _tokens(x: Tensor, rows: int, heads: int) -> Tensor:
    """(B, t, heads, K) from a product's rows."""
    return x.view(rows, heads, -1, x.shape[-1]).transpose(1, 2)


def _masks(parts: tuple[Block, ...], repeats: int, dtype: torch.dtype) -> list[Tensor]:
    """For each block (1, R·t, s): 0 where a query sees a key, else −∞."""
    found = []
    for part in parts:
        count, lengths = len(part.lengths), torch.tensor(part.lengths)
        sequence = torch.arange(count).repeat_interleave(lengths, output_size=part.stop - part.first)
        seen = (sequence[:, None] == sequence).tril_()[part.start - part.first :]
        mask = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, -torch.inf)
        found.append(mask.repeat(1, repeats, 1))
    return found


_remembered = lru_cache(maxsize=1)(_masks)  # all layers of a step have the same


def _hidden(like: Tensor) -> Callable[[tuple[Block, ...], int, torch.dtype], list[Tensor]]:
    """Masks of real tensors are no fake ones, nor the other way round."""
    return _remembered if type(like) is Tensor else _masks
