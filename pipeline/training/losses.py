"""Three ways to the same loss, by how many logits are alive at once: N·V of them are often the step's peak."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Head = Callable[[Tensor], Tensor]


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
    chosen, wanted = _selected(hidden, positions), labels.flatten()[positions]
    loss: Tensor = _Chunked.apply(chosen, wanted, head, size, *trained)  # type: ignore[no-untyped-call]
    return loss


class _Chunked(torch.autograd.Function):
    """Cross-entropy whose gradients are taken in forward, chunk by chunk, so that no logits wait for backward."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, labels: Tensor, head: Head, size: int, *trained: nn.Parameter) -> Tensor:
        loss = hidden.new_zeros((), dtype=torch.float32)
        grads: list[Tensor] = []
        parts = []
        for rows, wanted in zip(hidden.detach().split(size), labels.split(size), strict=True):  # type: ignore[no-untyped-call]
            rows.requires_grad_(True)
            with torch.enable_grad():
                part = F.cross_entropy(head(rows).float(), wanted, reduction="sum") / len(labels)
            of_rows, *of_trained = torch.autograd.grad(part, [rows, *trained])
            parts.append(of_rows)
            if grads:
                torch._foreach_add_(grads, of_trained)
            grads = grads or of_trained
            loss += part.detach()
            del part, of_trained  # the next chunk's logits and gradients must not find these alive
        ctx.save_for_backward(torch.cat(parts), *grads)
        return loss

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        # a loss scale is larger than fp16 holds: it multiplies as the fp32 scalar that it is
        of_hidden, *of_trained = (grad.mul_(outputs[0]) for grad in ctx.saved_tensors)
        return of_hidden, None, None, None, *of_trained


def _selected(hidden: Tensor, positions: Tensor) -> Tensor:
    return hidden.flatten(0, 1).index_select(0, positions)  # (N, D)
