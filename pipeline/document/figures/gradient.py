"""Figure 3: the loss along one parameter, the way from tisch to sofa, and which tensors get gradients (§2.3)."""

import re
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from pipeline.document.figures.data.changes import trained_by
from pipeline.document.figures.data.formulas import formulas
from pipeline.document.figures.data.landscape import Given, Landscape, given_gradients, landscape, sentences
from pipeline.document.figures.draw.figure import RenderedFigure
from pipeline.document.figures.draw.style import BLUE, EDGE, FROZEN, GREEN, HATCH, INK, ORANGE, RED, SMALL, WIDE, signed
from pipeline.document.params import Figures, StudyTrajectory
from pipeline.document.studies.shared.next_token import NextTokenAnswers, ask, document, refuse_unsayable
from pipeline.document.studies.shared.report import Figure
from pipeline.document.studies.shared.runner import delete_runs, evaluate_checkpoints, named
from pipeline.document.studies.trajectory import SECTION, run_of, words_of
from pipeline.document.tables import Row, Table, shown
from pipeline.inference import engine
from pipeline.inference.engine import LoadedModel
from pipeline.project.runner import Event, Job

NAME = "gradient_example"
PLAIN = ".3f"
LOOKS = ((RED, "--", "o"), (BLUE, "-", "s"), (GREEN, ":", "^"), (ORANGE, "-.", "D"))  # of the words, in order


@dataclass(frozen=True)
class Descent:
    """What the model says after each step of the fact correction, and what the document says of some."""

    prompt: str
    trained_on: str
    said: Mapping[int, NextTokenAnswers]
    document: Mapping[int, Mapping[str, float]]

    @property
    def words(self) -> list[str]:
        return list(next(iter(self.document.values())))

    def probability(self, step: int, word: str) -> float:
        return self.said[step].probability(self.prompt, word)

    @property
    def turn(self) -> int | None:
        """The first step after which another word is the likeliest."""
        first = self.said[0].first(self.prompt)
        return next((step for step in sorted(self.said) if self.said[step].first(self.prompt) != first), None)


def gradient_example(job: Job) -> Generator[Event, None, RenderedFigure]:
    """Figure 3, with a short run of the fact correction. Raises UserError."""
    loaded = engine.load(job.project.artifact("expand_vocab"))
    descent = yield from _descent(job, loaded)
    seen = landscape(loaded.model, sentences(job, loaded), job.project.params.of(Figures).reach)
    given = given_gradients(job, trained_by(job, loaded.model).spec)
    groups = _groups(given)
    return RenderedFigure(
        NAME,
        "Figure 3, §2.3",
        "Gradients explained",
        _shows(seen, groups),
        _caption(seen, descent, groups),
        (groups, _descent_table(descent), _tensors(given), _landscape(seen), formulas(job)),
        lambda figure: _draw(figure, seen, descent, groups),
        (WIDE, 2.9),
    )


def _descent(job: Job, loaded: LoadedModel) -> Generator[Event, None, Descent]:
    """As study_trajectory trains, with its first seed."""
    settings = job.project.params.of(StudyTrajectory)
    claimed = document(job.path(settings.document), settings.document, SECTION)
    refuse_unsayable(loaded, [(claimed["prompt"], word) for word in words_of(claimed)], settings.document)
    window, last = job.project.params.of(Figures).window, max(*settings.steps, *claimed["steps"])
    run = run_of(settings, window, settings.seeds[0], last)
    said = yield from evaluate_checkpoints(
        job, run, lambda _: range(last + 1), partial(ask, prompts=[claimed["prompt"]])
    )
    delete_runs(job)
    return Descent(claimed["prompt"], named(window), said, claimed["steps"])


def _landscape(seen: Landscape) -> Table:
    rows: list[Row] = [
        {"theta": theta, "loss": loss, "tangent": seen.tangent(theta)}
        for theta, loss in zip(seen.thetas, seen.losses, strict=True)
    ]
    return Table(f"{NAME}_landscape", f"Loss along {_called(seen)}", rows)


