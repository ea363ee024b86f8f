"""Attention of short sequences on the CPU, for training: batched matrix products, or native.c.

The flash kernel's backward spends its time outside the products there. A LoRA step of SmolLM2-135M
in bf16, 8 sequences of 12 to 300 tokens, takes 1/1.2 of the time by the products (measured on two
cores, in turns with torch's flash attention). Shapes as in plain_attention.py.
"""

from collections.abc import Iterator, Sequence
from ctypes import addressof
from functools import lru_cache
from itertools import accumulate, chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline.models.kernels.native import AttentionShape, call, supports

# Tokens of a short sequence; beyond it the weights kept for backward, T² per head, cost more than
# they save.
LONGEST = 512
NATIVE_LANES = 32  # a head's size must be a multiple of it in native.c's attention
# queries of one product of short sequences; sharing products takes a sixth off their attention's
# time
BLOCK = 128


def short_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], scale: float
) -> Tensor:
    """(B, T, H, K) for q (B, H, T, K), k and v (B, G, T, K) of packed sequences.

    A head group's R·t queries are the rows of one product, so that keys and values are not repeated
    and their gradients need no sum.
    """
    out: Tensor
    if supports(q, k, v, lanes=NATIVE_LANES) and q.shape[3] == v.shape[3]:
        tokens = (x.transpose(1, 2) for x in (q, k, v))
        out = FusedAttention.apply(*tokens, tuple(lengths), scale)  # type: ignore[no-untyped-call]
    else:
        out = _ShortAttention.apply(q, k, v, tuple(blocks(lengths)), scale)  # type: ignore[no-untyped-call]
    return out


class FusedAttention(torch.autograd.Function):
    """`short_attention` by native.c, of tensors (B, T, heads, K); backward needs no kept weights.

    With SmolLM2-135M's heads and 8 sequences of 640 tokens in total, forward and backward take 1.5
    instead of 5.0 ms.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], scale: float
    ) -> Tensor:
        q, k, v = (_strided(x) for x in (q, k, v))
        B, T, H, K = q.shape
        starts = starts_of(lengths * B)
        strides = chain.from_iterable(x.stride()[1:3] for x in (q, k, v))
        ctx.shape = AttentionShape(*strides, len(starts) - 1, H, k.shape[2], K, scale)
        out, log_sums = q.new_empty(q.shape), q.new_empty(B, T, H, dtype=torch.float32)
        tensors = (q, k, v, out, log_sums, starts)
        _run("attention_forward", tensors, ctx.shape)
        ctx.save_for_backward(*tensors)
        return out

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, log_sums, starts = ctx.saved_tensors
        grads = [x.new_empty(x.shape) for x in (q, k, v)]
        tensors = (outputs[0].contiguous(), q, k, v, out, log_sums, *grads, starts)
        _run("attention_backward", tensors, ctx.shape)
        return *grads, None, None


def _strided(x: Tensor) -> Tensor:
    """x (B, T, heads, K) with tokens at one distance, and a head's numbers side by side."""
    even = len(x) == 1 or x.stride(0) == x.shape[1] * x.stride(1)
    return x if even and x.stride(3) == 1 else x.contiguous()


@lru_cache(maxsize=1)
def starts_of(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)])


def _run(function: str, tensors: Sequence[Tensor], shape: AttentionShape) -> None:
    if call(function, *tensors, addressof(shape)):
        raise MemoryError("attention: the buffers of a sequence do not fit in memory")


class QueryBlock(NamedTuple):
    """Queries start:stop and keys first:stop of some packed sequences.

    A query sees the keys of its own sequence that are not later.
    """

    first: int
    start: int
    stop: int
    lengths: tuple[int, ...]  # of the sequences in first:stop

    @property
    def weights(self) -> int:
        """Number of attention weights per head."""
        return (self.stop - self.start) * (self.stop - self.first)


def blocks(lengths: Sequence[int]) -> Iterator[QueryBlock]:
    """The blocks of a row, in order.

    Neighbours with at most BLOCK tokens in total share a block, a longer sequence has several.

    Small products cost by their number, not by their size, so short sequences share one; a long
    sequence is split so that few masked scores are computed.
    """
    first, run = 0, list[int]()
    for length in [*lengths, BLOCK + 1]:  # the last one ends the last run
        if run and sum(run) + length > BLOCK:
            stop = first + sum(run)
            for start in range(first, stop, BLOCK):
                end = min(start + BLOCK, stop)
                inside = tuple(run) if len(run) > 1 else (end - first,)
                yield QueryBlock(first, start, end, inside)
            first, run = stop, []
        run.append(length)


