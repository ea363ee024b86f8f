"""The call of `flash-attn`, which needs a GPU: its documented meaning, computed in plain torch,
stands in for it.
"""

import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.models.kernels import flash
from pipeline.models.kernels.packed_attention import attend
from pipeline.models.kernels.plain_attention import Rule


def documented(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_starts: Tensor,
    k_starts: Tensor,
    longest: int,
    longest_keys: int,
    **options: Any,
) -> Tensor:
    """flash_attn_varlen_func as its docstring has it: q (ΣT, H, K), k and v (ΣS, G, K)."""
    assert q_starts.dtype == k_starts.dtype == torch.int32 and options["deterministic"]
    assert longest == int(q_starts.diff().max()) and longest_keys == int(k_starts.diff().max())
    left, right = options["window_size"]
    parts = []
    for n in range(len(q_starts) - 1):
        own, keys, values = (
            x[s[n] : s[n + 1]] for x, s in ((q, q_starts), (k, k_starts), (v, k_starts))
        )
        T, S, R = len(own), len(keys), q.shape[1] // k.shape[1]
        scores = (
            torch.einsum("thk,shk->hts", own, keys.repeat_interleave(R, 1))
            * options["softmax_scale"]
        )
        if options["softcap"] > 0:
            scores = torch.tanh(scores / options["softcap"]) * options["softcap"]
        i, j = torch.arange(T)[:, None] + S - T, torch.arange(S)[None]
        seen = (
            (j <= i + right)
            & ((j >= i - left) if left >= 0 else True)
            & ((j <= i) if options["causal"] else True)
        )
        weights = scores.masked_fill(~seen, -math.inf).softmax(-1)
        parts.append(torch.einsum("hts,shk->thk", weights, values.repeat_interleave(R, 1)))
    return torch.cat(parts)


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(
        __import__("sys").modules, "flash_attn", SimpleNamespace(flash_attn_varlen_func=documented)
    )
    flash._flash_attention.cache_clear()
    yield
    flash._flash_attention.cache_clear()


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (4, None), (None, 3.0), (3, 2.0)])
@pytest.mark.parametrize("before", [0, 2])
def test_it_computes_each_sequence_as_this_projects_attention_does(
    before: int, window: int | None, softcap: float | None
) -> None:
    """`before`: keys of each sequence that come before its queries, as with a cache."""
    torch.manual_seed(0)
    lengths = [5, 9, 1]
    spans = [length + before for length in lengths]
    q, k, v = (
        torch.randn(1, 4, sum(lengths), 8),
        *(torch.randn(1, 2, sum(spans), 8) for _ in range(2)),
    )
    found = flash.flash_attention(q, k, v, lengths, spans, Rule(0.3, window, softcap))
    each = ((q, lengths), (k, spans), (v, spans))
    parts = zip(*(x.split_with_sizes(sizes, 2) for x, sizes in each), strict=True)
    module: Any = SimpleNamespace(training=False, layer_idx=0)
    expected = [
        attend(module, a, b, c, None, scaling=0.3, sliding_window=window, softcap=softcap)[0]
        for a, b, c in parts
    ]
    torch.testing.assert_close(found, torch.cat(expected, 1), rtol=1e-5, atol=1e-5)


def test_rows_are_sequences_of_their_own() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(3, 2, 6, 8) for _ in range(3))
    found = flash.flash_attention(q, k, v, [6], [6], Rule(0.3))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3)
    torch.testing.assert_close(found, expected.transpose(1, 2), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_cpu_has_no_use_for_it(device: str) -> None:
    q = torch.zeros(1, 2, 3, 8, dtype=torch.bfloat16, device=device)
    assert not flash.supports_flash(q, q)


@pytest.mark.parametrize(
    ("dtype", "size", "values", "supported"),
    [
        (torch.bfloat16, 64, 64, True),
        (torch.float16, 256, 256, True),
        (torch.float32, 64, 64, False),
        (torch.bfloat16, 12, 12, False),
        (torch.bfloat16, 192, 128, False),
    ],
    ids=str,
)
def test_a_gpu_has_it_for_16_bits_and_some_head_sizes(
    dtype: torch.dtype, size: int, values: int, supported: bool
) -> None:
    """`meta` counts as an Ampere GPU."""
    q: Any = SimpleNamespace(
        is_cuda=True, dtype=dtype, shape=(1, 2, 3, size), device=torch.device("meta")
    )
    v: Any = SimpleNamespace(shape=(1, 1, 3, values))
    assert flash.supports_flash(q, v) == supported
