"""All trainable parameters as one row per learner, updated in few calls; the learning rate."""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, groupby, pairwise

import torch
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.project.params.sections import Training
from pipeline.training.parallel.collectives import all_reduce, broadcast
from pipeline.training.update_rules import AdamW, Span, State, UpdateRule

# fp16 loss scale, and steps without an overflow until it doubles: the values of torch's GradScaler
LARGEST_SCALE, GROWS_AFTER = 2.0**16, 2000


class FlatOptimizer:
    """An update rule on weights (N, P) in fp32: row n holds the parameters that learner n trains.

    Parameters are views of `weights`: with one learner each in its own shape, with more stacked,
    (N, ...). Small models spend a step on kernel launches, not on arithmetic: this way the update,
    the gradient norms and the checkpoint take one call each, whatever the number of parameters.
    16-bit parameters are copies, since an update is often smaller than the distance to the next
    16-bit number.

    `ratios`: LoRA+ (Hayou et al. 2024): every lora_B of learner n has `ratios[n]` times the
    learning rate of its other parameters. `rule`: AdamW if not given. `decays`: each learner's
    weight decay, 0 if not given. `scaled`: the loss is scaled before backward, so that small
    gradients do not underflow in fp16; an overflow halves the scale and skips the step
    (Micikevicius et al. 2018, section 3.2).
    """

    def __init__(
        self,
        model: nn.Module,
        scaled: bool = False,
        ratios: Sequence[float] = (1.0,),
        rule: UpdateRule | None = None,
        decays: Sequence[float] = (),
    ) -> None:
        N = len(ratios)
        faster = set[int]()
        if set(ratios) != {1.0}:
            faster = {id(p) for name, p in model.named_parameters() if name.endswith(".lora_B")}
        trainable = (p for p in model.parameters() if p.requires_grad)
        # by dtype, so that the copies of each are one block; then those with a rate of their own
        self._parameters = sorted(trainable, key=lambda p: (str(p.dtype), id(p) in faster))
        self.weights = torch.cat([p.detach().reshape(N, -1).float() for p in self._parameters], 1)
        self.gradient = torch.zeros_like(self.weights)

        ends = [*accumulate((p.numel() // N for p in self._parameters), initial=0)]
        self._spans = [slice(*bounds) for bounds in pairwise(ends)]  # of each parameter in a row
        placed = list(zip(self._parameters, self._spans, strict=True))
        # per 16-bit dtype: span of a row, weights, gradient
        self._copies: list[tuple[slice, Tensor, Tensor]] = []
        for dtype, group in groupby(placed, key=lambda pair: pair[0].dtype):
            members = list(group)
            whole = slice(members[0][1].start, members[-1][1].stop)
            weights, grad = self.weights[:, whole], self.gradient[:, whole]
            if dtype != torch.float32:
                weights, grad = weights.to(dtype), grad.to(dtype) if N == 1 else grad
                self._copies.append((whole, weights, grad))
            for p, span in members:
                part = slice(span.start - whole.start, span.stop - whole.start)
                p.data = weights[:, part].view(p.shape)
                # autograd wants the gradients of strided parameters dense: with more learners it
                # allocates its own
                p.grad = grad[:, part].view(p.shape) if N == 1 else None

        # learner, bounds in the flattened weights, factor of the learning rate
        self._rate_spans: list[tuple[int, int, int, float]] = []
        for n, ratio in enumerate(ratios):
            for is_faster, group in groupby(placed, key=lambda pair: id(pair[0]) in faster):
                members = list(group)
                start = n * ends[-1] + members[0][1].start
                stop = n * ends[-1] + members[-1][1].stop
                self._rate_spans.append((n, start, stop, ratio if is_faster else 1.0))

        self._decays = decays or [0.0] * N
        self._rule = rule or AdamW()
        self._state = State()  # of the rule, from the first step on
        self._scaled = scaled
        # factor, and steps since it changed: a tensor, as it is part of a checkpoint
        self._scale = torch.tensor([LARGEST_SCALE if scaled else 1.0, 0.0])

    @property
    def scale(self) -> float:
        """The factor to multiply the loss by before backward."""
        return float(self._scale[0]) if self._scaled else 1.0

    @property
    def steps(self) -> int:
        """Steps taken, including those before a resume."""
        return int(self._state.get("step", 0))

    def collect_gradients(self) -> Tensor:
        """Sum the gradients over all ranks, unscale them and return their norms (N,).

        Call it once before `step`.
        """
        # autograd's own gradients; none for a layer that no live learner adapts
        if (N := len(self.weights)) > 1:
            grads = (torch.zeros_like(p) if p.grad is None else p.grad for p in self._parameters)
            torch.cat([grad.view(N, -1).float() for grad in grads], 1, out=self.gradient)
            self.clear()
        else:
            for span, _, grad in self._copies:
                self.gradient[:, span].copy_(grad)
        # one collective for all parameters; sums, as losses are shares of all ranks' labels
        all_reduce(self.gradient)
        if self._scaled:
            self.gradient.div_(self.scale)
        norms: Tensor = torch.linalg.vector_norm(self.gradient, dim=1)
        return norms

    def clip(self, learner: int, norm: float, largest: float) -> None:
        """Scale a learner's gradient of norm `norm` down to `largest` (Pascanu et al. 2013)."""
        if norm > largest:
            self.gradient[learner].mul_(largest / norm)

    def step(self, *rates: float | None) -> None:
        """Update the weights from the collected gradients, and clear these.

        `rates`: of each learner; None: it keeps its weights.
        """
        self._state = self._state or self._empty_state()
        spans = []
        for learner, start, stop, factor in self._rate_spans:
            rate = rates[learner]
            rate = None if rate is None else rate * factor
            spans.append(Span(start, stop, rate, self._decays[learner]))
        self._rule.update(self.weights, self.gradient, self._state, spans)
        self._update_copies()
        self.clear()
        if self._scaled:
            self._scale[1] += 1
            if self._scale[1] >= GROWS_AFTER:
                self._scale.copy_(torch.tensor([min(2 * self.scale, LARGEST_SCALE), 0.0]))

    def skip(self) -> bool:
        """Clear gradients that overflowed and halve the scale; False if it cannot be halved."""
        self.clear()
        if not self._scaled or self.scale < 2:
            return False
        self._scale.copy_(torch.tensor([self.scale / 2, 0.0]))
        return True

    def clear(self) -> None:
        """Forget what backward has added up since the last step."""
        if len(self.weights) > 1:
            for p in self._parameters:
                p.grad = None
            return
        self.gradient.zero_()
        for _, _, grad in self._copies:
            grad.zero_()

    def tensors(self) -> list[Tensor]:
        """All its tensors; the rule's state is among them after the first step."""
        copies = [tensor for _, weights, grad in self._copies for tensor in (weights, grad)]
        return [self.weights, self.gradient, *copies, *self._state.values(), *self._rule.tables]

    def state(self) -> dict[str, Tensor]:
        """Everything a checkpoint needs for an exact resume."""
        scale = {"loss_scale": self._scale} if self._scaled else {}
        return {"weights": self.weights, **scale, **self._state}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.set_weights(state["weights"])
        if "loss_scale" in state:
            self._scale.copy_(state["loss_scale"])
        self._state = self._empty_state() if "step" in state else State()
        for name, tensor in self._state.items():
            tensor.copy_(state[name])

    def take_over(self, state: Mapping[str, Tensor]) -> bool:
        """Go on from the state of an earlier run; False, unchanged, if it is of other weights."""
        expected = {**self.state(), **self._empty_state()}
        if state.keys() != expected.keys() or any(
            state[name].shape != tensor.shape for name, tensor in expected.items()
        ):
            return False
        rounded = state["weights"].to(self.weights.device, copy=True)
        for span, weights, _ in self._copies:
            rounded[:, span] = rounded[:, span].to(weights.dtype).float()
        if not torch.equal(rounded, self.weights):
            return False
        self.restore(state)
        return True

    def _empty_state(self) -> State:
        sizes = [stop - start for _, start, stop, _ in self._rate_spans]
        return self._rule.zeros(self.weights, sizes)

    def set_weights(self, weights: Tensor) -> None:
        self.weights.copy_(weights)
        self._update_copies()

    def broadcast_weights(self) -> None:
        """Start on every rank from the weights of rank 0."""
        broadcast(self.weights)
        self._update_copies()

    def _update_copies(self) -> None:
        for span, weights, _ in self._copies:
            weights.copy_(self.weights[:, span])

    def trained(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Each trained parameter with its fp32 weights."""
        for p, span in zip(self._parameters, self._spans, strict=True):
            yield p, self.weights[:, span].view(p.shape)


def rate(settings: Training, step: int, total: int) -> float:
    """The learning rate at step `step` of `total`, from 1.

    Linear warm-up, then constant, or decay to 0 after the last step: linear as in Devlin et al.
    2018 (appendix A.2), cosine as in Loshchilov & Hutter 2017 (eq. 5).
    """
    warmup = min(settings.warmup(total), total)
    if step <= warmup:
        return settings.learning_rate * step / warmup
    # fraction of the decay done, 0 at its first step
    progress = (step - 1 - warmup) / max(1, total - warmup)
    if settings.schedule == "linear":
        return settings.learning_rate * (1 - progress)
    if settings.schedule == "cosine":
        return settings.learning_rate * (1 + math.cos(math.pi * progress)) / 2
    return settings.learning_rate


def refuse_long_warmup(settings: Training, per_epoch: int, section: str) -> None:
    """Raises UserError if all steps are warm-up: no step would follow at the full learning rate."""
    total = settings.total_steps(per_epoch)
    if (warmup := settings.warmup(total)) >= total:
        if settings.warmup_ratio:
            raise UserError(
                f"{section}.warmup_ratio {settings.warmup_ratio:g} of {total} steps, rounded up, "
                "leaves none after the warm-up. Lower it, or train longer."
            )
        raise UserError(
            f"{section}.warmup_steps must be below {total}, the total number of training steps, "
            f"got {warmup}. Lower it."
        )
