"""study_intrinsic_dimension: full fine-tuning in random subspaces, and the smallest sufficient dimension (§2.2).

The document quotes Aghajanyan et al. 2021: few dimensions are enough for RoBERTa-Large, because it is pretrained. Here
MiniGPT is trained as θ = θ₀ + Pθ_d, for as many steps as full fine-tuning, from the expanded base and from random
weights.
"""

from collections.abc import Generator, Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from pipeline.data.read import read_examples
from pipeline.document.params import StudyIntrinsicDimension
from pipeline.document.random_subspace import OneHot, SubspaceAdam
from pipeline.document.studies.shared.next_token import document
from pipeline.document.studies.shared.report import Figure, Findings, write_report
from pipeline.document.studies.shared.runner import Run, delete_runs, train_variant
from pipeline.document.tables import Row, Spread, Table, min_max, shown
from pipeline.inference import engine
from pipeline.inference.score import EvalScores, score
from pipeline.models.base import CausalLM
from pipeline.models.load import count, untrained
from pipeline.project.params.sections import Training
from pipeline.project.runner import Event, Facts, Job, Progress
from pipeline.stages.methods.full import FinetuneFull
from pipeline.stages.registry import COLORS
from pipeline.training.loop import build_optimizer
from pipeline.training.optimizer import FlatAdam

PAPER_MODEL = "RoBERTa-Large"
BASE, RANDOM = "base", "random weights"
SLACK = 1e-9  # for rounding: accuracies are fractions of a few tokens
Scores = Mapping[tuple[str, int], Sequence[EvalScores]]  # (start, dimensions) → a score per seed


def run(job: Job) -> Generator[Event, None, Facts]:
    """Train from each start in each dimension and in full, with each seed → two tables and a picture.

    Raises UserError.
    """
    settings = job.project.params.of(StudyIntrinsicDimension)
    examples = read_examples(job.path(settings.data), settings.data)
    claimed = document(job.path(settings.document), settings.document, "intrinsic_dimension")
    folder = job.artifact("expand_vocab")
    base = engine.load(folder)
    large = count(base.model)["total"]
    scores: dict[tuple[str, int], list[EvalScores]] = {(BASE, 0): [score(base, examples)]}
    sizes = [*product((BASE, RANDOM), sorted(settings.dimensions)), (BASE, large)]
    wanted = [(start, size, seed) for start, size in sizes for seed in settings.seeds]
    for number, (start, size, seed) in enumerate(wanted, 1):
        run = _run(settings, start, size, seed, in_full=size == large)
        optimizer_of = partial(_initialize, folder, start, size, seed, size == large)
        loaded = yield from train_variant(job, run, optimizer_of)
        scores.setdefault((start, size), []).append(score(loaded, examples))
        yield Progress(number, len(wanted), run.name)
    delete_runs(job)
    tables = _dimensions(settings, scores, large), _least(settings, scores, large, claimed)
    text = _text(settings, *tables, len(scores[BASE, 0][0].labels))
    findings = Findings("Intrinsic dimension", "§2.2", text, tables)
    return write_report(job, findings, lambda figure: _draw(figure, settings, tables[0]), (7, 4))


def _run(settings: StudyIntrinsicDimension, start: str, size: int, seed: int, in_full: bool) -> Run:
    """Full fine-tuning with its own learning rate; in a subspace with the study's."""
    section = FinetuneFull(data=settings.data, seed=seed)
    if not in_full:
        section = FinetuneFull(data=settings.data, seed=seed, learning_rate=settings.learning_rate)
    return Run(f"{start}, {size:,} dimensions, seed {seed}", "finetune_full", {"finetune_full": section})


def _initialize(
    folder: Path, start: str, size: int, seed: int, in_full: bool, model: CausalLM, settings: Training
) -> FlatAdam:
    """Load random weights if `start` is RANDOM, and build the optimizer."""
    if start == RANDOM:
        torch.manual_seed(seed)
        model.load_state_dict(untrained(folder).state_dict())
    if in_full:
        return build_optimizer(model, settings)
    return SubspaceAdam(model, OneHot(count(model)["trainable"], size, seed))


def _dimensions(settings: StudyIntrinsicDimension, scores: Scores, large: int) -> Table:
    full = Spread.of(result.accuracy for result in scores[BASE, large]).mean
    rows: list[Row] = []
    for (start, size), by_seed in scores.items():
        right = Spread.of(result.accuracy for result in by_seed)
        rows.append(
            {
                "begins": start,
                "dimensions": size,
                "share": size / large,
                "right": right,
                "of_full": right.mean / full,
                "enough": right.mean >= settings.share * full - SLACK,
                "loss": Spread.of(result.loss for result in by_seed),
            }
        )
    formats = {"share": ".2%", "right": ".0%", "of_full": ".0%", "loss": ".2f"}
    return Table("dimensions", "Training in random subspaces; the last row is full fine-tuning", rows, formats)


