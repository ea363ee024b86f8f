"""Gradients of attention on a GPU that are the same each time.

The backward of torch's fused kernels adds up in the order in which their blocks end, unless
deterministic algorithms are on where it is called. They cannot be on for a whole step: an operation
without one then raises, and so does every product unless CUBLAS_WORKSPACE_CONFIG is set. If torch
only warns of these, it does not make the kernels deterministic either. So the algorithms are on for
the calls of these kernels alone (docs/decisions/0024).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_efficient_attention
from torch.utils import deterministic

_aten = torch.ops.aten
_settings: Any = deterministic  # a module with a property, which type checkers do not see


@contextmanager
def repeatable() -> Iterator[None]:
    """torch's deterministic algorithms, without the filling of new tensors that they bring."""
    mode, fill = torch.get_deterministic_debug_mode(), _settings.fill_uninitialized_memory
    torch.set_deterministic_debug_mode("error")
    _settings.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)
        _settings.fill_uninitialized_memory = fill


def supports_repeatable(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether there will be a backward on CUDA, and `RepeatableAttention` computes it."""
    trains = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if not trains or not q.is_cuda:
        return False
    return can_use_efficient_attention(SDPAParams(q[:, : k.shape[1]], k, v, None, 0.0, True, False))


class RepeatableAttention(torch.autograd.Function):
    """Causal attention of q, k (B, H, T, K) and v (B, H, T, V).

    torch's memory-efficient kernel computes it, in every precision and for V other than K.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        out: Tensor
        out, *others = _aten._scaled_dot_product_efficient_attention(
            q, k, v, None, True, 0.0, True, scale=scale
        )
        ctx.save_for_backward(q, k, v, out, *others)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *others = ctx.saved_tensors
        needed = [*ctx.needs_input_grad[:3], False]
        with repeatable():
            d_q, d_k, d_v, _ = _aten._scaled_dot_product_efficient_attention_backward(
                outputs[0], q, k, v, None, *others, 0.0, needed, True, scale=ctx.scale
            )
        return d_q, d_k, d_v, None
