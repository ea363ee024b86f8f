"""Figure 3: the loss along one parameter, the probabilities of tisch and sofa by step, and the
gradients (§2.3).
"""

import re
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lab.figures import Figures
from lab.report import (
    BLUE,
    GREEN,
    HATCHED,
    INK,
    ORANGE,
    RED,
    SMALL,
    WIDE,
    Axis,
    Figure,
    Findings,
    signed,
)
from lab.runner import delete_runs, describe_window
from lab.studies.trajectory import (
    StudyTrajectory,
    answers_by_step,
    read_document,
    words_of,
)
from lab.tables import Row, Table, shown
from pipeline.adapters.attach import attach
from pipeline.adapters.config import AdapterSpec, read_spec
from pipeline.adapters.lora import LoRALinear
from pipeline.data.formats import read_examples
from pipeline.data.masking import encode
from pipeline.data.windows import as_window
from pipeline.inference import engine
from pipeline.inference.engine import LoadedModel
from pipeline.models.base import CausalLM
from pipeline.project.runner import Event, Job
from pipeline.training.batches import Batch, collate
from pipeline.training.step import loss_of, to_model_device

PLACE = "Figure 3, §2.3"
NAME = "gradient_example"
PLAIN = ".3f"
# of the words, in order
STYLES = ((RED, "--", "o"), (BLUE, "-", "s"), (GREEN, ":", "^"), (ORANGE, "-.", "D"))
POINTS = 160  # intervals along the parameter, half on each side


def render(job: Job) -> Generator[Event, None, Findings]:
    """Trains a short run of the fact correction like study_trajectory, with its first seed. Raises
    UserError.
    """
    settings, own = job.project.params.of(StudyTrajectory), job.project.params.of(Figures)
    loaded = engine.load(job.project.artifact("expand_vocab"))
    claimed = read_document(job, settings)
    prompt, document, words = claimed["prompt"], claimed["steps"], words_of(claimed)
    last = max(*settings.steps, *document)
    answers = yield from answers_by_step(job, settings, prompt, own.window, settings.seeds[0], last)
    delete_runs(job)
    descent = [
        {
            "step": step,
            **{word: asked.probability(prompt, word) for word in words},
            **{f"document_{word}": document.get(step, {}).get(word) for word in words},
        }
        for step, asked in sorted(answers.items())
    ]
    curve = landscape(loaded.model, sentences(job, loaded), own.reach)
    spec = read_spec(job.project.artifact("finetune_lora"), loaded.model.embedding_and_head[0])
    tensors = parameter_gradients(job, spec)
    groups = _groups(tensors)
    along = [
        {"theta": theta, "loss": loss, "tangent": curve.tangent(theta)}
        for theta, loss in zip(curve.thetas, curve.losses, strict=True)
    ]
    tables = (
        Table(
            f"{NAME}_groups",
            "Which tensors have a gradient after one backward pass with LoRA",
            groups,
        ),
        Table(f"{NAME}_descent", f"Probabilities after *{prompt}*, by step", descent),
        Table(f"{NAME}_tensors", "Each tensor after one backward pass", tensors),
        Table(f"{NAME}_landscape", f"Loss along {curve.parameter}", along),
        Table(
            f"{NAME}_formulas", "§4.3's formulas: relative errors against autograd", formulas(job)
        ),
    )

    # In words, with the numbers of the tables.
    keys = ("with_grad", "tensors", "parameters_with_grad", "parameters")
    with_gradient, count, trained, parameters = (sum(row[key] for row in groups) for key in keys)
    shows = (
        f"slope {signed(curve.gradient)} at θ = {signed(curve.at, PLAIN)}, local minima along θ: "
        f"{curve.minima}; with LoRA {with_gradient} of {count} tensors get gradients, {trained:,} "
        f"of {parameters:,} parameters"
    )
    firsts = {step: answers[step].first(prompt) for step in sorted(answers)}
    turning_step = next((step for step, first in firsts.items() if first != firsts[0]), None)
    turn = (
        f"after step {turning_step} the first choice is another word"
        if turning_step
        else "the first choice stays"
    )
    probabilities = ", ".join(f"{word} {descent[-1][word]:.1%}" for word in words)
    (loss, theta), shape = (
        min(zip(curve.losses, curve.thetas, strict=True)),
        "one local minimum, like a bowl",
    )
    if curve.minima != 1:
        shape = f"{curve.minima} local minima, unlike a bowl"
    zero = " and ".join(row["group"] for row in groups if row["grad_norm"] == 0)
    zeros = (
        f" The gradients of {zero} are exactly zero in this first pass, because B = 0 (§4.1, §4.3)."
        if zero
        else ""
    )
    paragraphs = (
        "Left: the loss of the fact correction along the parameter with the largest gradient, "
        f"{curve.parameter} = {signed(curve.at, PLAIN)}. The slope there is "
        f"{signed(curve.gradient)} nats per unit of θ. In the range shown the curve has {shape}. "
        f"At its minimum, θ = {signed(theta, PLAIN)}, the loss is {loss:.2f} instead of "
        f"{curve.loss:.2f}: this parameter alone can reduce it that far.",
        f"Center: the probabilities after *{prompt}* while the correction trains with LoRA and "
        f"Adam on {describe_window(own.window)}; markers are the document's numbers. Measured: "
        f"{turn}; after step {last} {probabilities}.",
        f"Right: after one backward pass with LoRA {with_gradient} of {count} tensors have a "
        f"gradient, {trained:,} of "
        f"{parameters:,} parameters ({trained / parameters:.1%}); the others have none.{zeros}",
    )

    def draw(figure: Figure) -> None:
        left, centre, right = figure.subplots(1, 3, width_ratios=(1, 1, 0.9))
        _draw_landscape(left, curve)
        _draw_descent(centre, descent, words, document)
        _draw_groups(right, groups)

    return Findings(
        "\n\n".join(paragraphs), tables, draw, (WIDE, 2.9), shows, "Gradients explained"
    )


