"""study_rank: the effect of rank, alpha and learning rate on the new sentences (§2.4, §5)."""

from collections.abc import Generator, Sequence
from itertools import product
from typing import Annotated, Any

from msgspec.structs import replace

from lab.measures import COLUMNS_EXPLAINED, FORMATS, Knowledge, RetentionScorer
from lab.report import COLORS, Axis, Figure, Findings, error_bars
from lab.runner import DOCUMENT, full_runs, sweep_run, train
from lab.studies import study_stage
from lab.tables import Row, Table, spreads
from pipeline.project.params.schema import Count, Rate, Section, Seed
from pipeline.project.runner import Event, Job
from pipeline.stages.methods.full import FinetuneFull

PLACE = "§2.4, §5"
NEAR = 0.05  # nats per token: a loss this close to the best counts as equal


class StudyRank(Section, frozen=True, kw_only=True):
    """§2.4, §5: the effect of rank, alpha and learning rate on the new sentences."""

    old_data: Annotated[str, "sentences of the base, on which forgetting is measured"] = (
        "data/pretrain.de.txt"
    )
    new_data: Annotated[str, "the sentences trained on"] = "data/finetune.de.txt"
    prompt_words: Annotated[Count, "words of a new sentence given as its prompt"] = 2
    seeds: Annotated[tuple[Seed, ...], "each is a run of its own"] = (0, 1, 2)
    ranks: Annotated[tuple[Count, ...], "ranks that are tried"] = (1, 2, 4, 8, 16, 64)
    alphas: Annotated[tuple[Rate, ...], "alphas that are tried"] = (0.5, 1.0, 4.0, 8.0, 16.0)
    learning_rates: Annotated[tuple[Rate, ...], "learning rates that are tried"] = (
        3e-4,
        1e-3,
        3e-3,
        1e-2,
        3e-2,
    )


STAGE = study_stage(
    __name__,
    PLACE,
    title="Rank, alpha and learning rate",
    about="what rank, alpha and learning rate change",
    settings=StudyRank,
    data=("old_data", "new_data"),
)


def measure(job: Job, settings: StudyRank) -> Generator[Event, None, Findings]:
    """Train every rank, alpha and learning rate, and full fine-tuning at every rate, with all seeds
    → three tables.
    """
    scorer = RetentionScorer.of(job, settings.old_data, settings.new_data, settings.prompt_words)
    base, seeds = job.artifact("expand_vocab"), settings.seeds
    # Only the new rows of embeddings and head train: in full, they would learn the sentences at any
    # rank.
    lora = replace(DOCUMENT, data=settings.new_data, train_embeddings="new_rows")
    scale_1 = replace(lora, alpha=float(lora.rank))  # s = alpha / rank = 1 (§5.2)
    plain = FinetuneFull(data=settings.new_data)
    runs = [
        sweep_run(
            f"rank {r}",
            replace(lora, rank=r),
            {"alpha": dict.fromkeys((lora.alpha, float(r))), "seed": seeds},
        )
        for r in settings.ranks
    ]
    runs.append(sweep_run("alphas", lora, {"alpha": settings.alphas, "seed": seeds}))
    runs.append(
        sweep_run("rates", scale_1, {"learning_rate": settings.learning_rates, "seed": seeds})
    )
    for rate in dict.fromkeys((plain.learning_rate, *settings.learning_rates)):
        runs += full_runs(f"full, rate {rate:g}", replace(plain, learning_rate=rate), seeds)
    made = yield from train(job, runs, diverging=True)
    scored = [(one, scorer.measure(one.load(base))) for one in made]

    def scores(name: str, **wanted: float) -> list[Knowledge]:
        """The scores of the runs whose name begins so, with these settings, for each seed that did
        not diverge.
        """
        return [
            score
            for one, score in scored
            if one.run.startswith(name)
            and all(getattr(one.settings, key) == value for key, value in wanted.items())
        ]

    def spread(by_seed: Sequence[Knowledge]) -> Row:
        return spreads(Knowledge._fields, by_seed)

    ranks: list[Row] = [
        {"rank": r, "alpha": name, **spread(scores("rank", rank=r, alpha=alpha))}
        for r in settings.ranks
        for name, alpha in (("r", float(r)), ("1", DOCUMENT.alpha))
    ]
    ranks.append(
        {"rank": None, "alpha": "full", **spread(scores("full", learning_rate=plain.learning_rate))}
    )
    alphas = [
        {"alpha": alpha, "scale": alpha / DOCUMENT.rank, **spread(scores("alphas", alpha=alpha))}
        for alpha in settings.alphas
    ]
    rates = [
        {
            "learning_rate": rate,
            "method": method,
            "diverged": len(seeds) - len(by_seed),
            **spread(by_seed),
        }
        for rate, (method, name) in product(
            settings.learning_rates, (("lora", "rates"), ("full", "full"))
        )
        for by_seed in [scores(name, learning_rate=rate)]
    ]
    formats = {**FORMATS, "alpha": "g", "scale": "g", "learning_rate": "g"}
    tables = (
        Table(
            "ranks", "Rank, with alpha = rank and with the document's alpha of 1", ranks, FORMATS
        ),
        Table("alphas", f"Alpha, at rank {DOCUMENT.rank}", alphas, formats),
        Table("rates", "Learning rate, LoRA at alpha = rank and full fine-tuning", rates, formats),
    )
    return Findings(
        _text(ranks, alphas, rates),
        tables,
        lambda figure: _draw(figure, ranks, alphas, rates),
        (11, 4),
    )


