"""Head and cross-entropy in one: a chunk's logits become their own gradient.

A chunk takes three calls, and the host waits for none: the logits' product, a Triton kernel on them
(triton_kernels.py) and the product of the rows' gradients. Liger's fused loss, which stood here
before, waits twice a micro-batch and cuts the rows in chunks of a model's width: of 8 rows for
Qwen3-0.6B, whose head is then read 164 times for 652 labels.
"""

from functools import cache
from importlib.util import find_spec
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.calc.settings import chunk_rows
from pipeline.models.base import CausalLM
from pipeline.models.kernels import random_tensors
from pipeline.project.probes import attempt, record

AGREEMENT = 0.02  # of a loss: logits in 16 bits are rounded in another order
COLUMNS = 4096  # of a row of logits that a program has at once
_fused: WeakKeyDictionary[CausalLM, bool] = WeakKeyDictionary()  # results of _same_loss


def fuses_head(model: CausalLM) -> bool:
    """Whether `fused_cross_entropy` computes the head and its loss.

    Not for a head that trains, has an adapter or a bias, or does more to its logits than to cap
    them.
    """
    head = model.head
    if model.device.type != "cuda" or not _has_triton() or type(head) is not nn.Linear:
        return False
    if head.bias is not None or head.weight.requires_grad:
        return False
    if model not in _fused:  # once a model
        _fused[model] = _same_loss(model)
    return _fused[model]


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def fused_cross_entropy(model: CausalLM, rows: Tensor, labels: Tensor) -> Tensor:
    """The mean cross-entropy of rows (N, D) with labels (N,), where `fuses_head`."""
    loss: Tensor = _HeadAndLoss.apply(rows, model.head.weight, labels, model.logit_cap)  # type: ignore[no-untyped-call]
    return loss


class _HeadAndLoss(torch.autograd.Function):
    """The gradient of the rows is computed in forward, so that no logits wait for backward."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, labels: Tensor, cap: float | None
    ) -> Tensor:
        losses = rows.new_empty(len(rows), dtype=torch.float32)
        gradient = torch.empty_like(rows) if ctx.needs_input_grad[0] else None
        size = min(len(rows), chunk_rows(len(weight)))
        room = rows.new_empty(size, len(weight))
        for start in range(0, len(rows), size):
            part = slice(start, start + size)
            logits = room[: len(rows[part])]
            torch.mm(rows[part], weight.t(), out=logits)
            row_losses(logits, labels[part], losses[part], cap, gradient is not None)
            if gradient is not None:
                torch.mm(logits, weight, out=gradient[part])
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return losses.mean()

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        # a loss scale may overflow fp16: it is applied as an fp32 scalar
        return gradient.mul_(outputs[0] / len(gradient)), None, None, None


def row_losses(
    logits: Tensor, labels: Tensor, losses: Tensor, cap: float | None, gradient: bool
) -> None:
    """Write each row's cross-entropy of logits (n, V) to `losses` (n,), in fp32.

    With `gradient` the logits are overwritten by theirs.
    """
    from pipeline.models.kernels.accelerator.triton_kernels import cross_entropy

    n, V = logits.shape
    columns = min(COLUMNS, 1 << (V - 1).bit_length())
    cross_entropy[(n,)](logits, labels, losses, V, float(cap or 0), gradient, columns, num_warps=8)


@torch.no_grad()
def _same_loss(model: CausalLM) -> bool:
    weight = model.head.get_parameter("weight")
    rows = random_tensors((4, weight.shape[1]))[0].to(weight)
    labels = torch.arange(4, device=weight.device)
    expected = F.cross_entropy(model.logits(rows).float(), labels)
    tried, slower = "head and loss in one", "they are computed one after the other"
    actual = attempt(tried, slower, lambda: fused_cross_entropy(model, rows, labels))
    if actual is None:
        return False
    if torch.allclose(actual, expected, AGREEMENT):
        return True
    record(tried, f"a loss of {actual:.4g} instead of {expected:.4g}", slower)
    return False
