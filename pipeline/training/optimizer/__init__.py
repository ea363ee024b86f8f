"""The optimizer: an update rule on all trainable parameters at once; the learning rate.

AdamW with moments in fp32 or in one byte each, or SGD, on one row of weights per learner. Adam
calls torch's fused kernel directly: constructing torch.optim.Adam imports torch's compiler, which
takes 1.4 seconds, longer than a short run trains; the functional form sorts tensors by device for
25 µs before it calls the kernel, which takes 8 µs on a small model's.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, chain, groupby, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pipeline.calc.settings import STATE_BLOCK, STATE_CHUNK, STATE_CHUNK_ON_CARD
from pipeline.errors import UserError
from pipeline.models.kernels import uses_cpu_kernels
from pipeline.project.params.sections import Training
from pipeline.training.parallel.collectives import all_reduce, broadcast

# fp16 loss scale, and steps without an overflow until it doubles: the values of torch's GradScaler
LARGEST_SCALE, GROWS_AFTER = 2.0**16, 2000
TIMESCALE = 10_000  # steps of inverse_sqrt without a warm-up, as in transformers
State = dict[str, Tensor]
MOMENTS = ("exp_avg", "exp_avg_sq")  # the running means of gradient and squared gradient


class FlatOptimizer:
    """An update rule on weights (N, P) in fp32: row n holds the parameters that learner n trains.

    Parameters are views of `weights`: with one learner each in its own shape, with more stacked,
    (N, ...). Small models spend a step on kernel launches, not on arithmetic: this way the update,
    the gradient norms and the checkpoint take one call each, whatever the number of parameters.
    16-bit parameters are copies, since an update is often smaller than the distance to the next
    16-bit number.

    `ratios`: LoRA+ (Hayou et al. 2024): every lora_B of learner n has `ratios[n]` times the
    learning rate of its other parameters. `rule`: AdamW if not given. `decays`: each learner's
    weight decay, 0 if not given; `adams` likewise. `scaled`: the loss is scaled before backward, so that small
    gradients do not underflow in fp16; an overflow halves the scale and skips the step
    (Micikevicius et al. 2018, section 3.2). `narrow`: a dtype in which low-rank factors in fp32 are
    read, as `in_16_bits`: they have a copy in it, and whatever reads that adds their gradients to
    `p.grad` itself.
    """

    def __init__(
        self,
        model: nn.Module,
        scaled: bool = False,
        ratios: Sequence[float] = (1.0,),
        rule: "UpdateRule | None" = None,
        decays: Sequence[float] = (),
        adams: "Sequence[Adam]" = (),
        narrow: torch.dtype | None = None,
    ) -> None:
        N = len(ratios)
        faster = set[int]()
        if set(ratios) != {1.0}:
            faster = {id(p) for name, p in model.named_parameters() if name.endswith(".lora_B")}
        factors = _low_rank_factors(model) if narrow is not None and N == 1 else set()
        trainable = (p for p in model.parameters() if p.requires_grad)
        # by dtype, so that the copies of each are one block; then those with a rate of their own
        self._parameters = sorted(
            trainable, key=lambda p: (str(p.dtype), id(p) in factors, id(p) in faster)
        )
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

        members = [pair for pair in placed if id(pair[0]) in factors]
        self._narrow: tuple[slice, Tensor] | None = None  # span of a row, and its copy
        if members:
            whole = slice(members[0][1].start, members[-1][1].stop)
            copies = self.weights[:, whole].to(narrow)
            self._narrow = whole, copies
            for p, span in members:
                part = slice(span.start - whole.start, span.stop - whole.start)
                p.in_16_bits = copies[:, part].view(p.shape)  # type: ignore[attr-defined]

        self._rule = rule or AdamW()
        matrices = self._rule.matrices(model)
        decays, adams = decays or [0.0] * N, adams or [Adam()] * N

        def apart(pair: tuple[nn.Parameter, slice]) -> tuple[bool, int]:
            """Equal for neighbours that are updated by one call."""
            number = id(pair[0])
            return number in faster, number if number in matrices else 0

        # learner, factor of its learning rate, weights
        self._rate_spans: list[tuple[int, float, Span]] = []
        for n, ratio in enumerate(ratios):
            for (is_faster, matrix), group in groupby(placed, key=apart):
                members = list(group)
                start = n * ends[-1] + members[0][1].start
                stop = n * ends[-1] + members[-1][1].stop
                group_span = Span(start, stop, None, decays[n], adams[n])
                if matrix:
                    padded = members[0][0].shape[-2:]
                    group_span = group_span._replace(stacked=padded, shape=matrices[matrix][n])
                self._rate_spans.append((n, ratio if is_faster else 1.0, group_span))

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
        for learner, factor, span in self._rate_spans:
            rate = rates[learner]
            spans.append(span._replace(rate=None if rate is None else rate * factor))
        self._rule.update(self.weights.view(-1), self.gradient.view(-1), self._state, spans)
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
        copies = [*chain.from_iterable(pair for _, *pair in self._copies)]
        if self._narrow is not None:
            copies.append(self._narrow[1])
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
        return self._rule.zeros(self.weights, [span for *_, span in self._rate_spans])

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
        if self._narrow is not None:
            span, weights = self._narrow
            weights.copy_(self.weights[:, span])

    def trained(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Each trained parameter with its fp32 weights."""
        for p, span in zip(self._parameters, self._spans, strict=True):
            yield p, self.weights[:, span].view(p.shape)


