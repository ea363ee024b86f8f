"""Torch's fused attention in plain mathematics, on the CPU: what a GPU's kernels are called with,
and what they hand back, is checked and computed without one.

While `reference_flash` is entered, `aten._flash_attention_forward` and `_backward` of packed
sequences run on CPU tensors, and this project takes a CPU for a device that has them. So torch's
own `varlen_attn`, its autograd and our calls of them run. The memory-efficient kernel of a causal
row does, too. Keys and values may stand in pages, as flash attention 2 or 3 reads them.

Shown: arguments that the C++ of torch 2.13 rejects (dtypes, head sizes, strides, shapes, the
log-sum-exp's layout) are rejected, and those it trusts without a check are held to what it makes of
them: queries beyond `max_q` are left unwritten (NaN here), keys are those between two starts, a
window of -1 is none. Also whether backward was asked to add in a fixed order (`Calls.repeatable`).

Not shown: that a kernel exists for these sizes on a card, its rounding (here fp32 inside, one
rounding out), its speed and memory, races, and anything about torch's choice among kernels in
`scaled_dot_product_attention`.

`flash_3`: of pages it wants no starts of the keys, where flash attention 2 wants both or none.

`rocm` is what AMD's AOTriton does of this without its newer interface: log-sum-exps padded to (B,
H, max_q), windows ignored, and a causal mask aligned with the first key instead of the last.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.models import kernels


@dataclass
class Calls:
    forward: int = 0
    paged: int = 0  # of them, those of keys in pages
    # of each backward: was a fixed order asked for
    repeatable: list[bool] = field(default_factory=list)


@dataclass(frozen=True)
class _Sequences:
    """Checked arguments. q (T, H, K), k and v (S, G, K)."""

    q: Tensor
    k: Tensor
    v: Tensor
    q_starts: Tensor
    k_starts: Tensor
    max_q: int
    max_k: int
    causal: bool
    scale: float
    window: tuple[int, int]
    rocm: bool

    def __post_init__(self) -> None:
        q, k, v, (T, H, K), G = self.q, self.k, self.v, self.q.shape, self.k.shape[1]
        largest = 512 if self.rocm else 256
        assert q.dtype in (torch.float16, torch.bfloat16), (
            "FlashAttention only support fp16 and bf16 data type"
        )
        assert k.dtype == v.dtype == q.dtype, "query, key and value must have the same dtype"
        assert all(x.stride(-1) == 1 for x in (q, k, v)), (
            "Input tensor must have contiguous last dimension"
        )
        assert largest >= K and K % 8 == 0, f"head size {K}"
        assert H % G == 0, "Number of heads in key/value must divide number of heads in query"
        assert k.shape == v.shape == (len(k), G, K), (
            f"k {tuple(k.shape)} and v {tuple(v.shape)} for q's head size {K}"
        )
        for starts, total, longest in (
            (self.q_starts, T, self.max_q),
            (self.k_starts, len(k), self.max_k),
        ):
            assert starts.dtype == torch.int32 and starts.is_contiguous(), (
                "starts must be int32, side by side"
            )
            assert starts.shape == self.q_starts.shape
            assert int(starts[0]) == 0 and int(starts[-1]) == total, (
                "no check of the C++: it would read beyond"
            )
            assert longest >= int(starts.diff().max()), (
                "no check of the C++: it would leave out tokens"
            )
        assert len(self.q_starts) > 1, "batch size must be positive"

    def __iter__(self) -> Iterator[tuple[slice, slice, Tensor]]:
        """Of each sequence: its queries, its keys, and which a query sees (t, s)."""
        left, right = self.window
        if self.causal:
            right = 0
        if self.rocm:
            left, right = -1, 0 if self.causal else -1
        bounds = zip(self.q_starts.tolist(), self.k_starts.tolist(), strict=True)
        first, first_key = next(bounds)
        for stop, stop_key in bounds:
            t, s = stop - first, stop_key - first_key
            # the key at which a query stands
            own = torch.arange(t)[:, None] + (0 if self.rocm else s - t)
            keys = torch.arange(s)[None]
            seen = torch.ones(t, s, dtype=torch.bool)
            seen &= (keys <= own + right) if right >= 0 else True
            seen &= (keys >= own - left) if left >= 0 else True
            yield slice(first, stop), slice(first_key, stop_key), seen
            first, first_key = stop, stop_key

    def scores(self, queries: slice, keys: slice, seen: Tensor) -> Tensor:
        """(H, t, s) in fp32."""
        scores = (
            torch.einsum("thk,shk->hts", self.q[queries].float(), self.repeated(self.k)[keys])
            * self.scale
        )
        return scores.masked_fill(~seen, -torch.inf)

    def repeated(self, x: Tensor) -> Tensor:
        return x.float().repeat_interleave(self.q.shape[1] // x.shape[1], 1)

    def pad(self, lse: Tensor) -> Tensor:
        """(H, T) → (B, H, max_q), NaN behind a sequence's end."""
        padded = lse.new_full((len(self.q_starts) - 1, len(lse), self.max_q), torch.nan)
        for row, (queries, _, seen) in zip(padded, self, strict=True):
            row[:, : len(seen)] = lse[:, queries]
        return padded

    def unpad(self, lse: Tensor) -> Tensor:
        rows = lse.view(len(self.q_starts) - 1, -1, self.max_q)
        return torch.cat(
            [row[:, : len(seen)] for row, (_, _, seen) in zip(rows, self, strict=True)], 1
        )