def _called(seen: Landscape) -> str:
    return f"{seen.name.removesuffix('.weight').removeprefix('model.decoder.')}[{', '.join(map(str, seen.index))}]"


def _descent_table(descent: Descent) -> Table:
    rows: list[Row] = [
        {
            "step": step,
            **{word: descent.probability(step, word) for word in descent.words},
            **{f"document_{word}": descent.document.get(step, {}).get(word) for word in descent.words},
        }
        for step in sorted(descent.said)
    ]
    return Table(f"{NAME}_descent", f"Probabilities after *{descent.prompt}*, by step", rows)


def _tensors(given: Sequence[Given]) -> Table:
    rows: list[Row] = [
        {
            "tensor": one.name,
            "group": one.group,
            "parameters": one.count,
            "requires_grad": one.trains,
            "has_grad": one.norm is not None,
            "grad_norm": one.norm,
        }
        for one in given
    ]
    return Table(f"{NAME}_tensors", "Each tensor after one backward pass", rows)


def _groups(given: Sequence[Given]) -> Table:
    """In the model's order: what has A and B after its W."""
    names = list(dict.fromkeys(one.group for one in given))
    rows: list[Row] = []
    for name in sorted(names, key=lambda name: (_first_of(name, names), "W" not in name, name)):
        own = [one for one in given if one.group == name]
        norms = [one.norm for one in own if one.norm is not None]
        rows.append(
            {
                "group": name,
                "tensors": len(own),
                "with_grad": len(norms),
                "parameters": sum(one.count for one in own),
                "parameters_with_grad": sum(one.count for one in own if one.norm is not None),
                "grad_norm": sum(norm**2 for norm in norms) ** 0.5 if norms else None,
            }
        )
    return Table(f"{NAME}_groups", "Which tensors have a gradient after one backward pass with LoRA", rows)


def _first_of(name: str, names: Sequence[str]) -> int:
    return next(n for n, other in enumerate(names) if other.split(" ")[0] == name.split(" ")[0])


def _sums(groups: Table) -> tuple[int, int, int, int]:
    """Tensors with a gradient, of all; parameters with one, of all."""
    keys = ("with_grad", "tensors", "parameters_with_grad", "parameters")
    a, b, c, d = (sum(int(str(row[key])) for row in groups.rows) for key in keys)
    return a, b, c, d


def _shows(seen: Landscape, groups: Table) -> str:
    tensors, of, parameters, all_ = _sums(groups)
    return (
        f"slope {signed(seen.gradient)} at θ = {signed(seen.at, PLAIN)}, valleys along θ: {seen.valleys}; "
        f"with LoRA {tensors} of {of} tensors get gradients, {parameters:,} of {all_:,} parameters"
    )


def _caption(seen: Landscape, descent: Descent, groups: Table) -> str:
    tensors, of, parameters, all_ = _sums(groups)
    theta, loss = seen.lowest
    last, turn = max(descent.said), descent.turn
    ends = ", ".join(f"{word} {descent.probability(last, word):.1%}" for word in descent.words)
    bowl = "one valley, a bowl" if seen.valleys == 1 else f"{seen.valleys} valleys, and so no bowl"
    turns = f"after step {turn} another word is the likeliest" if turn else "the likeliest word stays"
    return "\n\n".join(
        [
            "Left: the fact correction's loss along the parameter whose gradient is the largest of all, "
            f"{_called(seen)} = {signed(seen.at, PLAIN)}. The slope there is {signed(seen.gradient)} nats a unit of θ. "
            f"Within reach the curve has {bowl}; at its lowest, θ = {signed(theta, PLAIN)}, the loss is {loss:.2f} "
            f"instead of {seen.loss:.2f}: so much can this parameter alone take away.",
            f"Centre: the probabilities after *{descent.prompt}* while the correction trains with LoRA and Adam on "
            f"{descent.trained_on}; markers are the document's numbers. Measured: {turns}; after step {last} {ends}.",
            f"Right: after one backward pass with LoRA {tensors} of {of} tensors have a gradient, which are "
            f"{parameters:,} of {all_:,} parameters ({parameters / all_:.1%}); the others have none at all."
            f"{_zero(groups)}",
        ]
    )


