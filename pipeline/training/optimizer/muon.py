"""Muon: the momentum of a matrix, orthogonalized (Jordan 2024), as torch.optim.Muon computes it.

Importing torch.optim takes 1.4 seconds.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from pipeline.adapters.batched import BatchedLayer
from pipeline.adapters.lora import LoRALinear
from pipeline.models.base import is_linear
from pipeline.training.optimizer import MOMENTS, Span, State, UpdateRule, fused_adam

MOMENTUM = 0.95
COEFFICIENTS, ITERATIONS, SMALLEST = (3.4445, -4.7750, 2.0315), 5, 1e-7
# The root mean square of AdamW's updates. Those of a matrix get the same, so that one learning
# rate does for both (Liu et al. 2025, section 2.2).
SIZE = 0.2


class Muon(UpdateRule):
    """Muon on the matrices between embedding and head, AdamW on all else.

    `exp_avg` is the momentum of the matrices too, which have no `exp_avg_sq`.
    """

    def matrices(self, model: nn.Module) -> Mapping[int, Sequence[Sequence[int]]]:
        """Weights of linears, and A and B of LoRA on a linear."""
        head = getattr(model, "head", None)
        found = dict[int, list[Sequence[int]]]()
        for module in model.modules():
            base, names = module, list[str]()
            if isinstance(module, BatchedLayer):
                base = module.base
            if isinstance(module, BatchedLayer | LoRALinear):
                names += ["lora_A", "lora_B"]
            if is_linear(base) and module is not head:
                names.append("weight")
            for name in names:
                parameter = module._parameters.get(name)
                if parameter is None or not parameter.requires_grad:
                    continue
                found[id(parameter)] = [parameter.shape]
                if isinstance(module, BatchedLayer):
                    # nothing is updated of an adapter without this layer
                    found[id(parameter)] = [sizes.get(name, (0, 0)) for sizes in module.shapes]
        return found

    def zeros(self, weights: Tensor, spans: Sequence[Span]) -> State:
        mean, square = MOMENTS
        others = sum(span.stop - span.start for span in spans if not span.stacked)
        moments = {mean: torch.zeros_like(weights), square: weights.new_zeros(others)}
        return {**super().zeros(weights, spans), **moments}

    @torch.no_grad()
    def update(
        self, weights: Tensor, gradient: Tensor, state: State, spans: Sequence[Span]
    ) -> None:
        mean, square = (state[name].view(-1) for name in MOMENTS)
        state["step"] += 1
        first = 0  # of the span's mean squares
        for span in spans:
            size = span.stop - span.start
            parts = [tensor[span.start : span.stop] for tensor in (weights, gradient, mean)]
            if span.stacked:
                corner = tuple(map(slice, span.shape))
                _update_matrix([part.view(*span.stacked)[corner] for part in parts], span)
            else:
                fused_adam([*parts, square[first : first + size]], state["step"], span)
                first += size


def _update_matrix(tensors: Sequence[Tensor], span: Span) -> None:
    """One step with Nesterov's momentum on a matrix, its gradient and its momentum, (O, I) each."""
    weight, gradient, mean = tensors
    if span.rate is None or not weight.numel():
        return
    mean.lerp_(gradient, 1 - MOMENTUM)
    direction = orthogonalized(gradient.lerp_(mean, MOMENTUM))
    weight.mul_(1 - span.rate * span.decay)
    weight.add_(direction, alpha=-span.rate * SIZE * math.sqrt(max(weight.shape)))


def orthogonalized(matrix: Tensor) -> Tensor:
    """UVᵀ of the matrix USVᵀ, roughly and in bf16: singular values end between 0.5 and 1.5.

    Each Newton-Schulz iteration is X ← aX + (bXXᵀ + c(XXᵀ)²)X.
    """
    a, b, c = COEFFICIENTS
    x = matrix.bfloat16()
    wide = len(x) <= x.shape[1]
    x = x if wide else x.T  # the smaller of XXᵀ and XᵀX
    x = x / x.norm().clamp(min=SMALLEST)  # singular values are at most 1
    for _ in range(ITERATIONS):
        gram = x @ x.T
        gram = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.addmm(x, gram, x, beta=a)
    return x if wide else x.T