def _low_rank_factors(model: nn.Module) -> set[int]:
    """The ids of A and B in fp32 that train."""
    return {
        id(p)
        for name, p in model.named_parameters()
        if name.endswith(("lora_A", "lora_B")) and p.requires_grad and p.dtype == torch.float32
    }


def rate(settings: Training, step: int, total: int) -> float:
    """The learning rate at step `step` of `total`, from 1.

    Linear warm-up, then a schedule of transformers.
    """
    warmup = min(settings.warmup(total), total)
    if step <= warmup:
        return settings.learning_rate * step / warmup
    return settings.learning_rate * _decayed(settings, step - 1 - warmup, warmup, total)


def _decayed(settings: Training, done: int, warmup: int, total: int) -> float:
    """The share of the learning rate that is left, `done` steps after the warm-up.

    Linear as in Devlin et al. 2018 (appendix A.2), cosine as in Loshchilov & Hutter 2017 (eq. 5).
    """
    schedule, length = settings.schedule, max(1, total - warmup)
    if schedule == "constant":
        return 1.0
    if schedule == "inverse_sqrt":
        scale = warmup or TIMESCALE
        return 1 / math.sqrt((done + scale) / scale)
    if schedule == "warmup_stable_decay":
        decay = min(length, math.ceil(total * settings.decay_ratio))
        done, length = max(0, done - (length - decay)), decay

    left: float
    progress = done / length  # fraction of the decay done, 0 at its first step
    if schedule in ("linear", "polynomial"):
        left = (1 - progress) ** settings.power
    else:
        left = (1 + math.cos(math.pi * (progress * settings.num_cycles % 1))) / 2
    return left * (1 - settings.min_lr_ratio) + settings.min_lr_ratio


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


class Adam(NamedTuple):
    """What AdamW reads beside rate and decay."""

    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8


class Span(NamedTuple):
    """Neighbouring weights of one learner."""

    start: int
    stop: int
    rate: float | None = None  # None: no update
    decay: float = 0.0
    adam: Adam = Adam()
    stacked: Sequence[int] = ()  # shape of a matrix of the rule's; empty: no such matrix
    shape: Sequence[int] = ()  # of the learner's part of it, which is padded with zeros


