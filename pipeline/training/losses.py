"""Losses of hidden states, in chunks: all N·V logits at once are often a step's peak of memory."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.calc.settings import chunk_rows
from pipeline.models.kernels import uses_cpu_kernels

if TYPE_CHECKING:
    from pipeline.models.base import CausalLM

Head = Callable[[Tensor], Tensor]
# rows (n, D) and their targets (n, ...) → the sum of their losses
SummedLoss = Callable[[Tensor, Tensor], Tensor]
# Rows whose logits a CPU computes at once, at most. For 236 to 323 labels, SmolLM2's head and loss
# take 1.09 × as long in chunks of 128 rows and a rest, 1.27 × in chunks of 64.
CHUNK = 192


def trained_head(model: "CausalLM") -> list[nn.Parameter]:
    """The head's parameters that require a gradient."""
    return [p for p in model.head.parameters() if p.requires_grad]


def chunk_of(model: "CausalLM", rows: int, device: torch.device | None = None) -> int:
    """How many of `rows` have their logits in memory at once; the calculator has the same rule.

    A CPU gets equal parts: its products of few rows take long. `device`: None for the model's,
    whose look-up takes 10 µs, and MiniGPT's step 1.5 ms.
    """
    if not uses_cpu_kernels(device or model.device):
        return chunk_rows(model.shape.rows)
    return -(-rows // -(-rows // CHUNK)) if rows else CHUNK


def fuses_head(model: "CausalLM") -> bool:
    """Whether a kernel computes the head and its loss in one."""
    if uses_cpu_kernels(model.device):
        return False
    # a run on a CPU does not load it
    from pipeline.models.kernels.accelerator.loss import fuses_head

    return fuses_head(model)


def mean_cross_entropy(
    model: "CausalLM", rows: Tensor, labels: Tensor, chunk: int | None = None
) -> Tensor:
    """The mean cross-entropy of hidden states (N, D) with labels (N,), in nats per token.

    `chunk`: rows whose logits are computed at once; None: as many as suit the device, or all by
    a kernel.
    """
    if chunk is None and not uses_cpu_kernels(rows.device) and fuses_head(model):
        from pipeline.models.kernels.accelerator.loss import fused_cross_entropy

        return fused_cross_entropy(model, rows, labels)
    return mean_loss(model, cross_entropy(model.logits), rows, labels, chunk)


def mean_loss(
    model: "CausalLM",
    summed_loss: SummedLoss,
    rows: Tensor,
    targets: Tensor,
    size: int | None = None,
) -> Tensor:
    """`chunked_mean` over hidden states of `model`; without a `size`, that of `chunk_of`."""
    size = size or chunk_of(model, len(rows), rows.device)
    trained = trained_head(model) if len(rows) > size else ()
    return chunked_mean(summed_loss, rows, targets, size, trained)


def cross_entropy(head: Head) -> SummedLoss:
    """The summed cross-entropy of the rows with labels (n,)."""

    def summed_loss(rows: Tensor, labels: Tensor) -> Tensor:
        logits = head(rows)
        if logits.dtype != torch.bfloat16:
            return F.cross_entropy(logits.float(), labels, reduction="sum")
        return _row_losses(logits, labels).sum()

    return summed_loss


def _row_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """The cross-entropy of each row of logits (n, V) with its label, (n,) in fp32."""
    if logits.dtype != torch.bfloat16:
        return F.cross_entropy(logits.float(), labels, reduction="none")
    from pipeline.models.kernels.cross_entropy import cross_entropy  # MiniGPT does not need it

    return cross_entropy(logits, labels)


def divergence(head: Head, reference: Head) -> SummedLoss:
    """The summed KL(p‖q) in nats: p = softmax(reference(targets)), q = softmax(head(rows)).

    `targets` are hidden states (n, D).
    """

    def summed_loss(rows: Tensor, targets: Tensor) -> Tensor:
        with torch.no_grad():
            log_p = reference(targets).float().log_softmax(-1)
        loss: Tensor = _Divergence.apply(head(rows), log_p)  # type: ignore[no-untyped-call]
        return loss

    return summed_loss


class _Divergence(torch.autograd.Function):
    """Σ p·(log p − log q) over rows of logits (n, V), q their softmax.

    Its gradient is q − p, the only tensor saved.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, log_p: Tensor) -> Tensor:
        # in place where it can: (n, V) in fp32 is the largest tensor of a step
        log_q = logits.float().log_softmax(-1)  # (n, V)
        p = log_p.exp()
        # one call, with no product (n, V)
        loss = torch.dot(p.flatten(), log_p.sub_(log_q).flatten())
        ctx.save_for_backward(log_q.exp_().sub_(p).to(logits.dtype))
        return loss

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, None]:
        (grad,) = ctx.saved_tensors
        return grad * outputs[0].to(grad.dtype), None


def chunked_mean(
    summed_loss: SummedLoss,
    rows: Tensor,
    targets: Tensor,
    size: int,
    trained: Sequence[nn.Parameter] = (),
) -> Tensor:
    """The mean loss over rows (N, D), `size` rows at a time.

    `summed_loss` gives the sum over a chunk. `trained`: the head's parameters that require a
    gradient, which is accumulated in their own dtype: in bf16, small chunks lose precision.
    """
    if len(rows) <= size:
        return summed_loss(rows, targets) / len(rows)
    loss: Tensor = _Chunked.apply(rows, targets, summed_loss, size, *trained)  # type: ignore[no-untyped-call]
    return loss


class _Chunked(torch.autograd.Function):
    """A mean whose gradients are computed in forward, so that no logits wait for backward.

    Checkpointing each chunk would keep none either, but autograd then sums the head's gradients of
    all chunks at the end: three copies of what is often the model's largest matrix.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        targets: Tensor,
        summed_loss: SummedLoss,
        size: int,
        *trained: nn.Parameter,
    ) -> Tensor:
        loss = hidden.new_zeros((), dtype=torch.float32)
        grads: list[Tensor] = []
        row_grads = []
        for rows, target in zip(hidden.detach().split(size), targets.split(size), strict=True):  # type: ignore[no-untyped-call]
            rows.requires_grad_(True)
            with torch.enable_grad():
                # divided at the end: gradients of a mean can underflow in fp16
                loss_sum = summed_loss(rows, target)
            row_grad, *trained_grads = torch.autograd.grad(loss_sum, [rows, *trained])
            row_grads.append(row_grad)
            if grads:
                torch._foreach_add_(grads, trained_grads)
            grads = grads or trained_grads
            loss += loss_sum.detach() / len(hidden)
            # freed before the next chunk's logits and gradients are allocated
            del loss_sum, trained_grads
        ctx.save_for_backward(torch.cat(row_grads), *grads)
        ctx.rows = len(hidden)
        return loss

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        # a loss scale may overflow fp16: it is applied as an fp32 scalar
        hidden_grad, *trained_grads = (
            grad.mul_(outputs[0] / ctx.rows) for grad in ctx.saved_tensors
        )
        return hidden_grad, None, None, None, *trained_grads