def _forward(sequences: _Sequences) -> tuple[Tensor, Tensor]:
    """Output (T, H, K) and log-sum-exp (H, T) in fp32."""
    T, H, _ = sequences.q.shape
    out, lse = torch.full_like(sequences.q, torch.nan), torch.full((H, T), torch.nan)
    for queries, keys, seen in sequences:
        scores = sequences.scores(queries, keys, seen)
        weights = scores.softmax(-1).nan_to_num(0)  # of a query that sees no key
        out[queries] = torch.einsum(
            "hts,shk->thk", weights, sequences.repeated(sequences.v)[keys]
        ).to(out.dtype)
        lse[:, queries] = scores.logsumexp(-1)
    return out, lse


def _backward(sequences: _Sequences, d_out: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, ...]:
    """Dao 2023 (arXiv 2307.08691), algorithm 2: weights are exp(scores − the log-sum-exp that is
    given).
    """
    q, k, v = sequences.q, sequences.k, sequences.v
    assert out.shape == d_out.shape == q.shape, f"dout {tuple(d_out.shape)}, out {tuple(out.shape)}"
    assert out.dtype == d_out.dtype == q.dtype and out.stride(-1) == d_out.stride(-1) == 1
    d_q, d_k, d_v = (
        torch.zeros_like(q),
        *(torch.zeros(len(k), q.shape[1], q.shape[2]) for _ in range(2)),
    )
    for queries, keys, seen in sequences:
        weights = (sequences.scores(queries, keys, seen) - lse[:, queries, None]).exp()  # (H, t, s)
        grad = d_out[queries].float()
        drift = (grad * out[queries].float()).sum(-1).T[..., None]  # (H, t, 1)
        d_scores = torch.einsum("thk,shk->hts", grad, sequences.repeated(v)[keys]) - drift
        d_scores *= weights * sequences.scale
        d_q[queries] = torch.einsum("hts,shk->thk", d_scores, sequences.repeated(k)[keys]).to(
            q.dtype
        )
        d_k[keys] += torch.einsum("hts,thk->shk", d_scores, q[queries].float())
        d_v[keys] += torch.einsum("hts,thk->shk", weights, grad)
    shared = (len(k), k.shape[1], -1, q.shape[2])
    return d_q, *(x.view(shared).sum(2).to(q.dtype) for x in (d_k, d_v))