class UpdateRule:
    """One step on flattened weights (P,), in place.

    Its state is named tensors, all that a checkpoint needs of it; `step` counts the steps.
    """

    # what it keeps beside the state, once that exists
    tables: Sequence[Tensor] = ()

    def matrices(self, model: nn.Module) -> Mapping[int, Sequence[Sequence[int]]]:  # noqa: ARG002
        """The parameters that it updates as matrices: id → shape for each learner."""
        return {}

    def zeros(self, weights: Tensor, spans: Sequence[Span]) -> State:  # noqa: ARG002
        """The state before the first step. `spans`: those of every step."""
        return {"step": torch.zeros((), device=weights.device)}

    def update(
        self, weights: Tensor, gradient: Tensor, state: State, spans: Sequence[Span]
    ) -> None:
        """Update `weights` (P,) and `state` from the gradient (P,), which may be overwritten."""
        raise NotImplementedError


class AdamW(UpdateRule):
    """Adam (Kingma & Ba 2015) with decoupled weight decay (Loshchilov & Hutter 2019), in fp32."""

    def zeros(self, weights: Tensor, spans: Sequence[Span]) -> State:
        moments = {name: torch.zeros_like(weights) for name in MOMENTS}
        return {**super().zeros(weights, spans), **moments}

    @torch.no_grad()
    def update(
        self, weights: Tensor, gradient: Tensor, state: State, spans: Sequence[Span]
    ) -> None:
        tensors = [weights, gradient, *(state[name].view(-1) for name in MOMENTS)]
        state["step"] += 1
        for span in _joined(spans):
            parts = [tensor[span.start : span.stop] for tensor in tensors]
            fused_adam(parts, state["step"], span)