def _least(settings: StudyIntrinsicDimension, scores: Scores, large: int, claimed: Mapping[str, Any]) -> Table:
    """The smallest sufficient dimension, each seed compared with full fine-tuning of the base by the same seed."""
    sizes: dict[str, tuple[int, Spread | None]] = {
        "MiniGPT": (large, _smallest_sufficient(settings, scores, large, BASE)),
        f"MiniGPT, {RANDOM}": (large, _smallest_sufficient(settings, scores, large, RANDOM)),
    }
    low, high = claimed[PAPER_MODEL]["least"], claimed[PAPER_MODEL]["greatest"]
    sizes[PAPER_MODEL] = (claimed[PAPER_MODEL]["parameters"], Spread((low + high) / 2, low, high))
    rows: list[Row] = [
        {"model": name, "parameters": parameters, "least": cell, "share": cell.mean / parameters if cell else None}
        for name, (parameters, cell) in sizes.items()
    ]
    formats = {"least": ".0f", "share": ".5%"}
    return Table("least", f"Dimensions that reach {settings.share:.0%} of full fine-tuning", rows, formats)


def _smallest_sufficient(settings: StudyIntrinsicDimension, scores: Scores, large: int, start: str) -> Spread | None:
    """None if no dimension tried is sufficient for some seed."""
    least = []
    for number, full in enumerate(scores[BASE, large]):
        enough = settings.share * full.accuracy - SLACK
        tried = {size: by_seed for (start_, size), by_seed in scores.items() if start_ == start and 0 < size < large}
        least.append(next((size for size, by_seed in tried.items() if by_seed[number].accuracy >= enough), None))
    sufficient = [size for size in least if size is not None]
    return Spread.of(sufficient) if len(sufficient) == len(least) else None


def _text(settings: StudyIntrinsicDimension, dimensions: Table, least: Table, labels: int) -> str:
    ours, random, theirs = least.rows
    before, after = (shown(dimensions.rows[at]["right"], ".0%") for at in (0, -1))
    share = f"{settings.share:.0%}"
    low = min(settings.dimensions)
    base, scratch = (
        shown(next(r["right"] for r in dimensions.rows if (r["begins"], r["dimensions"]) == (start, low)), ".0%")
        for start in (BASE, RANDOM)
    )
    paper = theirs["least"]
    assert isinstance(paper, Spread)
    return "\n\n".join(
        [
            f"*Right*: the share of the {labels} next tokens of `{settings.data}` that are the model's first choice: "
            f"{before} before training, {after} after full fine-tuning. In d dimensions only d numbers train; a random "
            "isometry with one nonzero entry per row maps them to the weights. The number of steps is the same.",
            f"From the base: {_series(dimensions, BASE)}. So {share} of full fine-tuning's accuracy takes "
            f"{_takes(ours)}. From random weights: {_series(dimensions, RANDOM)}; {share} takes {_takes(random)}.",
            f"The paper's {theirs['model']} takes {paper.low:.0f} to {paper.high:.0f} of "
            f"{shown(theirs['parameters'])}. Few dimensions are enough here as well. The effect of pretraining: "
            f"in {low:,} dimensions the base reaches {base}, random weights {scratch}.",
        ]
    )


def _series(dimensions: Table, start: str) -> str:
    rows = [row for row in dimensions.rows[:-1] if row["begins"] == start and row["dimensions"]]
    return ", ".join(f"{row['dimensions']:,} → {shown(row['right'], '.0%')}" for row in rows)


def _takes(row: Row) -> str:
    if row["least"] is None:
        return "more dimensions than tried"
    return f"{shown(row['least'], '.0f')} of {shown(row['parameters'])} parameters ({shown(row['share'], '.2%')})"


def _draw(figure: Figure, settings: StudyIntrinsicDimension, dimensions: Table) -> None:
    axis = figure.subplots()
    base, *inner, full = dimensions.rows
    for start, color in ((BASE, COLORS["lora"]), (RANDOM, COLORS["scratch"])):
        rows = [row for row in inner if row["begins"] == start]
        cells = [cell for row in rows if isinstance(cell := row["right"], Spread)]
        marker = "o" if start == BASE else "s"
        x = [row["dimensions"] for row in rows]
        axis.errorbar(
            x, [c.mean for c in cells], yerr=min_max(cells), marker=marker, color=color, label=f"from {start}"
        )
    for row, label, line in ((full, "full fine-tuning", "-"), (base, "the base", ":")):
        assert isinstance(row["right"], Spread)
        axis.axhline(row["right"].mean, color=COLORS["full"], linestyle=line, label=label)
    assert isinstance(full["right"], Spread)
    share = settings.share
    axis.axhline(share * full["right"].mean, color="black", linewidth=0.8, linestyle="--", label=f"{share:.0%} of it")
    axis.set(xscale="log", xlabel="dimensions d", ylabel="next tokens right", ylim=(0, 1))
    axis.set_xticks(x, [str(value) for value in x])
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
