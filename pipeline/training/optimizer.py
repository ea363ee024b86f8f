"""Adam over all trainable parameters as one vector, or one row per adapter: one kernel per step, few state tensors.

It calls torch's fused kernel directly: constructing torch.optim.Adam imports torch's compiler, which takes 1.4 seconds,
longer than a short run trains.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, pairwise

import torch
from torch import Tensor, nn
from torch.optim.adam import adam

from pipeline.training.distributed.collectives import all_reduce_, broadcast_

LARGEST_SCALE, GROWS_AFTER = 2.0**16, 2000  # fp16 loss scale; steps without an overflow until it doubles
NAMES = ("step", "exp_avg", "exp_avg_sq")
Moments = dict[str, Tensor]


class FlatAdam:
    """Adam (Kingma & Ba 2015) whose parameters and gradients are views into one vector each.

    Small models spend a step on kernel launches, not on arithmetic: with one vector the update, the gradient norm and
    the checkpoint take one call each, whatever the number of parameters. The vector is fp32 and 16-bit parameters are
    copies of it, since an update is often smaller than the distance to the next 16-bit number.
    LoRA+ (Hayou et al. 2024): every lora_B has `ratio` times the learning rate of the other parameters.
    With `scaled` the loss is scaled before backward, so that small gradients do not underflow in fp16; an overflow
    halves the scale and skips the step (Micikevicius et al. 2018, §3.2).
    """

    def __init__(self, model: nn.Module, scaled: bool = False, ratio: float = 1.0) -> None:
        faster = {id(p) for name, p in model.named_parameters() if ratio != 1 and name.endswith(".lora_B")}
        trainable = (p for p in model.parameters() if p.requires_grad)
        parameters = sorted(trainable, key=lambda p: (str(p.dtype), id(p) in faster))
        self._parameters = parameters
        self.weights = nn.Parameter(torch.cat([p.detach().flatten().float() for p in parameters]))
        self.weights.grad = torch.zeros_like(self.weights)
        self._low_precision_copies = list(self._lay_out(parameters))
        self._rate_spans = list(self._learning_rate_groups([ratio if id(p) in faster else 1.0 for p in parameters]))
        self._moments = Moments()
        self._scaled = scaled
        self._scale = torch.tensor([LARGEST_SCALE if scaled else 1.0, 0.0])  # factor, steps since it changed

    def _lay_out(self, trainable: list[nn.Parameter]) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Make parameters and gradients views; yields (span of the vector, copy, gradient) per 16-bit dtype."""
        assert self.weights.grad is not None
        start = 0
        for dtype, group in groupby(trainable, key=lambda p: p.dtype):
            members = list(group)
            span = slice(start, start + sum(p.numel() for p in members))
            start = span.stop
            weights, grad = self.weights.data[span], self.weights.grad[span]
            if dtype != torch.float32:
                weights, grad = weights.to(dtype), grad.to(dtype)
                yield span, weights, grad
            offset = 0
            for p in members:
                view = slice(offset, offset + p.numel())
                p.data, p.grad = weights[view].view_as(p), grad[view].view_as(p)
                offset = view.stop

    def _learning_rate_groups(self, ratios: list[float]) -> Iterator[tuple[slice, float]]:
        """(span of the vector, factor of the learning rate) for each run of parameters with the same factor."""
        start = 0
        for factor, members in groupby(zip(self._parameters, ratios, strict=True), key=lambda pair: pair[1]):
            span = slice(start, start + sum(p.numel() for p, _ in members))
            start = span.stop
            yield span, factor

    @property
    def scale(self) -> float:
        """The factor to multiply the loss by before backward."""
        return float(self._scale[0]) if self._scaled else 1.0

    @property
    def steps(self) -> int:
        """Steps taken, including those before a resume."""
        return int(self._moments.get("step", 0))

    def collect_gradients(self) -> Tensor:
        """Sum the gradients over all ranks, unscale them and return their norm. Call it once before `step`."""
        grad = self.weights.grad
        assert grad is not None
        for span, _, copy_grad in self._low_precision_copies:
            grad[span].copy_(copy_grad)
        all_reduce_(grad)
        if self._scaled:
            grad.div_(self.scale)
        norm: Tensor = grad.norm()
        return norm

    def clip(self, norm: float, largest: float) -> None:
        """Scale the gradient, whose norm is `norm`, down to norm `largest` (Pascanu et al. 2013)."""
        if norm > largest:
            assert self.weights.grad is not None
            self.weights.grad.mul_(largest / norm)

    def step(self, learning_rate: float) -> None:
        """Update the weights from the collected gradient and clear it."""
        assert self.weights.grad is not None
        self._moments = self._moments or zero_moments(self.weights.data)
        rates = ((span, learning_rate * factor) for span, factor in self._rate_spans)
        adam_step(self.weights.data, self.weights.grad, self._moments, rates)
        self._update_copies()
        self.clear()
        if self._scaled:
            self._scale[1] += 1
            if self._scale[1] >= GROWS_AFTER:
                self._scale.copy_(torch.tensor([min(2 * self.scale, LARGEST_SCALE), 0.0]))

    def skip(self) -> bool:
        """Clear a gradient that overflowed and halve the scale; False if the scale cannot be halved."""
        self.clear()
        if not self._scaled or self.scale < 2:
            return False
        self._scale.copy_(torch.tensor([self.scale / 2, 0.0]))
        return True

    def clear(self) -> None:
        assert self.weights.grad is not None
        self.weights.grad.zero_()
        for _, _, copy_grad in self._low_precision_copies:
            copy_grad.zero_()

    def tensors(self) -> list[Tensor]:
        """All its tensors: weights, gradient, 16-bit copies and, after the first step, both moments."""
        assert self.weights.grad is not None
        copies = [tensor for _, weights, grad in self._low_precision_copies for tensor in (weights, grad)]
        return [self.weights, self.weights.grad, *copies, *self._moments.values()]

    def state(self) -> dict[str, Tensor]:
        """Everything a checkpoint needs for an exact resume."""
        scale = {"loss_scale": self._scale} if self._scaled else {}
        return {"weights": self.weights.detach(), **scale, **self._moments}

    def restore(self, state: dict[str, Tensor]) -> None:
        self.set_weights(state["weights"])
        if "loss_scale" in state:
            self._scale.copy_(state["loss_scale"])
        self._moments = {name: state[name].to(self.weights.device) for name in NAMES if name in state}

    @torch.no_grad()
    def set_weights(self, weights: Tensor) -> None:
        self.weights.copy_(weights)
        self._update_copies()

    def broadcast_weights(self) -> None:
        """Start on every rank from the weights of rank 0."""
        broadcast_(self.weights.data)
        self._update_copies()

    @torch.no_grad()
    def _update_copies(self) -> None:
        for span, copies, _ in self._low_precision_copies:
            copies.copy_(self.weights.data[span])

    def trained(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Each trained parameter with its fp32 weights."""
        start = 0
        for p in self._parameters:
            yield p, self.weights.data[start : start + p.numel()].view_as(p)
            start += p.numel()


class BatchedAdam:
    """Adam (Kingma & Ba 2015) on weights (N, P): row n holds all trainable parameters of adapter n, in fp32.

    The stacked parameters (N, ...) are views of it or, in 16 bits, copies. Adam's update is computed at a learning rate
    of 1, then added to the weights at each row's rate: one kernel for all adapters, whatever their rates.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], ratios: Sequence[Tensor | float]) -> None:
        """`ratios`: for each parameter the factor of its learning rate, per adapter (N,) or one for all."""
        self._parameters = list(parameters)
        sizes = [p[0].numel() for p in self._parameters]
        offsets = torch.tensor([0, *sizes]).cumsum(0).tolist()
        self._spans = [slice(*bounds) for bounds in pairwise(offsets)]
        self.weights = torch.cat([p.detach().flatten(1).float() for p in self._parameters], 1)
        self._ratios = self._expand_ratios(ratios)
        self._adam_update = torch.zeros_like(self.weights)
        self.gradient = torch.zeros_like(self.weights)  # (N, P), once collected
        self._moments = Moments()
        self._is_fp32 = all(p.dtype == torch.float32 for p in self._parameters)
        for p, span in zip(self._parameters, self._spans, strict=True):
            if p.dtype == torch.float32:
                p.data = self.weights[:, span].view(p.shape)
        self.clear()

    def _expand_ratios(self, ratios: Sequence[Tensor | float]) -> Tensor | None:
        """(N, P), or None if all ratios are 1."""
        factors = [torch.as_tensor(ratio, device=self.weights.device) for ratio in ratios]
        if all(bool((ratio == 1).all()) for ratio in factors):
            return None
        columns = [
            ratio.expand(len(self.weights))[:, None].expand(-1, p[0].numel())
            for ratio, p in zip(factors, self._parameters, strict=True)
        ]
        return torch.cat(columns, 1).to(self.weights.dtype)

    @property
    def steps(self) -> int:
        return int(self._moments.get("step", 0))

    def collect_gradients(self) -> Tensor:
        """Collect the gradients of backward; returns their norm per adapter (N,). Call it once before `step`."""
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._parameters]
        rows = [grad.view(len(grad), -1) for grad in grads]
        torch.cat(rows if self._is_fp32 else [grad.float() for grad in rows], 1, out=self.gradient)
        self.clear()
        norms: Tensor = self.gradient.norm(dim=1)
        return norms

    def scale(self, factors: Sequence[float]) -> None:
        """Multiply each adapter's gradient by its factor; a factor of 0 also clears values that are not finite."""
        factor = self.weights.new_tensor(factors)[:, None]
        self.gradient.mul_(factor).masked_fill_(factor == 0, 0)

    @torch.no_grad()
    def step(self, rates: Sequence[float]) -> None:
        """Update the weights from the collected gradients, each adapter at its learning rate."""
        self._moments = self._moments or zero_moments(self.weights)
        adam_step(self._adam_update, self.gradient, self._moments, [(slice(None), 1.0)])
        rate = self.weights.new_tensor(rates)[:, None]
        self.weights.addcmul_(self._adam_update, rate if self._ratios is None else rate * self._ratios)
        self._adam_update.zero_()
        self._update_copies()

    def clear(self) -> None:
        for p in self._parameters:
            p.grad = None

    @torch.no_grad()
    def set_weights(self, weights: Tensor) -> None:
        self.weights.copy_(weights)
        self._update_copies()

    def _update_copies(self) -> None:
        for p, span in zip(self._parameters, self._spans, strict=True) if not self._is_fp32 else ():
            if p.dtype != torch.float32:
                p.data.copy_(self.weights[:, span].view(p.shape))

    def tensors(self) -> list[Tensor]:
        """All its tensors."""
        ratios = [] if self._ratios is None else [self._ratios]
        return [self.weights, self._adam_update, self.gradient, *ratios, *self._moments.values()]

    def state(self) -> dict[str, Tensor]:
        """Everything a checkpoint needs for an exact resume."""
        return {"weights": self.weights, **self._moments}

    def restore(self, state: dict[str, Tensor]) -> None:
        self.set_weights(state["weights"])
        self._moments = {name: state[name].to(self.weights.device) for name in NAMES if name in state}


def zero_moments(weights: Tensor) -> Moments:
    """Adam's state before the first step: step count and both moments, all zero."""
    zeros = torch.zeros_like(weights)
    return dict(zip(NAMES, (torch.zeros((), device=weights.device), zeros, zeros.clone()), strict=True))


@torch.no_grad()
def adam_step(weights: Tensor, gradient: Tensor, moments: Moments, rates: Iterable[tuple[slice, float]]) -> None:
    """One step of Adam (Kingma & Ba 2015), in place. `rates`: spans of `weights` and their learning rates."""
    for span, rate in rates:
        mean, square = ([moments[name][span]] for name in NAMES[1:])
        step = [moments["step"].clone()]
        adam(
            [weights[span]],
            [gradient[span]],
            mean,
            square,
            [],
            step,
            fused=True,
            lr=rate,
            beta1=0.9,
            beta2=0.999,
            eps=1e-8,
            weight_decay=0,
            amsgrad=False,
            maximize=False,
        )
    moments["step"] += 1