class AdamW8bit(UpdateRule):
    """AdamW whose moments take a byte each (Dettmers et al. 2022).

    A moment is a code, times the largest of a block of 256: neighbours of a learner's row, whatever
    their parameters are. The moments of a chunk of weights at a time are decoded to fp32, updated
    by the same kernel, and encoded again. With `paged` they stay in the memory of the host; on a
    CPU that is where they are anyway.
    """

    def __init__(self, paged: bool = False) -> None:
        self._paged = paged
        self._codes: tuple[DynamicCode, ...] = ()  # of means, and of mean squares

    def zeros(self, weights: Tensor, spans: Sequence[Span]) -> State:
        blocks = sum(-(-(span.stop - span.start) // STATE_BLOCK) for span in spans)
        device = weights.device
        # copies to and from pinned memory take half the time
        pinned = self._paged and device.type == "cuda"
        place = torch.device("cpu") if self._paged else device
        state = super().zeros(weights, spans)
        for name in MOMENTS:
            state[name] = torch.zeros(
                blocks, STATE_BLOCK, dtype=torch.uint8, device=place, pin_memory=pinned
            )
            state[f"{name}_max"] = torch.zeros(blocks, device=place, pin_memory=pinned)
        self._codes = DynamicCode(True, device), DynamicCode(False, device)
        self.tables = [table for code in self._codes for table in code.tables]
        return state

    @torch.no_grad()
    def update(
        self, weights: Tensor, gradient: Tensor, state: State, spans: Sequence[Span]
    ) -> None:
        first = 0  # block of the span
        size = STATE_CHUNK if uses_cpu_kernels(weights.device) else STATE_CHUNK_ON_CARD
        state["step"] += 1
        for span in spans:
            start, stop = span.start, span.stop
            if span.rate is not None:
                for begin in range(start, stop, size):
                    end = min(begin + size, stop)
                    # the last block of a span may be longer than its weights
                    block = first + (begin - start) // STATE_BLOCK
                    blocks = slice(block, block + -(-(end - begin) // STATE_BLOCK))
                    self._update_chunk(weights[begin:end], gradient[begin:end], state, blocks, span)
            first += -(-(stop - start) // STATE_BLOCK)

    def _update_chunk(
        self, weights: Tensor, gradient: Tensor, state: State, blocks: slice, span: Span
    ) -> None:
        moments = []
        for code, name in zip(self._codes, MOMENTS, strict=True):
            codes = state[name][blocks].to(weights.device, non_blocking=True)
            largest = state[f"{name}_max"][blocks].to(weights.device, non_blocking=True)
            moments.append(code.decode(codes, largest))
        flat = [moment.view(-1)[: len(weights)] for moment in moments]
        fused_adam([weights, gradient, *flat], state["step"], span)
        for code, name, moment in zip(self._codes, MOMENTS, moments, strict=True):
            codes, largest = code.encode(moment)
            state[name][blocks].copy_(codes)
            state[f"{name}_max"][blocks].copy_(largest)
            del codes  # four bytes a weight, before the next are made


class SGD(UpdateRule):
    """w −= rate · (g + decay · w), without momentum."""

    @torch.no_grad()
    def update(
        self, weights: Tensor, gradient: Tensor, state: State, spans: Sequence[Span]
    ) -> None:
        for span in _joined(spans):
            part = slice(span.start, span.stop)
            if span.rate is None:
                continue
            if span.decay:
                gradient[part].add_(weights[part], alpha=span.decay)
            weights[part].add_(gradient[part], alpha=-span.rate)
        state["step"] += 1


def _joined(spans: Sequence[Span]) -> list[Span]:
    """The spans, with neighbours that are updated alike as one.

    A call costs more than a small adapter's arithmetic.
    """
    joined: list[Span] = []
    for span in spans:
        if joined and joined[-1][1:] == (span.start, *span[2:]):
            span = span._replace(start=joined.pop().start)
        joined.append(span)
    return joined


def fused_adam(tensors: Sequence[Tensor], step: Tensor, span: Span) -> None:
    """torch's kernel on weights, gradient, mean and mean square; `step` counts from 1."""
    if span.rate is None:
        return
    weights, gradient, mean, square = ([tensor] for tensor in tensors)
    kernel: Any = torch._fused_adamw_ if span.decay > 0 else torch._fused_adam_
    kernel(
        weights,
        gradient,
        mean,
        square,
        [],
        [step],
        lr=span.rate,
        beta1=span.adam.beta1,
        beta2=span.adam.beta2,
        weight_decay=span.decay,
        eps=span.adam.epsilon,
        amsgrad=False,
        maximize=False,
    )


class DynamicCode:
    """`dynamic_levels`, to the nearest of which a number is rounded."""

    def __init__(self, signed: bool, device: torch.device) -> None:
        from pipeline.models.nf4 import dynamic_levels  # of 8-bit states alone

        code = dynamic_levels(signed)
        # above each value
        edges = torch.cat(((code[:-1] + code[1:]) / 2, torch.tensor([torch.inf])))
        if not signed:
            # only 0 itself is 0: under a mean that is not 0, a mean square rounded down to 0 would
            # divide it by eps
            edges[0] = 0
        # A search among 255 edges would take ten times as long as all else. The first 16 bits of a
        # number, as an index, leave two neighbours at most: intervals are wider than the numbers
        # that begin with the same bits.
        bits = torch.arange(-(2**15), 2**15, dtype=torch.int32) * 2**16
        ends = (
            torch.bucketize(end.view(torch.float32).nan_to_num(), edges)
            for end in (bits, bits + (2**16 - 1))
        )
        self._code, self._edges = code.to(device), edges.to(device)
        self._lower = torch.minimum(*ends).to(device, torch.uint8)

    @property
    def tables(self) -> list[Tensor]:
        return [self._code, self._edges, self._lower]

    def decode(self, codes: Tensor, largest: Tensor) -> Tensor:
        """fp32 values of codes (blocks, 256), times each block's `largest` (blocks,)."""
        values = self._code.index_select(0, codes.view(-1).int()).view(codes.shape)
        return values.mul_(largest[:, None])

    def encode(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Codes (int32) and each block's largest absolute value, of values (blocks, 256).

        The values are overwritten.
        """
        largest = values.abs().amax(1)
        values.div_(torch.where(largest > 0, largest, 1)[:, None])
        index = (values.view(torch.int32) >> 16).add_(2**15).view(-1)
        codes = self._lower.index_select(0, index).int()
        del index
        codes += values.view(-1) > self._edges.index_select(0, codes)
        return codes.view(values.shape), largest
