"""Figure 3: the loss along one parameter, the probabilities of tisch and sofa by step, and the gradients (§2.3)."""

import re
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from pipeline.document.figures.data.changes import trained_by
from pipeline.document.figures.data.formulas import formulas
from pipeline.document.figures.data.landscape import (
    Landscape,
    ParameterGradient,
    landscape,
    parameter_gradients,
    sentences,
)
from pipeline.document.figures.draw.figure import RenderedFigure
from pipeline.document.figures.draw.style import BLUE, EDGE, FROZEN, GREEN, HATCH, INK, ORANGE, RED, SMALL, WIDE, signed
from pipeline.document.params import Figures, StudyTrajectory
from pipeline.document.studies.shared.next_token import NextTokenAnswers, ask, check_words, document
from pipeline.document.studies.shared.report import Figure
from pipeline.document.studies.shared.runner import delete_runs, describe_window, evaluate_checkpoints
from pipeline.document.studies.trajectory import SECTION, run_of, words_of
from pipeline.document.tables import Row, Table, shown
from pipeline.inference import engine
from pipeline.inference.engine import LoadedModel
from pipeline.project.runner import Event, Job

NAME = "gradient_example"
PLAIN = ".3f"
STYLES = ((RED, "--", "o"), (BLUE, "-", "s"), (GREEN, ":", "^"), (ORANGE, "-.", "D"))  # of the words, in order


@dataclass(frozen=True)
class Descent:
    """The model's answers by step of the fact correction; the document's probabilities by step and word."""

    prompt: str
    trained_on: str
    answers: Mapping[int, NextTokenAnswers]
    document: Mapping[int, Mapping[str, float]]

    @property
    def words(self) -> list[str]:
        return list(next(iter(self.document.values())))

    def probability(self, step: int, word: str) -> float:
        return self.answers[step].probability(self.prompt, word)

    @property
    def turning_step(self) -> int | None:
        """The first step after which the first choice differs from the base's; None if it never does."""
        first = self.answers[0].first(self.prompt)
        return next((step for step in sorted(self.answers) if self.answers[step].first(self.prompt) != first), None)


def gradient_example(job: Job) -> Generator[Event, None, RenderedFigure]:
    """Figure 3; trains a short run of the fact correction. Raises UserError."""
    loaded = engine.load(job.project.artifact("expand_vocab"))
    descent = yield from _train(job, loaded)
    curve = landscape(loaded.model, sentences(job, loaded), job.project.params.of(Figures).reach)
    gradients = parameter_gradients(job, trained_by(job, loaded.model).spec)
    groups = _groups(gradients)
    return RenderedFigure(
        NAME,
        "Figure 3, §2.3",
        "Gradients explained",
        _summary(curve, groups),
        _caption(curve, descent, groups),
        (groups, _descent_table(descent), _tensors(gradients), _landscape_table(curve), formulas(job)),
        lambda figure: _draw(figure, curve, descent, groups),
        (WIDE, 2.9),
    )


def _train(job: Job, loaded: LoadedModel) -> Generator[Event, None, Descent]:
    """Train like study_trajectory, with its first seed, and ask the model after every step."""
    settings = job.project.params.of(StudyTrajectory)
    claimed = document(job.path(settings.document), settings.document, SECTION)
    check_words(loaded, [(claimed["prompt"], word) for word in words_of(claimed)], settings.document)
    window, last = job.project.params.of(Figures).window, max(*settings.steps, *claimed["steps"])
    run = run_of(settings, window, settings.seeds[0], last)
    answers = yield from evaluate_checkpoints(
        job, run, lambda _: range(last + 1), partial(ask, prompts=[claimed["prompt"]])
    )
    delete_runs(job)
    return Descent(claimed["prompt"], describe_window(window), answers, claimed["steps"])


def _landscape_table(curve: Landscape) -> Table:
    rows: list[Row] = [
        {"theta": theta, "loss": loss, "tangent": curve.tangent(theta)}
        for theta, loss in zip(curve.thetas, curve.losses, strict=True)
    ]
    return Table(f"{NAME}_landscape", f"Loss along {_parameter_name(curve)}", rows)


