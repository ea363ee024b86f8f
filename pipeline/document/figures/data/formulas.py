"""§4.3: the gradients of A and B by the document's formulas, compared with autograd's."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pipeline.adapters.lora import LoRALinear
from pipeline.document.figures.data.landscape import mean_loss, sentences
from pipeline.document.tables import Row, Table
from pipeline.inference import engine
from pipeline.project.runner import Job


@dataclass
class GradientProbe:
    """Hooks on an adapted layer that compute the formulas during a backward pass, summed over all tokens, in fp64.

    `of_A` (R, I) and `of_B` (O, R): the formulas' gradients. `back` (2,): ‖∂L/∂x‖², and the same without the path
    through A and B.
    """

    layer: LoRALinear
    of_A: Tensor = field(init=False)
    of_B: Tensor = field(init=False)
    back: Tensor = field(default_factory=lambda: torch.zeros(2, dtype=torch.float64))

    def __post_init__(self) -> None:
        A, B = (p.detach().double() for p in (self.layer.lora_A, self.layer.lora_B))
        update = self.layer.scale * torch.mm(*(p.detach().double() for p in reversed(self.layer.pair())))  # (O, I)
        self.of_A, self.of_B = torch.zeros_like(A), torch.zeros_like(B)

        def forward(_: Any, inputs: tuple[Tensor], output: Tensor) -> None:
            x = inputs[0].detach().flatten(0, -2).double()  # (N, I)

            def add(gradient: Tensor) -> None:
                h = gradient.flatten(0, -2).double()  # ∂L/∂h (N, O)
                self.of_B += self.layer.scale * h.T @ (x @ A.T)
                self.of_A += self.layer.scale * B.T @ h.T @ x

            output.register_hook(add)  # type: ignore[no-untyped-call]

        def backward(_: Any, to: tuple[Tensor], of: tuple[Tensor]) -> None:
            x_grad, h_grad = (gradient[0].flatten(0, -2).double() for gradient in (to, of))  # (N, I), (N, O)
            self.back += torch.stack([x_grad.square().sum(), (x_grad - h_grad @ update).square().sum()])

        self.layer.register_forward_hook(forward)
        self.layer.register_full_backward_hook(backward)

    def row(self, name: str) -> Row:
        """Relative errors of the formulas against autograd, and the share of ‖∂L/∂x‖ that comes through W₀."""
        total, through_W = self.back.sqrt()
        return {
            "module": name,
            "error_A": _relative_error(self.of_A, self.layer.lora_A),
            "error_B": _relative_error(self.of_B, self.layer.lora_B),
            "through_W": float(through_W / total),
        }


def _relative_error(formula: Tensor, parameter: Tensor) -> float:
    assert parameter.grad is not None
    return float((formula - parameter.grad).norm() / formula.norm())


def formulas(job: Job) -> Table:
    """One backward pass of the fact correction through the trained adapter: one row per matrix. Raises UserError."""
    loaded = engine.load(job.project.artifact("expand_vocab"), job.project.artifact("finetune_lora"))
    layers = {name: module for name, module in loaded.model.named_modules() if isinstance(module, LoRALinear)}
    loaded.model.requires_grad_(True)
    probes = {name: GradientProbe(layer) for name, layer in layers.items()}
    torch.autograd.backward(mean_loss(loaded.model, sentences(job, loaded)))
    rows = [probe.row(name) for name, probe in probes.items()]
    return Table("gradient_example_formulas", "§4.3's formulas: relative errors against autograd", rows)
