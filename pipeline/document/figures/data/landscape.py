"""What a backward pass finds: the parameter with the largest gradient, the loss along it, and who gets gradients."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from torch import Tensor

from pipeline.adapters.attach import attach
from pipeline.adapters.config import AdapterSpec
from pipeline.data.examples import read_examples
from pipeline.data.masking import encode
from pipeline.data.windows import as_window
from pipeline.document.params import StudyTrajectory
from pipeline.inference import engine
from pipeline.inference.engine import LoadedModel
from pipeline.models.base import CausalLM
from pipeline.project.runner import Job
from pipeline.training.batches import Batch, collate
from pipeline.training.step import loss_of, to_model_device

POINTS = 160  # intervals of the landscape, half of them to each side


@dataclass(frozen=True)
class Landscape:
    """The loss as a function of one parameter, all others as they are; `at` its own value, where the slope is taken."""

    name: str
    index: tuple[int, ...]
    at: float
    loss: float
    gradient: float
    thetas: Sequence[float]
    losses: Sequence[float]

    @property
    def lowest(self) -> tuple[float, float]:
        """θ and loss of the lowest point that was measured."""
        loss, theta = min(zip(self.losses, self.thetas, strict=True))
        return theta, loss

    @property
    def valleys(self) -> int:
        """Points that lie lower than both their neighbours: 1 in a bowl."""
        l = self.losses  # noqa: E741
        return sum(l[n] < l[n - 1] and l[n] < l[n + 1] for n in range(1, len(l) - 1))

    def tangent(self, theta: float) -> float:
        return self.loss + self.gradient * (theta - self.at)


def sentences(job: Job, loaded: LoadedModel) -> list[Batch]:
    """The fact correction's sentences whole, as the model reads them. Raises UserError."""
    name = job.project.params.of(StudyTrajectory).data
    model = loaded.model
    encoded = [encode(e, loaded.tokenizer, 0, model.shape.positions) for e in read_examples(job.path(name), name)]
    return list(to_model_device(model, [collate([as_window(one) for one in encoded])]))


def mean_loss(model: CausalLM, batches: Sequence[Batch]) -> Tensor:
    """Mean cross-entropy over all labels, nats a token."""
    labels = sum(batch.tokens for batch in batches)
    return torch.stack([loss_of(model, batch) * (batch.tokens / labels) for batch in batches]).sum()


def landscape(model: CausalLM, batches: Sequence[Batch], reach: float) -> Landscape:
    """The loss along the parameter with the largest gradient; the model is as before when it returns."""
    model.requires_grad_(True)
    loss = mean_loss(model, batches)
    torch.autograd.backward(loss)
    name, parameter = max(model.named_parameters(), key=lambda pair: float(_gradient(pair[1]).abs().max()))
    number = int(_gradient(parameter).abs().argmax())
    gradient = float(_gradient(parameter).flatten()[number])
    model.zero_grad()
    at = float(parameter.detach().flatten()[number])
    thetas = [at + reach * step / (POINTS // 2) for step in range(-POINTS // 2, POINTS // 2 + 1)]
    losses = _along(model, batches, parameter, number, thetas)
    index = tuple(int(i) for i in np.unravel_index(number, parameter.shape))
    return Landscape(name, index, at, float(loss.detach()), gradient, thetas, losses)


def _gradient(parameter: Tensor) -> Tensor:
    return torch.zeros(()) if parameter.grad is None else parameter.grad


@torch.no_grad()
def _along(
    model: CausalLM, batches: Sequence[Batch], parameter: Tensor, number: int, thetas: Sequence[float]
) -> list[float]:
    flat = parameter.view(-1)
    before = flat[number].clone()
    losses = []
    for theta in thetas:
        flat[number] = theta
        losses.append(float(mean_loss(model, batches)))
    flat[number] = before
    return losses


@dataclass(frozen=True)
class Given:
    """A parameter after one backward pass: whether it was to train, and the norm of its gradient, None without one."""

    name: str
    shape: tuple[int, ...]
    trains: bool
    norm: float | None

    @property
    def count(self) -> int:
        return prod(self.shape)

    @property
    def group(self) -> str:
        """The part of the model that it belongs to, and for linears of the blocks W, A or B."""
        *_, module, last = ("", *self.name.split("."))
        if "embed" in self.name or "lm_head" in self.name:
            return "embeddings" if "embed" in self.name else "head"
        if "norm" in self.name:
            return "norms"
        part = "attention" if "attn" in self.name else "feed-forward"
        return f"{part} {last.removeprefix('lora_') if last.startswith('lora_') else 'W, b'}" if module else part


def given_gradients(job: Job, spec: AdapterSpec) -> list[Given]:
    """One backward pass of the expanded base with A and B as they begin, B = 0 (§4.1). Raises UserError."""
    loaded = engine.load(job.project.artifact("expand_vocab"))
    torch.manual_seed(job.project.params.finetune_lora.seed)
    attach(loaded.model, spec)
    torch.autograd.backward(mean_loss(loaded.model, sentences(job, loaded)))
    return [
        Given(name, tuple(p.shape), p.requires_grad, None if p.grad is None else float(p.grad.norm()))
        for name, p in loaded.model.named_parameters()
    ]