def log_probs(
    head: Head, rows: Tensor, labels: Tensor, size: int, trained: Sequence[nn.Parameter] = ()
) -> Tensor:
    """The log-probability of each label (N,) after its row (N, D): (N,) in fp32.

    Logits are computed `size` rows at a time. `trained`: the head's parameters that require a
    gradient.
    """
    result: Tensor = _LogProbs.apply(rows, labels, head, size, *trained)  # type: ignore[no-untyped-call]
    return result


class _LogProbs(torch.autograd.Function):
    """The log-probabilities of labels, whose logits are computed in chunks.

    Unlike in `_Chunked`, the factor of each row's gradient is known only in backward. With a frozen
    head the rows' gradients are kept, which are as large as the rows. A head that trains is
    computed once more.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, labels: Tensor, head: Head, size: int, *trained: nn.Parameter
    ) -> Tensor:
        ctx.head, ctx.size, ctx.trained = head, size, trained
        needs_rows = hidden.requires_grad and not trained
        losses, grads = list[Tensor](), list[Tensor]()
        for rows, label in zip(hidden.detach().split(size), labels.split(size), strict=True):  # type: ignore[no-untyped-call]
            with torch.set_grad_enabled(needs_rows):
                loss = _row_losses(head(rows.requires_grad_(needs_rows)), label)
                grads += torch.autograd.grad(loss.sum(), [rows]) if needs_rows else ()
            losses.append(loss.detach())
        ctx.save_for_backward(torch.cat(grads) if needs_rows else hidden, labels)
        return -torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        saved, labels = ctx.saved_tensors
        upstream = -outputs[0]
        if not ctx.trained:
            return saved.mul_(upstream[:, None]), None, None, None
        row_grads, sums = [], list[Tensor]()
        chunks = [tensor.detach().split(ctx.size) for tensor in (saved, labels, upstream)]
        for rows, label, loss_grads in zip(*chunks, strict=True):
            with torch.enable_grad():
                losses = _row_losses(ctx.head(rows.requires_grad_(True)), label)
                total = torch.dot(losses, loss_grads)
            row_grad, *grads = torch.autograd.grad(total, [rows, *ctx.trained])
            row_grads.append(row_grad)
            if sums:
                torch._foreach_add_(sums, grads)
            sums = sums or grads
            del losses, total, grads
        return torch.cat(row_grads), None, None, None, *sums