class _ShortAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, parts: tuple[QueryBlock, ...], scale: float
    ) -> Tensor:
        B, H, T, _ = q.shape
        G = k.shape[1]
        # cached for real tensors only: under FakeTensorMode the masks are fake
        masks = (_cached_masks if type(q) is Tensor else _masks)(parts, H // G, q.dtype)
        out, saved = q.new_empty(B, T, H, v.shape[3]), list[Tensor]()
        for part, mask in zip(parts, masks, strict=True):
            # (BG, R·t, K), (BG, s, K) twice
            rows, keys, values = _rows(q, part, G), _keys(k, part), _keys(v, part)
            # (BG, R·t, s)
            weights = torch.baddbmm(mask, rows, keys.transpose(1, 2), alpha=scale).softmax(-1)
            saved += [rows, weights]
            # (B, t, H, K)
            out[:, part.start : part.stop] = _tokens(torch.bmm(weights, values), B, H)
        ctx.save_for_backward(k, v, *saved)
        ctx.parts, ctx.scale = parts, scale
        return out

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        """dV = PᵀdO; dS = P ∘ (dP − rows' sums of P ∘ dP); dQ = dS K; dK = dSᵀ Q.

        dP = dO Vᵀ.
        """
        k, v, *saved = ctx.saved_tensors
        B, T, H, _ = outputs[0].shape
        d_q = k.new_empty(B, T, H, k.shape[3])  # the layout that the projections' backward reads
        d_k, d_v = (torch.zeros_like(x.transpose(1, 2)) for x in (k, v))  # (B, T, G, K)
        d_out = outputs[0].transpose(1, 2)  # (B, H, T, K)
        G = k.shape[1]
        for part, rows, weights in zip(ctx.parts, saved[::2], saved[1::2], strict=True):
            d_rows, keys, values = _rows(d_out, part, G), _keys(k, part), _keys(v, part)
            d_weights = torch.bmm(d_rows, values.transpose(1, 2))  # (BG, R·t, s)
            d_scores = torch._softmax_backward_data(d_weights, weights, -1, weights.dtype)
            d_scores.mul_(ctx.scale)
            del d_weights  # as large as the block's scores
            # added: the blocks of one long sequence share its first keys
            seen = slice(part.first, part.stop)
            d_v[:, seen] += _tokens(torch.bmm(weights.transpose(1, 2), d_rows), B, G)
            d_k[:, seen] += _tokens(torch.bmm(d_scores.transpose(1, 2), rows), B, G)
            d_q[:, part.start : part.stop] = _tokens(torch.bmm(d_scores, keys), B, H)
            del d_scores
        return d_q.transpose(1, 2), d_k.transpose(1, 2), d_v.transpose(1, 2), None, None


def _rows(x: Tensor, part: QueryBlock, groups: int) -> Tensor:
    """The block's queries as rows of their group: (B, H, T, K) → (BG, R·t, K)."""
    B, H, _, K = x.shape
    t = part.stop - part.start
    return x[:, :, part.start : part.stop].reshape(B * groups, H // groups * t, K)


def _keys(x: Tensor, part: QueryBlock) -> Tensor:
    """The block's keys, or their values: (B, G, T, K) → (BG, s, K)."""
    return x[:, :, part.first : part.stop].flatten(0, 1)


def _tokens(x: Tensor, rows: int, heads: int) -> Tensor:
    """(B, t, heads, K) from a product's rows."""
    return x.view(rows, heads, -1, x.shape[-1]).transpose(1, 2)


def _masks(parts: tuple[QueryBlock, ...], repeats: int, dtype: torch.dtype) -> list[Tensor]:
    """For each block (1, R·t, s): 0 where a query sees a key, else −∞."""
    masks = []
    for part in parts:
        count, lengths = len(part.lengths), torch.tensor(part.lengths)
        size = part.stop - part.first
        sequence = torch.arange(count).repeat_interleave(lengths, output_size=size)  # (s,)
        visible = (sequence[:, None] == sequence).tril_()[part.start - part.first :]  # (t, s)
        mask = torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, -torch.inf)
        masks.append(mask.repeat(1, repeats, 1))
    return masks


_cached_masks = lru_cache(maxsize=1)(_masks)  # all layers of a step use the same