def _efficient_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: None,
    keep: bool,
    dropout: float,
    causal: bool,
    *,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output (B, H, T, V) and log-sum-exp, (B, H, T) padded to a multiple of 32, of q and k (B, H,
    T, K).
    """
    assert q.shape == k.shape and v.shape[:3] == q.shape[:3] and q.dtype == k.dtype == v.dtype
    assert causal and keep and bias is None and dropout == 0
    scores = _causal_scores(q, k, scale)
    lse = F.pad(scores.logsumexp(-1), (0, -q.shape[2] % 32), value=torch.nan)
    seeds = (torch.zeros((), dtype=torch.int64) for _ in range(2))
    return (scores.softmax(-1) @ v.float()).to(q.dtype), lse, *seeds  # type: ignore[return-value]


def _causal_scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    T = q.shape[2]
    scores = q.float() @ k.float().mT * scale  # (B, H, T, T)
    return scores.masked_fill(~torch.ones(T, T, dtype=torch.bool).tril(), -torch.inf)


def _efficient_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: None,
    out: Tensor,
    lse: Tensor,
    *rest: Any,
    scale: float,
) -> tuple[Tensor, ...]:
    T = q.shape[2]
    assert rest[2:] == (0.0, [True, True, True, False], True) and bias is None
    assert d_out.shape == out.shape and lse.shape[2] % 32 == 0
    weights = (_causal_scores(q, k, scale) - lse[:, :, :T, None]).exp()
    grad = d_out.float()
    d_scores = weights * (grad @ v.float().mT - (grad * out.float()).sum(-1, keepdim=True)) * scale
    grads = d_scores @ k.float(), d_scores.mT @ q.float(), weights.mT @ grad
    return *(x.to(q.dtype) for x in grads), torch.zeros(0)


def _out_of_pages(
    k: Tensor, v: Tensor, q_starts: Tensor, k_starts: Tensor | None, options: Any, flash_3: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values in a row, and their starts, from pages (pages, size, G, K)."""
    used, table, B = options["seqused_k"], options["block_table"], len(q_starts) - 1
    if flash_3:
        assert k_starts is None, "If cu_seqlens_k is passed in, then page table is not supported"
    else:
        assert k_starts is not None, "both starts must be set or both not set"
        assert k_starts.dtype == torch.int32 and k_starts.shape == (B + 1,)
        assert k.shape[1] % 256 == 0, "Paged KV cache block size must be divisible by 256"
    assert table.dtype == torch.int32, "block_table must have dtype torch.int32"
    assert table.stride(-1) == 1 and len(table) == B
    assert used.dtype == torch.int32 and used.shape == (B,) and used.is_contiguous()
    assert options["num_splits"] == 1, "else a row's sums depend on the longest beside it"
    rows = [
        [part[pages.long()].flatten(0, 1)[:count] for part in (k, v)]
        for pages, count in zip(table, used.tolist(), strict=True)
    ]
    keys, values = (torch.cat(parts) for parts in zip(*rows, strict=True))
    starts = F.pad(used.cumsum(0), (1, 0)).int()
    assert k_starts is None or torch.equal(k_starts, starts)
    return keys, values, starts


@contextmanager
def reference_flash(rocm: bool = False, flash_3: bool = False) -> Iterator[Calls]:
    """Inside the block CPUs have flash attention of packed sequences; counts its calls."""
    calls = Calls()

    def sequences(*args: Any, **options: Any) -> _Sequences:
        q, k, v, q_starts, k_starts, max_q, max_k, dropout, causal = args
        assert dropout == 0 and options.get("alibi_slopes") is None
        assert (options.get("seqused_k") is None) == (options.get("block_table") is None)
        if options.get("block_table") is not None:
            calls.paged += 1
            k, v, k_starts = _out_of_pages(k, v, q_starts, k_starts, options, flash_3)
        window = tuple(
            -1 if (side := options[f"window_size_{name}"]) is None else side
            for name in ("left", "right")
        )
        scale = q.shape[2] ** -0.5 if options.get("scale") is None else options["scale"]
        return _Sequences(q, k, v, q_starts, k_starts, max_q, max_k, causal, scale, window, rocm)  # type: ignore[arg-type]

    def forward(*args: Any, **options: Any) -> tuple[Tensor, ...]:
        given = sequences(*args[:9], **options)
        calls.forward += 1
        out, lse = _forward(given)
        seeds = torch.zeros(2, dtype=torch.uint64), torch.zeros((), dtype=torch.uint64)
        return out, given.pad(lse) if rocm else lse, *seeds, torch.zeros(0)

    def backward(  # type: ignore[no-untyped-def]
        d_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        *rest: Any,
        **options: Any,
    ):
        given = sequences(q, k, v, *rest[:6], **options)
        (T, H, _), B = q.shape, len(given.q_starts) - 1
        shape = (B, H, given.max_q) if rocm else (H, T)
        assert lse.dtype == torch.float32 and lse.is_contiguous()
        assert lse.shape == shape, f"logsumexp {tuple(lse.shape)} where the kernel reads {shape}"
        calls.repeatable.append(torch.get_deterministic_debug_mode() == 2)
        return _backward(
            given, d_out.contiguous(), out.contiguous(), given.unpad(lse) if rocm else lse
        )

    def efficient_backward(*args: Any, **options: Any) -> tuple[Tensor, ...]:
        calls.repeatable.append(torch.get_deterministic_debug_mode() == 2)
        return _efficient_backward(*args, **options)

    library: Any = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    with pytest.MonkeyPatch.context() as patched:
        library.impl("_flash_attention_forward", forward, "CPU")
        library.impl("_flash_attention_backward", backward, "CPU")
        library.impl("_scaled_dot_product_efficient_attention", _efficient_forward, "CPU")
        library.impl("_scaled_dot_product_efficient_attention_backward", efficient_backward, "CPU")
        patched.setattr(kernels, "runs_flash_attention", lambda _: True)
        if rocm:
            patched.setattr(torch.version, "hip", "6.4")
        try:
            yield calls
        finally:
            library._destroy()