def _parameter_name(curve: Landscape) -> str:
    return f"{curve.name.removesuffix('.weight').removeprefix('model.decoder.')}[{', '.join(map(str, curve.index))}]"


def _descent_table(descent: Descent) -> Table:
    rows: list[Row] = [
        {
            "step": step,
            **{word: descent.probability(step, word) for word in descent.words},
            **{f"document_{word}": descent.document.get(step, {}).get(word) for word in descent.words},
        }
        for step in sorted(descent.answers)
    ]
    return Table(f"{NAME}_descent", f"Probabilities after *{descent.prompt}*, by step", rows)


def _tensors(gradients: Sequence[ParameterGradient]) -> Table:
    rows: list[Row] = [
        {
            "tensor": gradient.name,
            "group": gradient.group,
            "parameters": gradient.count,
            "requires_grad": gradient.trains,
            "has_grad": gradient.norm is not None,
            "grad_norm": gradient.norm,
        }
        for gradient in gradients
    ]
    return Table(f"{NAME}_tensors", "Each tensor after one backward pass", rows)


def _groups(gradients: Sequence[ParameterGradient]) -> Table:
    """One row per group in the model's order; A and B follow their W."""
    names = list(dict.fromkeys(gradient.group for gradient in gradients))
    rows: list[Row] = []
    for name in sorted(names, key=lambda name: (_part_index(name, names), "W" not in name, name)):
        group = [gradient for gradient in gradients if gradient.group == name]
        norms = [gradient.norm for gradient in group if gradient.norm is not None]
        rows.append(
            {
                "group": name,
                "tensors": len(group),
                "with_grad": len(norms),
                "parameters": sum(gradient.count for gradient in group),
                "parameters_with_grad": sum(gradient.count for gradient in group if gradient.norm is not None),
                "grad_norm": sum(norm**2 for norm in norms) ** 0.5 if norms else None,
            }
        )
    return Table(f"{NAME}_groups", "Which tensors have a gradient after one backward pass with LoRA", rows)


def _part_index(name: str, names: Sequence[str]) -> int:
    return next(n for n, other in enumerate(names) if other.split(" ")[0] == name.split(" ")[0])


def _totals(groups: Table) -> tuple[int, int, int, int]:
    """The numbers of tensors with a gradient, of all tensors, of parameters with a gradient, of all parameters."""
    keys = ("with_grad", "tensors", "parameters_with_grad", "parameters")
    a, b, c, d = (sum(int(str(row[key])) for row in groups.rows) for key in keys)
    return a, b, c, d


def _summary(curve: Landscape, groups: Table) -> str:
    with_gradient, tensors, trained, parameters = _totals(groups)
    return (
        f"slope {signed(curve.gradient)} at θ = {signed(curve.at, PLAIN)}, local minima along θ: {curve.minima}; "
        f"with LoRA {with_gradient} of {tensors} tensors get gradients, {trained:,} of {parameters:,} parameters"
    )


def _caption(curve: Landscape, descent: Descent, groups: Table) -> str:
    with_gradient, tensors, trained, parameters = _totals(groups)
    theta, loss = curve.lowest
    last, turning_step = max(descent.answers), descent.turning_step
    probabilities = ", ".join(f"{word} {descent.probability(last, word):.1%}" for word in descent.words)
    shape = "one local minimum, like a bowl" if curve.minima == 1 else f"{curve.minima} local minima, unlike a bowl"
    turn = f"after step {turning_step} the first choice is another word" if turning_step else "the first choice stays"
    return "\n\n".join(
        [
            "Left: the loss of the fact correction along the parameter with the largest gradient, "
            f"{_parameter_name(curve)} = {signed(curve.at, PLAIN)}. The slope there is {signed(curve.gradient)} nats "
            f"per unit of θ. In the range shown the curve has {shape}. At its minimum, θ = {signed(theta, PLAIN)}, the "
            f"loss is {loss:.2f} instead of {curve.loss:.2f}: this parameter alone can reduce it that far.",
            f"Center: the probabilities after *{descent.prompt}* while the correction trains with LoRA and Adam on "
            f"{descent.trained_on}; markers are the document's numbers. Measured: {turn}; after step {last} "
            f"{probabilities}.",
            f"Right: after one backward pass with LoRA {with_gradient} of {tensors} tensors have a gradient, "
            f"{trained:,} of {parameters:,} parameters ({trained / parameters:.1%}); the others have none."
            f"{_describe_zero_gradients(groups)}",
        ]
    )