def sentences(job: Job, loaded: LoadedModel) -> list[Batch]:
    """The fact correction's data in one batch of whole sentences, on the model's device. Raises
    UserError.
    """
    name = job.project.params.of(StudyTrajectory).data
    model = loaded.model
    encoded = [
        encode(e, loaded.tokenizer, 0, model.shape.positions)
        for e in read_examples(job.path(name), name)
    ]
    return list(to_model_device(model, [collate([as_window(example) for example in encoded])]))


def mean_loss(model: CausalLM, batches: Sequence[Batch]) -> Tensor:
    """Mean cross-entropy over all labels, in nats per token."""
    labels = sum(batch.tokens for batch in batches)
    return torch.stack([loss_of(model, batch) * (batch.tokens / labels) for batch in batches]).sum()


@dataclass(frozen=True)
class Landscape:
    """The loss as a function of one parameter, the others fixed. `gradient` is the slope at its
    trained value `at`.
    """

    parameter: str  # such as layers.1.fc2.weight[3, 5]
    at: float
    loss: float
    gradient: float
    thetas: Sequence[float]
    losses: Sequence[float]

    @property
    def minima(self) -> int:
        """The number of points below both neighbours; a bowl has 1."""
        l = self.losses  # noqa: E741
        return sum(l[n] < l[n - 1] and l[n] < l[n + 1] for n in range(1, len(l) - 1))

    def tangent(self, theta: float) -> float:
        return self.loss + self.gradient * (theta - self.at)


