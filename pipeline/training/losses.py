"""Losses by how many logits are alive at once: N·V of them are often the step's peak."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Head = Callable[[Tensor], Tensor]
Part = Callable[[Tensor, Tensor], Tensor]  # rows (n, D) and what is wanted of each (n, ...) → the sum of their losses
CHUNK = 128  # rows whose logits are alive at once


def full(head: Head, hidden: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy with the logits of every token at once: hidden (B, T, D), labels (B, T)."""
    return F.cross_entropy(head(hidden).float().flatten(0, 1), labels.flatten())


def at_labels(head: Head, hidden: Tensor, labels: Tensor, positions: Tensor) -> Tensor:
    """The same over `positions` (N,) of the flattened tokens alone: no logits where no label stands."""
    return F.cross_entropy(head(_selected(hidden, positions)).float(), labels.flatten()[positions])


def chunked(
    head: Head, hidden: Tensor, labels: Tensor, positions: Tensor, size: int, trained: Sequence[nn.Parameter] = ()
) -> Tensor:
    """The same, `size` labels at a time. `trained`: the head's parameters that want a gradient.

    Their gradients are added up at their own precision: in bf16, small chunks cost digits.
    """
    return mean_of(cross_entropy(head), _selected(hidden, positions), labels.flatten()[positions], size, trained)


def cross_entropy(head: Head) -> Part:
    """Of the labels that are wanted."""
    return lambda rows, labels: F.cross_entropy(head(rows).float(), labels, reduction="sum")


def divergence(head: Head, reference: Head) -> Part:
    """KL(p‖q) in nats: q what `head` makes of the rows, p what `reference` makes of the rows that are wanted."""

    def part(rows: Tensor, wanted: Tensor) -> Tensor:
        with torch.no_grad():
            log_p = reference(wanted).float().log_softmax(-1)
        loss: Tensor = _Divergence.apply(head(rows), log_p)  # type: ignore[no-untyped-call]
        return loss

    return part


class _Divergence(torch.autograd.Function):
    """Σ p·(log p − log q) over rows of logits (n, V), q their softmax; its gradient is q − p, all that is kept."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, log_p: Tensor) -> Tensor:
        log_q = logits.float().log_softmax(-1)
        p = log_p.exp()
        loss = torch.dot(p.flatten(), log_p.sub_(log_q).flatten())
        ctx.save_for_backward(log_q.exp_().sub_(p).to(logits.dtype))
        return loss

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, None]:
        (grad,) = ctx.saved_tensors
        return grad * outputs[0].to(grad.dtype), None


def mean_of(
    part: Part, rows: Tensor, wanted: Tensor, size: int = CHUNK, trained: Sequence[nn.Parameter] = ()
) -> Tensor:
    """The mean over rows (N, D) of what `part` sums up, `size` rows at a time."""
    if len(rows) <= size:
        return part(rows, wanted) / len(rows)
    loss: Tensor = _Chunked.apply(rows, wanted, part, size, *trained)  # type: ignore[no-untyped-call]
    return loss


class _Chunked(torch.autograd.Function):
    """A mean whose gradients are taken in forward, chunk by chunk, so that no logits wait for backward."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, wanted: Tensor, part: Part, size: int, *trained: nn.Parameter) -> Tensor:
        loss = hidden.new_zeros((), dtype=torch.float32)
        grads: list[Tensor] = []
        parts = []
        for rows, wants in zip(hidden.detach().split(size), wanted.split(size), strict=True):  # type: ignore[no-untyped-call]
            rows.requires_grad_(True)
            with torch.enable_grad():
                one = part(rows, wants)  # divided at the end: the gradients of a mean can be too small for fp16
            of_rows, *of_trained = torch.autograd.grad(one, [rows, *trained])
            parts.append(of_rows)
            if grads:
                torch._foreach_add_(grads, of_trained)
            grads = grads or of_trained
            loss += one.detach() / len(hidden)
            del one, of_trained  # the next chunk's logits and gradients must not find these alive
        ctx.save_for_backward(torch.cat(parts), *grads)
        ctx.rows = len(hidden)
        return loss

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        # a loss scale is larger than fp16 holds: it multiplies as the fp32 scalar that it is
        of_hidden, *of_trained = (grad.mul_(outputs[0] / ctx.rows) for grad in ctx.saved_tensors)
        return of_hidden, None, None, None, *of_trained


def _selected(hidden: Tensor, positions: Tensor) -> Tensor:
    return hidden.flatten(0, 1).index_select(0, positions)  # (N, D)
