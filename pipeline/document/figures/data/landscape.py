"""One backward pass: the parameter with the largest gradient, the loss along it, and each parameter's gradient."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from torch import Tensor

from pipeline.adapters.attach import attach
from pipeline.adapters.config import AdapterSpec
from pipeline.data.masking import encode
from pipeline.data.read import read_examples
from pipeline.data.windows import as_window
from pipeline.document.params import StudyTrajectory
from pipeline.inference import engine
from pipeline.inference.engine import LoadedModel
from pipeline.models.base import CausalLM
from pipeline.project.runner import Job
from pipeline.training.batches import Batch, collate
from pipeline.training.step import loss_of, to_model_device

POINTS = 160  # intervals along the parameter, half on each side


@dataclass(frozen=True)
class Landscape:
    """The loss as a function of one parameter, the others fixed. `gradient` is the slope at its trained value `at`."""

    name: str
    index: tuple[int, ...]
    at: float
    loss: float
    gradient: float
    thetas: Sequence[float]
    losses: Sequence[float]

    @property
    def lowest(self) -> tuple[float, float]:
        """θ and loss of the lowest point of the curve."""
        loss, theta = min(zip(self.losses, self.thetas, strict=True))
        return theta, loss

    @property
    def minima(self) -> int:
        """The number of points below both neighbours; a bowl has 1."""
        l = self.losses  # noqa: E741
        return sum(l[n] < l[n - 1] and l[n] < l[n + 1] for n in range(1, len(l) - 1))

    def tangent(self, theta: float) -> float:
        return self.loss + self.gradient * (theta - self.at)


def sentences(job: Job, loaded: LoadedModel) -> list[Batch]:
    """The fact correction's data in one batch of whole sentences, on the model's device. Raises UserError."""
    name = job.project.params.of(StudyTrajectory).data
    model = loaded.model
    encoded = [encode(e, loaded.tokenizer, 0, model.shape.positions) for e in read_examples(job.path(name), name)]
    return list(to_model_device(model, [collate([as_window(example) for example in encoded])]))


def mean_loss(model: CausalLM, batches: Sequence[Batch]) -> Tensor:
    """Mean cross-entropy over all labels, in nats per token."""
    labels = sum(batch.tokens for batch in batches)
    return torch.stack([loss_of(model, batch) * (batch.tokens / labels) for batch in batches]).sum()


def landscape(model: CausalLM, batches: Sequence[Batch], reach: float) -> Landscape:
    """The loss along the parameter with the largest gradient. The model's weights are restored afterwards."""
    model.requires_grad_(True)
    loss = mean_loss(model, batches)
    torch.autograd.backward(loss)
    name, parameter = max(model.named_parameters(), key=lambda pair: float(_gradient(pair[1]).abs().max()))
    position = int(_gradient(parameter).abs().argmax())  # in the flattened parameter
    gradient = float(_gradient(parameter).flatten()[position])
    model.zero_grad()
    at = float(parameter.detach().flatten()[position])
    thetas = [at + reach * step / (POINTS // 2) for step in range(-POINTS // 2, POINTS // 2 + 1)]
    losses = _losses_along(model, batches, parameter, position, thetas)
    index = tuple(int(i) for i in np.unravel_index(position, parameter.shape))
    return Landscape(name, index, at, float(loss.detach()), gradient, thetas, losses)


def _gradient(parameter: Tensor) -> Tensor:
    return torch.zeros(()) if parameter.grad is None else parameter.grad


@torch.no_grad()
def _losses_along(
    model: CausalLM, batches: Sequence[Batch], parameter: Tensor, position: int, thetas: Sequence[float]
) -> list[float]:
    flat = parameter.view(-1)
    before = flat[position].clone()
    losses = []
    for theta in thetas:
        flat[position] = theta
        losses.append(float(mean_loss(model, batches)))
    flat[position] = before
    return losses


@dataclass(frozen=True)
class ParameterGradient:
    """A parameter after one backward pass: its requires_grad, and the norm of its gradient (None if it has none)."""

    name: str
    shape: tuple[int, ...]
    trains: bool
    norm: float | None

    @property
    def count(self) -> int:
        return prod(self.shape)

    @property
    def group(self) -> str:
        """The part of the model; for the blocks' linears followed by "W, b", "A" or "B"."""
        *_, module, last = ("", *self.name.split("."))
        if "embed" in self.name or "lm_head" in self.name:
            return "embeddings" if "embed" in self.name else "head"
        if "norm" in self.name:
            return "norms"
        part = "attention" if "attn" in self.name else "feed-forward"
        return f"{part} {last.removeprefix('lora_') if last.startswith('lora_') else 'W, b'}" if module else part


def parameter_gradients(job: Job, spec: AdapterSpec) -> list[ParameterGradient]:
    """One backward pass of the expanded base with freshly initialized A and B, so B = 0 (§4.1). Raises UserError."""
    loaded = engine.load(job.project.artifact("expand_vocab"))
    torch.manual_seed(job.project.params.finetune_lora.seed)
    attach(loaded.model, spec)
    torch.autograd.backward(mean_loss(loaded.model, sentences(job, loaded)))
    return [
        ParameterGradient(name, tuple(p.shape), p.requires_grad, None if p.grad is None else float(p.grad.norm()))
        for name, p in loaded.model.named_parameters()
    ]
