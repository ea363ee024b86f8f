"""study_intrinsic_dimension: full fine-tuning in random subspaces, and the least that is enough (§2.2).

The document has from Aghajanyan et al. 2021 how few dimensions are enough for RoBERTa-Large, as a property of what was
pretrained. Here the same is done with MiniGPT, θ = θ₀ + Pθ_d, for as many steps as full fine-tuning: from the expanded
base, and from weights that never learned anything.
"""

from collections.abc import Generator, Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from pipeline.data.examples import read_examples
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
from pipeline.project.palette import COLORS
from pipeline.project.params.sections import FinetuneFull, Training
from pipeline.project.runner import Event, Facts, Job, Progress
from pipeline.stages.finetune import finetune
from pipeline.training.loop import build_optimizer
from pipeline.training.optimizer import FlatAdam

PAPERS = "RoBERTa-Large"
BASE, RANDOM = "base", "random weights"
SLACK = 1e-9  # of shares of a few tokens, which are equal or are not
Answers = Mapping[tuple[str, int], Sequence[EvalScores]]  # by beginning and dimensions, of each seed


def intrinsic_dimension(job: Job) -> Generator[Event, None, Facts]:
    """Each beginning and number of dimensions, and full fine-tuning, with each seed → two tables, a picture.

    Raises UserError.
    """
    settings = job.project.params.of(StudyIntrinsicDimension)
    examples = read_examples(job.path(settings.data), settings.data)
    claimed = document(job.path(settings.document), settings.document, "intrinsic_dimension")
    folder = job.artifact("expand_vocab")
    base = engine.load(folder)
    large = count(base.model)["total"]
    found: dict[tuple[str, int], list[EvalScores]] = {(BASE, 0): [score(base, examples)]}
    sizes = [*product((BASE, RANDOM), sorted(settings.dimensions)), (BASE, large)]
    wanted = [(*each, seed) for each in sizes for seed in settings.seeds]
    for number, (begins, size, seed) in enumerate(wanted, 1):
        run = _run(settings, begins, size, seed, whole=size == large)
        begin = partial(_begin, folder, begins, size, seed, size == large)
        loaded = yield from train_variant(job, run, begin)
        found.setdefault((begins, size), []).append(score(loaded, examples))
        yield Progress(number, len(wanted), run.name)
    delete_runs(job)
    tables = _dimensions(settings, found, large), _least(settings, found, large, claimed)
    text = _text(settings, *tables, len(found[BASE, 0][0].labels))
    made = Findings("Intrinsic dimension", "§2.2", text, tables)
    return write_report(job, made, lambda figure: _draw(figure, settings, tables[0]), (7, 4))


def _run(settings: StudyIntrinsicDimension, begins: str, size: int, seed: int, whole: bool) -> Run:
    """Full fine-tuning at its own rate; in a subspace at the study's."""
    section = FinetuneFull(data=settings.data, seed=seed)
    if not whole:
        section = FinetuneFull(data=settings.data, seed=seed, learning_rate=settings.learning_rate)
    return Run(f"{begins}, {size:,} dimensions, seed {seed}", "finetune_full", finetune, {"finetune_full": section})


def _begin(
    folder: Path, begins: str, size: int, seed: int, whole: bool, model: CausalLM, settings: Training
) -> FlatAdam:
    """The optimizer of a model that begins so."""
    if begins == RANDOM:
        torch.manual_seed(seed)
        model.load_state_dict(untrained(folder).state_dict())
    if whole:
        return build_optimizer(model, settings)
    return SubspaceAdam(model, OneHot(count(model)["trainable"], size, seed))


def _dimensions(settings: StudyIntrinsicDimension, found: Answers, large: int) -> Table:
    full = Spread.of(one.accuracy for one in found[BASE, large]).mean
    rows: list[Row] = []
    for (begins, size), of in found.items():
        right = Spread.of(one.accuracy for one in of)
        rows.append(
            {
                "begins": begins,
                "dimensions": size,
                "share": size / large,
                "right": right,
                "of_full": right.mean / full,
                "enough": right.mean >= settings.share * full - SLACK,
                "loss": Spread.of(one.loss for one in of),
            }
        )
    forms = {"share": ".2%", "right": ".0%", "of_full": ".0%", "loss": ".2f"}
    return Table("dimensions", "In so many dimensions; the last row is full fine-tuning", rows, forms)