def landscape(model: CausalLM, batches: Sequence[Batch], reach: float) -> Landscape:
    """The loss along the parameter with the largest gradient. The model's weights are restored
    afterwards.
    """
    model.requires_grad_(True)  # a loaded model is frozen
    loss = mean_loss(model, batches)
    torch.autograd.backward(loss)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    name = max(gradients, key=lambda name: float(gradients[name].abs().max()))
    position = int(gradients[name].abs().argmax())  # in the flattened parameter
    gradient = float(gradients[name].flatten()[position])
    model.zero_grad()
    parameter, losses = model.get_parameter(name), list[float]()
    at = float(parameter.detach().flatten()[position])
    thetas = [at + reach * step / (POINTS // 2) for step in range(-POINTS // 2, POINTS // 2 + 1)]
    with torch.no_grad():
        flat = parameter.view(-1)
        before = flat[position].clone()
        for theta in thetas:
            flat[position] = theta
            losses.append(float(mean_loss(model, batches)))
        flat[position] = before
    index = ", ".join(str(int(i)) for i in np.unravel_index(position, parameter.shape))
    short = name.removesuffix(".weight").removeprefix("model.decoder.")
    return Landscape(f"{short}[{index}]", at, float(loss.detach()), gradient, thetas, losses)


def parameter_gradients(job: Job, spec: AdapterSpec) -> list[Row]:
    """Each tensor after one backward pass of the expanded base with freshly initialized A and B, so
    B = 0 (§4.1).

    Raises UserError.
    """
    loaded = engine.load(job.project.artifact("expand_vocab"))
    torch.manual_seed(job.project.params.finetune_lora.seed)
    attach(loaded.model, spec)
    torch.autograd.backward(mean_loss(loaded.model, sentences(job, loaded)))
    return [
        {
            "tensor": name,
            "group": _group_of(name),
            "parameters": p.numel(),
            "requires_grad": p.requires_grad,
            "has_grad": p.grad is not None,
            "grad_norm": None if p.grad is None else float(p.grad.norm()),
        }
        for name, p in loaded.model.named_parameters()
    ]


def _group_of(name: str) -> str:
    """A tensor's part of the model; for the blocks' linears followed by "W, b", "A" or "B"."""
    if "embed" in name or "lm_head" in name:
        return "embeddings" if "embed" in name else "head"
    if "norm" in name:
        return "norms"
    last = name.rsplit(".", 1)[-1]
    factor = last.removeprefix("lora_") if last.startswith("lora_") else "W, b"
    return f"{'attention' if 'attn' in name else 'feed-forward'} {factor}"


def _groups(tensors: Sequence[Row]) -> list[Row]:
    """One row per group in the model's order; A and B follow their W."""
    names = list(dict.fromkeys(row["group"] for row in tensors))
    parts = list(dict.fromkeys(name.split(" ")[0] for name in names))
    rows: list[Row] = []
    for name in sorted(
        names, key=lambda name: (parts.index(name.split(" ")[0]), "W" not in name, name)
    ):
        group = [row for row in tensors if row["group"] == name]
        given = [row for row in group if row["has_grad"]]
        rows.append(
            {
                "group": name,
                "tensors": len(group),
                "with_grad": len(given),
                "parameters": sum(row["parameters"] for row in group),
                "parameters_with_grad": sum(row["parameters"] for row in given),
                "grad_norm": sum(row["grad_norm"] ** 2 for row in given) ** 0.5 if given else None,
            }
        )
    return rows


@dataclass
class GradientProbe:
    """§4.3: hooks on an adapted layer that compute the document's formulas during a backward pass,
    in fp64.

    `of_A` (R, I) and `of_B` (O, R): the formulas' gradients, summed over all tokens. `back` (2,):
    ‖∂L/∂x‖², and the same without the path through A and B.
    """

    layer: LoRALinear
    of_A: Tensor = field(init=False)
    of_B: Tensor = field(init=False)
    back: Tensor = field(default_factory=lambda: torch.zeros(2, dtype=torch.float64))

    def __post_init__(self) -> None:
        A, B = (p.detach().cpu().double() for p in (self.layer.lora_A, self.layer.lora_B))
        inputs, outputs = (p.detach().cpu().double() for p in self.layer.pair())
        update = self.layer.scale * (outputs @ inputs)  # (O, I)
        self.of_A, self.of_B = torch.zeros_like(A), torch.zeros_like(B)

        def forward(_: Any, inputs: tuple[Tensor], output: Tensor) -> None:
            x = inputs[0].detach().flatten(0, -2).cpu().double()  # (N, I)

            def add(gradient: Tensor) -> None:
                h = gradient.flatten(0, -2).cpu().double()  # ∂L/∂h (N, O)
                self.of_B += self.layer.scale * h.T @ (x @ A.T)
                self.of_A += self.layer.scale * B.T @ h.T @ x

            output.register_hook(add)  # type: ignore[no-untyped-call]

        def backward(_: Any, to: tuple[Tensor], of: tuple[Tensor]) -> None:
            # (N, I), (N, O)
            x_grad, h_grad = (gradient[0].flatten(0, -2).cpu().double() for gradient in (to, of))
            self.back += torch.stack(
                [x_grad.square().sum(), (x_grad - h_grad @ update).square().sum()]
            )

        self.layer.register_forward_hook(forward)
        self.layer.register_full_backward_hook(backward)

    def row(self, name: str) -> Row:
        """Relative errors of the formulas against autograd, and the share of ‖∂L/∂x‖ that comes
        through W₀.
        """
        errors, (total, through_W) = {}, self.back.sqrt()
        for key, formula, parameter in (
            ("A", self.of_A, self.layer.lora_A),
            ("B", self.of_B, self.layer.lora_B),
        ):
            assert parameter.grad is not None
            errors[f"error_{key}"] = float((formula - parameter.grad.cpu()).norm() / formula.norm())
        return {"module": name, **errors, "through_W": float(through_W / total)}


def formulas(job: Job) -> list[Row]:
    """One backward pass of the fact correction through the trained adapter: one row per matrix.
    Raises UserError.
    """
    loaded = engine.load(
        job.project.artifact("expand_vocab"), job.project.artifact("finetune_lora")
    )
    layers = {
        name: module
        for name, module in loaded.model.named_modules()
        if isinstance(module, LoRALinear)
    }
    # else no gradient reaches the first layer's x, and W₀'s share is unknown
    loaded.model.requires_grad_(True)
    # before the hooks: what the model supports is tried, without gradients
    batches = sentences(job, loaded)
    probes = {name: GradientProbe(layer) for name, layer in layers.items()}
    torch.autograd.backward(mean_loss(loaded.model, batches))
    return [probe.row(name) for name, probe in probes.items()]


def _draw_landscape(axis: Axis, curve: Landscape) -> None:
    axis.plot(curve.thetas, curve.losses, color=BLUE, label="loss")
    reach = (max(curve.thetas) - min(curve.thetas)) / 5
    ends = (curve.at - reach, curve.at + reach)
    axis.plot(
        ends,
        [curve.tangent(at) for at in ends],
        "--",
        color=RED,
        label=f"slope {signed(curve.gradient)}",
    )
    axis.plot(
        curve.at, curve.loss, "o", color=INK, markersize=4.5, label=f"θ = {signed(curve.at, PLAIN)}"
    )
    block = re.search(r"\.(\d+)\.", curve.parameter)
    name = (f"block {block[1]}, " if block else "") + curve.parameter.rsplit(".", 1)[-1]
    axis.set(
        title="(a) Loss along one parameter", xlabel=f"θ = {name}", ylabel="loss (nats per token)"
    )
    axis.grid(alpha=0.3)
    axis.legend()


def _draw_descent(
    axis: Axis,
    descent: Sequence[Row],
    words: Sequence[str],
    document: Mapping[int, Mapping[str, float]],
) -> None:
    steps = [row["step"] for row in descent]
    for word, (color, line, marker) in zip(words, STYLES, strict=False):
        axis.plot(steps, [row[word] for row in descent], line, color=color, label=word)
        style = {
            "color": color,
            "markersize": 4.5,
            "markeredgecolor": INK,
            "markeredgewidth": 0.5,
            "clip_on": False,
        }
        axis.plot(list(document), [by_word[word] for by_word in document.values()], marker, **style)
    title = f"(b) From {words[0]} to {words[1]}"
    axis.set(title=title, xlabel="step; markers: the document", ylabel="probability", ylim=(0, 1))
    axis.grid(alpha=0.3)
    axis.legend(loc="center right")


def _draw_groups(axis: Axis, groups: Sequence[Row]) -> None:
    """One bar per group, the first at the top: parameters with a gradient filled, the others
    hatched.
    """
    rows = groups[::-1]
    counts, given = ([row[key] for row in rows] for key in ("parameters", "parameters_with_grad"))
    without = [count - with_gradient for count, with_gradient in zip(counts, given, strict=True)]
    axis.barh(range(len(rows)), given, 0.7, label="gradient", color=GREEN)
    axis.barh(range(len(rows)), without, 0.7, label="none", **HATCHED)
    for y, count in enumerate(counts):
        axis.text(count + max(counts) / 40, y, shown(count), va="center", fontsize=SMALL)
    axis.set_yticks(range(len(rows)), [row["group"] for row in rows])
    axis.set(title="(c) Gradients by group", xlabel="parameters", xlim=(0, 1.45 * max(counts)))
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.locator_params(axis="x", nbins=3)
    axis.legend(loc="best")