def _zero(groups: Table) -> str:
    zero = [str(row["group"]) for row in groups.rows if row["grad_norm"] == 0]
    if not zero:
        return ""
    return f" Those of {' and '.join(zero)} are exactly zero in this first pass, as B = 0 (§4.1, §4.3)."


def _draw(figure: Figure, seen: Landscape, descent: Descent, groups: Table) -> None:
    left, centre, right = figure.subplots(1, 3, width_ratios=(1, 1, 0.9))
    _draw_landscape(left, seen)
    _draw_descent(centre, descent)
    _draw_groups(right, groups)


def _draw_landscape(axis: Any, seen: Landscape) -> None:
    axis.plot(seen.thetas, seen.losses, color=BLUE, label="loss")
    reach = (max(seen.thetas) - min(seen.thetas)) / 5
    ends = (seen.at - reach, seen.at + reach)
    axis.plot(ends, [seen.tangent(theta) for theta in ends], "--", color=RED, label=f"slope {signed(seen.gradient)}")
    axis.plot(seen.at, seen.loss, "o", color=INK, markersize=4.5, label=f"θ = {signed(seen.at, PLAIN)}")
    axis.set(title="(a) Loss along one parameter", xlabel=f"θ = {_short(seen)}", ylabel="loss (nats a token)")
    axis.grid(alpha=0.3)
    axis.legend()


def _short(seen: Landscape) -> str:
    """In the picture, which has little room: its block and its own module."""
    block = re.search(r"\.(\d+)\.", seen.name)
    return (f"block {block[1]}, " if block else "") + _called(seen).rsplit(".", 1)[-1]


def _draw_descent(axis: Any, descent: Descent) -> None:
    steps = sorted(descent.said)
    for word, (color, line, marker) in zip(descent.words, LOOKS, strict=False):
        axis.plot(steps, [descent.probability(step, word) for step in steps], line, color=color, label=word)
        told = {step: said[word] for step, said in descent.document.items()}
        look = {"color": color, "markersize": 4.5, "markeredgecolor": INK, "markeredgewidth": 0.5, "clip_on": False}
        axis.plot(list(told), list(told.values()), marker, **look)
    title = f"(b) From {descent.words[0]} to {descent.words[1]}"
    axis.set(title=title, xlabel="step; markers: the document", ylabel="probability", ylim=(0, 1))
    axis.grid(alpha=0.3)
    axis.legend(loc="center right")


def _draw_groups(axis: Any, groups: Table) -> None:
    """A bar each, first on top: what has gradients is filled, the rest hatched."""
    rows = groups.rows[::-1]
    sides = (
        ("gradient", [row["parameters_with_grad"] for row in rows], {"color": GREEN}),
        (
            "none",
            [int(str(row["parameters"])) - int(str(row["parameters_with_grad"])) for row in rows],
            {"color": FROZEN, "edgecolor": EDGE, "hatch": HATCH},
        ),
    )
    for label, counts, look in sides:
        axis.barh(range(len(rows)), counts, 0.7, label=label, **look)
    most = max(int(str(row["parameters"])) for row in rows)
    for y, row in enumerate(rows):
        axis.text(int(str(row["parameters"])) + most / 40, y, shown(row["parameters"]), va="center", fontsize=SMALL)
    axis.set_yticks(range(len(rows)), [str(row["group"]) for row in rows])
    axis.set(title="(c) Who gets gradients", xlabel="parameters", xlim=(0, 1.45 * most))
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.locator_params(axis="x", nbins=3)
    axis.legend(loc="best")