def _loss(row: Row) -> str:
    return "none, as every run diverged" if row["new_loss"] is None else f"{row['new_loss']:.3f}"


def _near_best(rows: Sequence[Row], key: str) -> list[Any]:
    """The values of `key` whose loss is within `NEAR` of the best; none if every run diverged."""
    losses = {row[key]: row["new_loss"] for row in rows if row["new_loss"] is not None}
    return [value for value, loss in losses.items() if loss <= min(losses.values()) + NEAR]


def _text(ranks: Sequence[Row], alphas: Sequence[Row], rates: Sequence[Row]) -> str:
    *inner, full = ranks
    alpha_r = [row for row in inner if row["alpha"] == "r"]
    enough = _near_best(alpha_r, "rank")
    good = {
        name: _near_best([row for row in rates if row["method"] == method], "learning_rate")
        for method, name in (("full", "full fine-tuning"), ("lora", "LoRA"))
    }
    ranges = (
        f"{name} "
        f"{f'is within {NEAR:g} nats of its best from {min(at):g} to {max(at):g}' if at else 'diverges at each'}"
        for name, at in good.items()
    )
    losses = ", ".join(f"{_loss(row)} at r = {row['rank']}" for row in alpha_r)
    by_alpha = ", ".join(f"{row['alpha']:g} → {_loss(row)}" for row in alphas)
    smallest = (
        f"The smallest rank within {NEAR:g} nats of the best loss is {enough[0]}."
        if enough
        else "No rank learns."
    )
    paragraphs = (
        COLUMNS_EXPLAINED,
        f"With alpha = r the new loss is {losses}; full fine-tuning has {_loss(full)}. {smallest}",
        f"Alpha at rank {DOCUMENT.rank}: {by_alpha}.",
        f"Learning rate: {', '.join(ranges)}.",
    )
    return "\n\n".join(paragraphs)


def _draw(
    figure: Figure, ranks: Sequence[Row], alphas: Sequence[Row], rates: Sequence[Row]
) -> None:
    """The new loss by rank, by alpha and by learning rate."""
    left, middle, right = figure.subplots(1, 3)

    def line(
        axis: Axis, name: str, rows: Sequence[Row], label: str, color: str, marker: str
    ) -> None:
        cells = {row[name]: row["new_loss"] for row in rows if row["new_loss"] is not None}
        error_bars(
            axis, cells, list(cells.values()), label=label, color=COLORS[color], marker=marker
        )

    for alpha, color, marker in (("r", "lora", "o"), ("1", "prompt", "s")):
        line(
            left,
            "rank",
            [row for row in ranks if row["alpha"] == alpha],
            f"alpha = {alpha}",
            color,
            marker,
        )
    if ranks[-1]["new_loss"] is not None:
        left.axhline(
            ranks[-1]["new_loss"], color=COLORS["full"], linestyle="--", label="full fine-tuning"
        )
    line(middle, "alpha", alphas, f"r = {DOCUMENT.rank}", "lora", "o")
    for method, marker in (("full", "s"), ("lora", "o")):
        line(
            right,
            "learning_rate",
            [row for row in rates if row["method"] == method],
            method,
            method,
            marker,
        )
    for axis, name, rows in (
        (left, "rank", ranks),
        (middle, "alpha", alphas),
        (right, "learning_rate", rates),
    ):
        axis.set(xlabel=name.replace("_", " "))
        if all(row["new_loss"] is None for row in rows):
            continue  # nothing to scale, and a logarithmic axis without values warns
        axis.set(xscale="log", yscale="log")
        measured = sorted({row[name] for row in rows if row[name] is not None})
        axis.set_xticks(measured, [f"{value:g}" for value in measured])
        axis.set_xticks([], minor=True)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    left.set_ylabel("new loss (nats per token)")