def _describe_zero_gradients(groups: Table) -> str:
    zero = [str(row["group"]) for row in groups.rows if row["grad_norm"] == 0]
    if not zero:
        return ""
    return f" The gradients of {' and '.join(zero)} are exactly zero in this first pass, because B = 0 (§4.1, §4.3)."


def _draw(figure: Figure, curve: Landscape, descent: Descent, groups: Table) -> None:
    left, centre, right = figure.subplots(1, 3, width_ratios=(1, 1, 0.9))
    _draw_landscape(left, curve)
    _draw_descent(centre, descent)
    _draw_groups(right, groups)


def _draw_landscape(axis: Any, curve: Landscape) -> None:
    axis.plot(curve.thetas, curve.losses, color=BLUE, label="loss")
    reach = (max(curve.thetas) - min(curve.thetas)) / 5
    tangent_ends = (curve.at - reach, curve.at + reach)
    axis.plot(
        tangent_ends,
        [curve.tangent(theta) for theta in tangent_ends],
        "--",
        color=RED,
        label=f"slope {signed(curve.gradient)}",
    )
    axis.plot(curve.at, curve.loss, "o", color=INK, markersize=4.5, label=f"θ = {signed(curve.at, PLAIN)}")
    axis.set(title="(a) Loss along one parameter", xlabel=f"θ = {_short_name(curve)}", ylabel="loss (nats per token)")
    axis.grid(alpha=0.3)
    axis.legend()


def _short_name(curve: Landscape) -> str:
    """The parameter's block and last name, for the axis label."""
    block = re.search(r"\.(\d+)\.", curve.name)
    return (f"block {block[1]}, " if block else "") + _parameter_name(curve).rsplit(".", 1)[-1]


def _draw_descent(axis: Any, descent: Descent) -> None:
    steps = sorted(descent.answers)
    for word, (color, line, marker) in zip(descent.words, STYLES, strict=False):
        axis.plot(steps, [descent.probability(step, word) for step in steps], line, color=color, label=word)
        claimed = {step: by_word[word] for step, by_word in descent.document.items()}
        style = {"color": color, "markersize": 4.5, "markeredgecolor": INK, "markeredgewidth": 0.5, "clip_on": False}
        axis.plot(list(claimed), list(claimed.values()), marker, **style)
    title = f"(b) From {descent.words[0]} to {descent.words[1]}"
    axis.set(title=title, xlabel="step; markers: the document", ylabel="probability", ylim=(0, 1))
    axis.grid(alpha=0.3)
    axis.legend(loc="center right")


def _draw_groups(axis: Any, groups: Table) -> None:
    """One bar per group, the first at the top: parameters with a gradient filled, the others hatched."""
    rows = groups.rows[::-1]
    sides = (
        ("gradient", [row["parameters_with_grad"] for row in rows], {"color": GREEN}),
        (
            "none",
            [int(str(row["parameters"])) - int(str(row["parameters_with_grad"])) for row in rows],
            {"color": FROZEN, "edgecolor": EDGE, "hatch": HATCH},
        ),
    )
    for label, counts, style in sides:
        axis.barh(range(len(rows)), counts, 0.7, label=label, **style)
    most = max(int(str(row["parameters"])) for row in rows)
    for y, row in enumerate(rows):
        axis.text(int(str(row["parameters"])) + most / 40, y, shown(row["parameters"]), va="center", fontsize=SMALL)
    axis.set_yticks(range(len(rows)), [str(row["group"]) for row in rows])
    axis.set(title="(c) Gradients by group", xlabel="parameters", xlim=(0, 1.45 * most))
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.locator_params(axis="x", nbins=3)
    axis.legend(loc="best")