def _least(settings: StudyIntrinsicDimension, found: Answers, large: int, claimed: Mapping[str, Any]) -> Table:
    """The least number that is enough, seed by seed, against that seed's full fine-tuning of the base."""
    sizes: dict[str, tuple[int, Spread | None]] = {
        "MiniGPT": (large, _least_of(settings, found, large, BASE)),
        f"MiniGPT, {RANDOM}": (large, _least_of(settings, found, large, RANDOM)),
    }
    low, high = claimed[PAPERS]["least"], claimed[PAPERS]["greatest"]
    sizes[PAPERS] = (claimed[PAPERS]["parameters"], Spread((low + high) / 2, low, high))
    rows: list[Row] = [
        {"model": name, "parameters": of, "least": cell, "share": cell.mean / of if cell else None}
        for name, (of, cell) in sizes.items()
    ]
    forms = {"least": ".0f", "share": ".5%"}
    return Table("least", f"Dimensions that reach {settings.share:.0%} of full fine-tuning", rows, forms)


def _least_of(settings: StudyIntrinsicDimension, found: Answers, large: int, begins: str) -> Spread | None:
    """None where what was tried is not enough for some seed."""
    least = []
    for number, full in enumerate(found[BASE, large]):
        enough = settings.share * full.accuracy - SLACK
        tried = {size: of for (begun, size), of in found.items() if begun == begins and 0 < size < large}
        least.append(next((size for size, of in tried.items() if of[number].accuracy >= enough), None))
    known = [size for size in least if size is not None]
    return Spread.of(known) if len(known) == len(least) else None


def _text(settings: StudyIntrinsicDimension, dimensions: Table, least: Table, labels: int) -> str:
    ours, random, theirs = least.rows
    before, after = (shown(dimensions.rows[at]["right"], ".0%") for at in (0, -1))
    share = f"{settings.share:.0%}"
    low = min(settings.dimensions)
    base, scratch = (
        shown(next(r["right"] for r in dimensions.rows if (r["begins"], r["dimensions"]) == (begins, low)), ".0%")
        for begins in (BASE, RANDOM)
    )
    paper = theirs["least"]
    assert isinstance(paper, Spread)
    return "\n\n".join(
        [
            f"*Right*: share of the {labels} next tokens of `{settings.data}` that are the first choice. Before "
            f"training it is {before}, after full fine-tuning {after}. In d dimensions all weights follow d numbers "
            "alone, by a random isometry with one entry a row, for as many steps.",
            f"From the base: {_series(dimensions, BASE)}. So {share} of what full fine-tuning reaches takes "
            f"{_takes(ours)}. From random weights: {_series(dimensions, RANDOM)}; {share} takes {_takes(random)}.",
            f"The paper's {theirs['model']} takes {paper.low:.0f} to {paper.high:.0f} of "
            f"{shown(theirs['parameters'])}. That few dimensions are enough is found here too. What pretraining adds: "
            f"in {low:,} dimensions the base comes to {base}, random weights to {scratch}.",
        ]
    )


def _series(dimensions: Table, begins: str) -> str:
    rows = [row for row in dimensions.rows[:-1] if row["begins"] == begins and row["dimensions"]]
    return ", ".join(f"{row['dimensions']:,} → {shown(row['right'], '.0%')}" for row in rows)


def _takes(row: Row) -> str:
    if row["least"] is None:
        return "more than was tried"
    return f"{shown(row['least'], '.0f')} of {shown(row['parameters'])} parameters ({shown(row['share'], '.2%')})"


def _draw(figure: Figure, settings: StudyIntrinsicDimension, dimensions: Table) -> None:
    axis = figure.subplots()
    base, *inner, full = dimensions.rows
    for begins, look in ((BASE, COLORS["lora"]), (RANDOM, COLORS["scratch"])):
        rows = [row for row in inner if row["begins"] == begins]
        cells = [cell for row in rows if isinstance(cell := row["right"], Spread)]
        marker = "o" if begins == BASE else "s"
        x = [row["dimensions"] for row in rows]
        axis.errorbar(
            x, [c.mean for c in cells], yerr=min_max(cells), marker=marker, color=look, label=f"from {begins}"
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
