"""Adam over all that trains as one vector, or a row for each of many adapters: one kernel a step, few tensors of state.

The kernel is torch's fused one, not torch.optim.Adam, whose construction imports torch's compiler: 1.4 seconds, longer
than a short run trains.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, pairwise

import torch
from torch import Tensor, nn
from torch.optim.adam import adam

from pipeline.training.distributed.collectives import all_reduce_, broadcast_

LARGEST_SCALE, GROWS_AFTER = 2.0**16, 2000  # of an fp16 loss; steps without an overflow until it doubles
NAMES = ("step", "exp_avg", "exp_avg_sq")
Moments = dict[str, Tensor]


class FlatAdam:
    """Adam (Kingma & Ba 2015) whose parameters and gradients are views into one vector each.

    Small models spend their step on calls, not on arithmetic: one vector makes the update, the gradient's
    norm and the checkpoint one call each, whatever the number of parameters. The vector is fp32: 16-bit parameters are
    copies of it, since an update is often smaller than the distance to the next 16-bit number.
    LoRA+ (Hayou et al. 2024): each B's learning rate is `ratio` times that of all else.
    With `scaled` the loss is multiplied before backward, so that small gradients survive fp16; an overflow halves the
    factor and skips the step (Micikevicius et al. 2018, §3.2).
    """

    def __init__(self, model: nn.Module, scaled: bool = False, ratio: float = 1.0) -> None:
        faster = {id(p) for name, p in model.named_parameters() if ratio != 1 and name.endswith(".lora_B")}
        found = (p for p in model.parameters() if p.requires_grad)
        trainable = sorted(found, key=lambda p: (str(p.dtype), id(p) in faster))
        self._parameters = trainable
        self.weights = nn.Parameter(torch.cat([p.detach().flatten().float() for p in trainable]))
        self.weights.grad = torch.zeros_like(self.weights)
        self._copies = list(self._lay_out(trainable))
        self._parts = list(self._of_one_rate([ratio if id(p) in faster else 1.0 for p in trainable]))
        self._moments = Moments()
        self._scaled = scaled
        self._scale = torch.tensor([LARGEST_SCALE if scaled else 1.0, 0.0])  # factor, steps since it changed

    def _lay_out(self, trainable: list[nn.Parameter]) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Make parameters and gradients views; yields (place in the vector, copies, their gradients) a 16-bit dtype."""
        assert self.weights.grad is not None
        start = 0
        for dtype, group in groupby(trainable, key=lambda p: p.dtype):
            members = list(group)
            place = slice(start, start + sum(p.numel() for p in members))
            start = place.stop
            weights, grad = self.weights.data[place], self.weights.grad[place]
            if dtype != torch.float32:
                weights, grad = weights.to(dtype), grad.to(dtype)
                yield place, weights, grad
            offset = 0
            for p in members:
                view = slice(offset, offset + p.numel())
                p.data, p.grad = weights[view].view_as(p), grad[view].view_as(p)
                offset = view.stop

    def _of_one_rate(self, ratios: list[float]) -> Iterator[tuple[slice, float]]:
        """(place in the vector, by what the learning rate is multiplied there)."""
        start = 0
        for times, members in groupby(zip(self._parameters, ratios, strict=True), key=lambda pair: pair[1]):
            place = slice(start, start + sum(p.numel() for p, _ in members))
            start = place.stop
            yield place, times

    @property
    def scale(self) -> float:
        """What the loss is to be multiplied by before backward."""
        return float(self._scale[0]) if self._scaled else 1.0

    @property
    def steps(self) -> int:
        """How many have been taken, those of the run before a resume too."""
        return int(self._moments.get("step", 0))

    def collect_gradients(self) -> Tensor:
        """The norm of the gradient that backward left, in all processes; to be called once before `step`."""
        grad = self.weights.grad
        assert grad is not None
        for place, _, of_copies in self._copies:
            grad[place].copy_(of_copies)
        all_reduce_(grad)
        if self._scaled:
            grad.div_(self.scale)
        norm: Tensor = grad.norm()
        return norm

    def clip(self, norm: float, largest: float) -> None:
        """Shorten the gradient, whose norm is `norm`, to `largest` (Pascanu et al. 2013)."""
        if norm > largest:
            assert self.weights.grad is not None
            self.weights.grad.mul_(largest / norm)

    def step(self, learning_rate: float) -> None:
        """Update from the gathered gradient and clear it."""
        assert self.weights.grad is not None
        self._moments = self._moments or moments_before(self.weights.data)
        rates = ((place, learning_rate * times) for place, times in self._parts)
        update(self.weights.data, self.weights.grad, self._moments, rates)
        self._publish()
        self.clear()
        if self._scaled:
            self._scale[1] += 1
            if self._scale[1] >= GROWS_AFTER:
                self._scale.copy_(torch.tensor([min(2 * self.scale, LARGEST_SCALE), 0.0]))

    def skip(self) -> bool:
        """Clear a gradient that overflowed and halve the scale; False where there is none left to halve."""
        self.clear()
        if not self._scaled or self.scale < 2:
            return False
        self._scale.copy_(torch.tensor([self.scale / 2, 0.0]))
        return True

    def clear(self) -> None:
        assert self.weights.grad is not None
        self.weights.grad.zero_()
        for _, _, of_copies in self._copies:
            of_copies.zero_()

    def tensors(self) -> list[Tensor]:
        """All that it holds: weights, gradient, 16-bit copies and, after the first step, both moments."""
        assert self.weights.grad is not None
        copies = [tensor for _, weights, grad in self._copies for tensor in (weights, grad)]
        return [self.weights, self.weights.grad, *copies, *self._moments.values()]

    def state(self) -> dict[str, Tensor]:
        """Everything a checkpoint needs to go on as if nothing had happened."""
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
        self._publish()

    def broadcast_weights(self) -> None:
        """Begin in every process with the first one's weights."""
        broadcast_(self.weights.data)
        self._publish()

    @torch.no_grad()
    def _publish(self) -> None:
        for place, copies, _ in self._copies:
            copies.copy_(self.weights.data[place])

    def trained(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Each trained parameter with its fp32 weights."""
        start = 0
        for p in self._parameters:
            yield p, self.weights.data[start : start + p.numel()].view_as(p)
            start += p.numel()


class BatchedAdam:
    """Adam (Kingma & Ba 2015) on weights (N, P): row n is all that adapter n trains, in fp32.

    What trains are stacked parameters (N, ...), views of it or, in 16 bits, copies. Adam's own step is taken at a rate
    of 1 and put on the weights at each row's rate: one kernel for all, whatever the rates are.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], ratios: Sequence[Tensor | float]) -> None:
        """`ratios`, (N,) or a number for each parameter: by what the learning rate is multiplied for it."""
        self._parameters = list(parameters)
        sizes = [p[0].numel() for p in self._parameters]
        ends = torch.tensor([0, *sizes]).cumsum(0).tolist()
        self._places = [slice(*ends_) for ends_ in pairwise(ends)]
        self.weights = torch.cat([p.detach().flatten(1).float() for p in self._parameters], 1)
        self._ratios = self._spread(ratios)
        self._update = torch.zeros_like(self.weights)
        self.gradient = torch.zeros_like(self.weights)  # (N, P), once gathered
        self._moments = Moments()
        self._wide = all(p.dtype == torch.float32 for p in self._parameters)
        for p, place in zip(self._parameters, self._places, strict=True):
            if p.dtype == torch.float32:
                p.data = self.weights[:, place].view(p.shape)
        self.clear()

    def _spread(self, ratios: Sequence[Tensor | float]) -> Tensor | None:
        """(N, P), or None where all are 1."""
        found = [torch.as_tensor(ratio, device=self.weights.device) for ratio in ratios]
        if all(bool((ratio == 1).all()) for ratio in found):
            return None
        columns = [
            ratio.expand(len(self.weights))[:, None].expand(-1, p[0].numel())
            for ratio, p in zip(found, self._parameters, strict=True)
        ]
        return torch.cat(columns, 1).to(self.weights.dtype)

    @property
    def steps(self) -> int:
        return int(self._moments.get("step", 0))

    def collect_gradients(self) -> Tensor:
        """The norm (N,) of each adapter's gradient, as backward left it; to be called once before `step`."""
        found = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._parameters]
        rows = [grad.view(len(grad), -1) for grad in found]
        torch.cat(rows if self._wide else [grad.float() for grad in rows], 1, out=self.gradient)
        self.clear()
        norms: Tensor = self.gradient.norm(dim=1)
        return norms

    def scale(self, factors: Sequence[float]) -> None:
        """Multiply each gathered gradient by its factor; by 0 also what is not finite."""
        by = self.weights.new_tensor(factors)[:, None]
        self.gradient.mul_(by).masked_fill_(by == 0, 0)

    @torch.no_grad()
    def step(self, rates: Sequence[float]) -> None:
        """Update at the adapters' learning rates from the gathered gradients."""
        self._moments = self._moments or moments_before(self.weights)
        update(self._update, self.gradient, self._moments, [(slice(None), 1.0)])
        by = self.weights.new_tensor(rates)[:, None]
        self.weights.addcmul_(self._update, by if self._ratios is None else by * self._ratios)
        self._update.zero_()
        self._publish()

    def clear(self) -> None:
        for p in self._parameters:
            p.grad = None

    @torch.no_grad()
    def set_weights(self, weights: Tensor) -> None:
        self.weights.copy_(weights)
        self._publish()

    def _publish(self) -> None:
        for p, place in zip(self._parameters, self._places, strict=True) if not self._wide else ():
            if p.dtype != torch.float32:
                p.data.copy_(self.weights[:, place].view(p.shape))

    def tensors(self) -> list[Tensor]:
        """All that it holds."""
        ratios = [] if self._ratios is None else [self._ratios]
        return [self.weights, self._update, self.gradient, *ratios, *self._moments.values()]

    def state(self) -> dict[str, Tensor]:
        """Everything a checkpoint needs to go on as if nothing had happened."""
        return {"weights": self.weights, **self._moments}

    def restore(self, state: dict[str, Tensor]) -> None:
        self.set_weights(state["weights"])
        self._moments = {name: state[name].to(self.weights.device) for name in NAMES if name in state}


def moments_before(weights: Tensor) -> Moments:
    """The number of the last step and both averages of the gradient, as they are before the first."""
    zeros = torch.zeros_like(weights)
    return dict(zip(NAMES, (torch.zeros((), device=weights.device), zeros, zeros.clone()), strict=True))


@torch.no_grad()
def update(weights: Tensor, gradient: Tensor, moments: Moments, rates: Iterable[tuple[slice, float]]) -> None:
    """One step of Adam (Kingma & Ba 2015), in place: each part of `weights` at its own learning rate.

    Together the parts are all of it.
    """
    for part, rate in rates:
        mean, square = ([moments[name][part]] for name in NAMES[1:])
        number = [moments["step"].clone()]
        adam(
            [weights[part]],
            [gradient[part]],
            mean,
            square,
            [],
            number,
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
