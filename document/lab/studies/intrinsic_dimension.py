"""study_intrinsic_dimension: full fine-tuning in random subspaces, and the smallest sufficient
dimension (§2.2).

The document quotes Aghajanyan et al. 2021: few dimensions are enough for RoBERTa-Large, because it
is pretrained. Here MiniGPT is trained as θ = θ₀ + Pθ_d, for as many steps as full fine-tuning, from
the expanded base and from random weights.
"""

from collections.abc import Generator, Mapping, Sequence
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Annotated

from msgspec.structs import replace

from lab.measures import document
from lab.report import COLORS, Figure, Findings, error_bars
from lab.runner import Run, train_with
from lab.studies import study_stage
from lab.tables import Row, Spread, Table, shown
from pipeline.data.formats import read_examples
from pipeline.project.params.schema import Count, Rate, Section, Seed, Share
from pipeline.project.params.sections import Training
from pipeline.project.runner import Event, Job, Progress
from pipeline.stages.methods.full import FinetuneFull

if TYPE_CHECKING:
    from pipeline.inference.score import EvalScores

PLACE = "§2.2"
PAPER_MODEL = "RoBERTa-Large"
BASE, RANDOM = "base", "random weights"
SLACK = 1e-9  # for rounding: accuracies are fractions of a few tokens


class StudyIntrinsicDimension(Section, frozen=True, kw_only=True):
    """§2.2: full fine-tuning in random subspaces of the given dimensions."""

    data: Annotated[str, "the sentences that it trains or measures on"] = "data/finetune.de.txt"
    document: Annotated[str, "the document's numbers and answers"] = "data/document.yaml"
    seeds: Annotated[tuple[Seed, ...], "each is a run of its own"] = (0, 1)
    dimensions: Annotated[tuple[Count, ...], "dimensions of the random subspace"] = (128, 256, 512)
    learning_rate: Annotated[Rate, "per weight; scaled up for the subspace's own parameters"] = 1e-2
    share: Annotated[Share, "of full fine-tuning's accuracy that counts as enough"] = 0.9


STAGE = study_stage(
    __name__,
    PLACE,
    title="Intrinsic dimension",
    about="full fine-tuning in random subspaces, and the least that is enough",
    settings=StudyIntrinsicDimension,
    data=("data", "document"),
)


def measure(job: Job, settings: StudyIntrinsicDimension) -> Generator[Event, None, Findings]:
    """Train from each start in each dimension and in full, with each seed → two tables."""
    import torch

    from lab.random_subspace import OneHot, SubspaceAdam
    from pipeline.inference import engine
    from pipeline.inference.score import EvalScores, score
    from pipeline.models.base import CausalLM
    from pipeline.models.load import count, untrained
    from pipeline.training.optimizer import FlatOptimizer
    from pipeline.training.task import build_optimizer

    examples = read_examples(job.path(settings.data), settings.data)
    paper = document(job, settings.document, "intrinsic_dimension")[PAPER_MODEL]
    folder = job.artifact("expand_vocab")
    base = engine.load(folder)
    large = count(base.model)["total"]

    def optimizer_of(
        start: str, size: int, seed: int, model: CausalLM, section: Training
    ) -> FlatOptimizer:
        """The run's optimizer, after loading random weights if it starts from them."""
        if start == RANDOM:
            torch.manual_seed(seed)
            model.load_state_dict(untrained(folder).state_dict())
        if size == large:
            return build_optimizer(model, section)
        return SubspaceAdam(model, OneHot(count(model)["trainable"], size, seed))

    scores: dict[tuple[str, int], list[EvalScores]] = {(BASE, 0): [score(base, examples)]}
    sizes = [*product((BASE, RANDOM), sorted(settings.dimensions)), (BASE, large)]
    wanted = [(start, size, seed) for start, size in sizes for seed in settings.seeds]
    for number, (start, size, seed) in enumerate(wanted, 1):
        section = FinetuneFull(data=settings.data, seed=seed)
        if size < large:  # full fine-tuning has its own learning rate
            section = replace(section, learning_rate=settings.learning_rate)
        run = Run(
            f"{start}, {size:,} dimensions, seed {seed}",
            "finetune_full",
            {"finetune_full": section},
        )
        loaded = yield from train_with(job, run, partial(optimizer_of, start, size, seed))
        scores.setdefault((start, size), []).append(score(loaded, examples))
        yield Progress(number, len(wanted), run.name)

    full = Spread.of(result.accuracy for result in scores[BASE, large])
    dimensions: list[Row] = []
    for (start, size), by_seed in scores.items():
        right = Spread.of(result.accuracy for result in by_seed)
        dimensions.append(
            {
                "begins": start,
                "dimensions": size,
                "share": size / large,
                "right": right,
                "of_full": right / full,
                "enough": right >= settings.share * full - SLACK,
                "loss": Spread.of(result.loss for result in by_seed),
            }
        )
    # of the same seed
    enough = [settings.share * result.accuracy - SLACK for result in scores[BASE, large]]
    low, high = paper["least"], paper["greatest"]
    sufficient = {
        "MiniGPT": (large, _smallest_sufficient(scores, BASE, large, enough)),
        f"MiniGPT, {RANDOM}": (large, _smallest_sufficient(scores, RANDOM, large, enough)),
        PAPER_MODEL: (paper["parameters"], Spread((low + high) / 2, low, high)),
    }
    least = [
        {
            "model": name,
            "parameters": parameters,
            "least": cell,
            "share": cell / parameters if cell else None,
        }
        for name, (parameters, cell) in sufficient.items()
    ]
    formats, title = (
        {"share": ".2%", "right": ".0%", "of_full": ".0%", "loss": ".2f"},
        "Training in random subspaces",
    )
    enough_title = f"Dimensions that reach {settings.share:.0%} of full fine-tuning"
    tables = (
        Table("dimensions", f"{title}; the last row is full fine-tuning", dimensions, formats),
        Table("least", enough_title, least, {"least": ".0f", "share": ".5%"}),
    )
    text = _text(settings, dimensions, least, len(scores[BASE, 0][0].labels))
    return Findings(text, tables, lambda figure: _draw(figure, settings.share, dimensions), (7, 4))


