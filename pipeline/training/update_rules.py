"""How an optimizer changes flat weights: AdamW with moments in fp32 or in one byte each, and SGD.

Adam calls torch's fused kernel directly: constructing torch.optim.Adam imports torch's compiler,
which takes 1.4 seconds, longer than a short run trains; the functional form sorts tensors by device
for 25 µs before it calls the kernel, which takes 8 µs on a small model's.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline.calc.settings import STATE_BLOCK, STATE_CHUNK

State = dict[str, Tensor]
MOMENTS = ("exp_avg", "exp_avg_sq")  # the running means of gradient and squared gradient


class Span(NamedTuple):
    """Neighbouring weights of one learner."""

    start: int
    stop: int
    rate: float | None  # None: no update
    decay: float


class UpdateRule:
    """One step on flattened weights (P,), in place.

    Its state is named tensors, all that a checkpoint needs of it; `step` counts the steps.
    """

    # what it keeps beside the state, once that exists
    tables: Sequence[Tensor] = ()

    def zeros(self, weights: Tensor, sizes: Sequence[int]) -> State:  # noqa: ARG002
        """The state before the first step. `sizes`: of the spans, the same in every step."""
        return {"step": torch.zeros((), device=weights.device)}

    def update(
        self, weights: Tensor, gradient: Tensor, state: State, spans: Sequence[Span]
    ) -> None:
        """Update `weights` and `state` from the gradient, which may be overwritten."""
        raise NotImplementedError


class AdamW(UpdateRule):
    """Adam (Kingma & Ba 2015) with decoupled weight decay (Loshchilov & Hutter 2019), in fp32."""

    def zeros(self, weights: Tensor, sizes: Sequence[int]) -> State:
        moments = {name: torch.zeros_like(weights) for name in MOMENTS}
        return {**super().zeros(weights, sizes), **moments}

    @torch.no_grad()
    def update(
        self, weights: Tensor, gradient: Tensor, state: State, spans: Sequence[Span]
    ) -> None:
        moments = [state[name] for name in MOMENTS]
        tensors = [tensor.view(-1) for tensor in (weights, gradient, *moments)]
        state["step"] += 1
        for start, stop, rate, decay in _joined(spans):
            parts = [tensor[start:stop] for tensor in tensors]
            _fused_adam(parts, state["step"], rate, decay)


class AdamW8bit(UpdateRule):
    """AdamW whose moments take a byte each (Dettmers et al. 2022).

    A moment is a code, times the largest of a block of 256: neighbours of a learner's row, whatever
    their parameters are. The moments of STATE_CHUNK weights at a time are decoded to fp32, updated
    by the same kernel, and encoded again. With `paged` they stay in the memory of the host; on a
    CPU that is where they are anyway.
    """

    def __init__(self, paged: bool = False) -> None:
        self._paged = paged
        self._codes: tuple[DynamicCode, ...] = ()  # of means, and of mean squares

    def zeros(self, weights: Tensor, sizes: Sequence[int]) -> State:
        blocks, device = sum(-(-size // STATE_BLOCK) for size in sizes), weights.device
        # copies to and from pinned memory take half the time
        pinned = self._paged and device.type == "cuda"
        place = torch.device("cpu") if self._paged else device
        state = super().zeros(weights, sizes)
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
        weights, gradient, first = weights.view(-1), gradient.view(-1), 0
        state["step"] += 1
        for start, stop, rate, decay in spans:
            if rate is not None:
                for begin in range(start, stop, STATE_CHUNK):
                    end = min(begin + STATE_CHUNK, stop)
                    # the last block of a span may be longer than its weights
                    block = first + (begin - start) // STATE_BLOCK
                    blocks = slice(block, block + -(-(end - begin) // STATE_BLOCK))
                    self._update_chunk(
                        weights[begin:end], gradient[begin:end], state, blocks, rate, decay
                    )
            first += -(-(stop - start) // STATE_BLOCK)

    def _update_chunk(
        self,
        weights: Tensor,
        gradient: Tensor,
        state: State,
        blocks: slice,
        rate: float,
        decay: float,
    ) -> None:
        moments = []
        for code, name in zip(self._codes, MOMENTS, strict=True):
            codes = state[name][blocks].to(weights.device, non_blocking=True)
            largest = state[f"{name}_max"][blocks].to(weights.device, non_blocking=True)
            moments.append(code.decode(codes, largest))
        flat = [moment.view(-1)[: len(weights)] for moment in moments]
        _fused_adam([weights, gradient, *flat], state["step"], rate, decay)
        for code, name, moment in zip(self._codes, MOMENTS, moments, strict=True):
            codes, largest = code.encode(moment)
            state[name][blocks].copy_(codes)
            state[f"{name}_max"][blocks].copy_(largest)


class SGD(UpdateRule):
    """w −= rate · (g + decay · w), without momentum."""

    @torch.no_grad()
    def update(
        self, weights: Tensor, gradient: Tensor, state: State, spans: Sequence[Span]
    ) -> None:
        weights, gradient = weights.view(-1), gradient.view(-1)
        for start, stop, rate, decay in _joined(spans):
            if decay:
                gradient[start:stop].add_(weights[start:stop], alpha=decay)
            weights[start:stop].add_(gradient[start:stop], alpha=-rate)
        state["step"] += 1


def rule_of(name: str) -> UpdateRule:
    """The update rule of params.yaml's `optimizer`."""
    if name == "sgd":
        return SGD()
    return AdamW() if name == "adamw" else AdamW8bit(paged=name.startswith("paged"))


def _joined(spans: Sequence[Span]) -> Iterator[tuple[int, int, float, float]]:
    """The spans that are updated, with neighbours of one rate and decay as one.

    A call costs more than a small adapter's arithmetic.
    """
    joined: list[tuple[int, int, float, float]] = []
    for start, stop, rate, decay in spans:
        if rate is None:
            continue
        if joined and joined[-1][1:] == (start, rate, decay):
            start = joined.pop()[0]
        joined.append((start, stop, rate, decay))
    return iter(joined)


def _fused_adam(tensors: Sequence[Tensor], step: Tensor, rate: float, decay: float) -> None:
    """torch's kernel on weights, gradient, mean and mean square; `step` counts from 1."""
    weights, gradient, mean, square = ([tensor] for tensor in tensors)
    kernel = torch._fused_adamw_ if decay > 0 else torch._fused_adam_
    options: dict[str, Any] = {
        "beta1": 0.9,
        "beta2": 0.999,
        "eps": 1e-8,
        "amsgrad": False,
        "maximize": False,
    }
    kernel(weights, gradient, mean, square, [], [step], lr=rate, weight_decay=decay, **options)


class DynamicCode:
    """256 values in [-1, 1], or in [0, 1] if not `signed`; a number becomes the nearest of them.

    Dynamic tree quantization (Dettmers 2016): 0, 1, and in each of seven decades down to 1e-6 the
    middles of equal intervals, twice as many as in the decade below.
    """

    def __init__(self, signed: bool, device: torch.device) -> None:
        values = [torch.tensor([0.0, 1.0])]
        for decade in range(7):
            bounds = torch.linspace(0.1, 1, 2 ** (decade + (not signed)) + 1)
            middles = (bounds[:-1] + bounds[1:]) / 2 * 10.0 ** (decade - 6)
            values += [middles, -middles] if signed else [middles]
        code = torch.cat(values).sort().values
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
