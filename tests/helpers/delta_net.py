"""Gated delta nets with stand-ins that allocate what the kernels of flash-linear-attention and
causal-conv1d do.
"""

from typing import Any

import pytest
import torch


def use_delta_net_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Qwen3.5 runs with the stand-ins: the fallbacks of transformers need far more."""
    from transformers.models.qwen3_5 import modeling_qwen3_5
    from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe

    delta, convolution = _kernel(GatedDeltaRule), _kernel(Convolution)
    for module in (modeling_qwen3_5, modeling_qwen3_5_moe):
        monkeypatch.setattr(
            module,
            "torch_chunk_gated_delta_rule",
            lambda *qkv, g, beta, **_: (delta(*qkv, g, beta), None),
        )
        monkeypatch.setattr(module, "causal_conv1d_fn", lambda x, *_, **__: convolution(x))


def _kernel(function: Any) -> Any:
    return function.apply


class GatedDeltaRule(torch.autograd.Function):
    """fla-core 0.6.0's chunk_gated_delta_rule by size alone: what it saves, and what lives beside
    it.
    """

    @staticmethod
    def forward(ctx: Any, q: Any, k: Any, v: Any, g: Any, beta: Any) -> Any:
        q, k, v = (torch.empty_like(x.contiguous()) for x in (q, k, v))
        (batch, length, _, size), (heads, width) = k.shape, v.shape[2:]
        chunks = v.new_empty(batch, length, heads, 64)
        w, u, new = (
            v.new_empty(batch, length, heads, size),
            torch.empty_like(v),
            torch.empty_like(v),
        )
        states = v.new_empty(batch, -(-length // 64), heads, size, width)
        ctx.save_for_backward(q, k, v, torch.empty_like(g), beta, chunks)
        out = torch.empty_like(v)
        del w, u, new, states
        return out

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        q, _k, v, g, beta, _chunks = ctx.saved_tensors
        (batch, length, keys, size), (heads, width) = q.shape, v.shape[2:]
        alive = [v.new_empty(batch, -(-length // 64), heads, size, width) for _ in range(2)]
        alive += [torch.empty_like(v) for _ in range(4)]
        alive += [v.new_empty(batch, length, heads, size) for _ in range(5)]
        dq, dk = (x[:, :, :keys].contiguous() for x in alive[-2:])
        return dq, dk, torch.empty_like(v), torch.empty_like(g), torch.empty_like(beta)


class Convolution(torch.autograd.Function):
    """causal-conv1d by size alone."""

    @staticmethod
    def forward(ctx: Any, x: Any) -> Any:
        ctx.save_for_backward(x)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        return torch.empty_like(ctx.saved_tensors[0])