def _smallest_sufficient(
    scores: "Mapping[tuple[str, int], Sequence[EvalScores]]",
    start: str,
    large: int,
    enough: Sequence[float],
) -> Spread | None:
    """The smallest dimension in which each seed reaches its `enough`; None if one of them does in
    none.
    """
    tried = {
        size: by_seed
        for (begins, size), by_seed in scores.items()
        if begins == start and 0 < size < large
    }
    least = [
        next(
            (size for size, by_seed in tried.items() if by_seed[number].accuracy >= accuracy), None
        )
        for number, accuracy in enumerate(enough)
    ]
    sufficient = [size for size in least if size is not None]
    return Spread.of(sufficient) if len(sufficient) == len(least) else None


def _text(
    settings: StudyIntrinsicDimension, dimensions: Sequence[Row], least: Sequence[Row], labels: int
) -> str:
    def takes(row: Row) -> str:
        if row["least"] is None:
            return "more dimensions than tried"
        return (
            f"{shown(row['least'], '.0f')} of {shown(row['parameters'])} parameters "
            f"({shown(row['share'], '.2%')})"
        )

    first, *inner, last = dimensions
    right = {
        start: {r["dimensions"]: shown(r["right"], ".0%") for r in inner if r["begins"] == start}
        for start in (BASE, RANDOM)
    }
    from_base, from_random = (
        ", ".join(f"{size:,} → {said}" for size, said in by.items()) for by in right.values()
    )
    (ours, random, paper), share, low = least, f"{settings.share:.0%}", min(settings.dimensions)
    paragraphs = (
        f"*Right*: the share of the {labels} next tokens of `{settings.data}` that are the model's "
        f"first choice: {shown(first['right'], '.0%')} before training, "
        f"{shown(last['right'], '.0%')} after full fine-tuning. In d dimensions only d numbers "
        "train; a random isometry with one nonzero entry per row maps them to the weights. The "
        "number of steps is the same.",
        f"From the base: {from_base}. So {share} of full fine-tuning's accuracy takes "
        f"{takes(ours)}. From random weights: {from_random}; {share} takes {takes(random)}.",
        f"The paper's {paper['model']} takes {paper['least'].low:.0f} to {paper['least'].high:.0f} "
        f"of {shown(paper['parameters'])}. Few dimensions are enough here as well. The effect of "
        f"pretraining: in {low:,} dimensions the base reaches {right[BASE][low]}, random weights "
        f"{right[RANDOM][low]}.",
    )
    return "\n\n".join(paragraphs)


def _draw(figure: Figure, share: float, dimensions: Sequence[Row]) -> None:
    """The accuracy by dimensions from each start, beside full fine-tuning and the base."""
    axis = figure.subplots()
    base, *inner, full = dimensions
    for start, color, marker in ((BASE, "lora", "o"), (RANDOM, "scratch", "s")):
        cells = {row["dimensions"]: row["right"] for row in inner if row["begins"] == start}
        error_bars(
            axis,
            cells,
            list(cells.values()),
            marker=marker,
            color=COLORS[color],
            label=f"from {start}",
        )
    for row, label, line in ((full, "full fine-tuning", "-"), (base, "the base", ":")):
        axis.axhline(row["right"], color=COLORS["full"], linestyle=line, label=label)
    enough = share * full["right"]
    axis.axhline(enough, color="black", linewidth=0.8, linestyle="--", label=f"{share:.0%} of it")
    axis.set(xscale="log", xlabel="dimensions d", ylabel="next tokens right", ylim=(0, 1))
    axis.set_xticks(list(cells), [str(size) for size in cells])
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
