"""study_rank: the effect of rank, alpha and learning rate on the new sentences (§2.4, §5)."""

from collections.abc import Generator, Mapping, Sequence
from itertools import product

from msgspec.structs import replace

from pipeline.document.params import StudyRank
from pipeline.document.studies.shared.report import Figure, Findings, write_report
from pipeline.document.studies.shared.retention_score import (
    COLUMNS_EXPLAINED,
    FORMATS,
    Knowledge,
    retention_scorer,
    spreads,
)
from pipeline.document.studies.shared.runner import DOCUMENT, Run, adapters, delete_runs, run_stage, sweep_run
from pipeline.document.tables import Row, Spread, Table, mean, min_max
from pipeline.inference import engine
from pipeline.project.runner import Event, Facts, Job
from pipeline.stages.methods.full import FinetuneFull
from pipeline.stages.methods.lora import FinetuneLora
from pipeline.stages.registry import COLORS

NEAR = 0.05  # nats per token: a loss this close to the best counts as equal
Tuned = Mapping[str, Sequence[tuple[FinetuneLora, Knowledge]]]  # run's name → its adapters
FullTuned = Mapping[float, Sequence[Knowledge]]  # learning rate of full fine-tuning → scores by seed


def run(job: Job) -> Generator[Event, None, Facts]:
    """Train every rank, alpha and learning rate, and full fine-tuning at every rate, with all seeds → three tables."""
    settings = job.project.params.of(StudyRank)
    scorer = retention_scorer(job, settings.old_data, settings.new_data, settings.prompt_words)
    base = job.artifact("expand_vocab")
    sweeps, full_runs = _sweeps(settings), _full_runs(settings)
    folders = yield from run_stage(
        job, [*sweeps, *(run for runs in full_runs.values() for run in runs)], diverging=True
    )
    tuned = {
        run.name: [(lora, scorer.measure(engine.load(base, at))) for at, lora in adapters(run, folders[run.name])]
        if run.name in folders
        else []
        for run in sweeps
    }
    full = {
        rate: [scorer.measure(engine.load(folders[run.name])) for run in runs if run.name in folders]
        for rate, runs in full_runs.items()
    }
    tables = _ranks(settings, tuned, full), _alphas(settings, tuned), _rates(settings, tuned, full)
    delete_runs(job)
    findings = Findings("Rank, alpha and learning rate", "§2.4, §5", _text(*tables), tables)
    return write_report(job, findings, lambda figure: _draw(figure, *tables), (11, 4))


def _sweeps(settings: StudyRank) -> list[Run]:
    """Sweeps with only new rows of embeddings and head: in full, they would learn the sentences at any rank."""
    base = replace(DOCUMENT, data=settings.new_data, train_embeddings="new_rows")
    scale_1 = replace(base, alpha=float(base.rank))  # s = alpha / rank = 1 (§5.2)
    return [
        *(
            sweep_run(
                f"rank {r}",
                replace(base, rank=r),
                alpha=list(dict.fromkeys((base.alpha, float(r)))),
                seed=settings.seeds,
            )
            for r in settings.ranks
        ),
        sweep_run("alphas", base, alpha=settings.alphas, seed=settings.seeds),
        sweep_run("rates", scale_1, learning_rate=settings.learning_rates, seed=settings.seeds),
    ]


def _full_runs(settings: StudyRank) -> dict[float, list[Run]]:
    """Full fine-tuning at each learning rate and at the document's."""
    rates = dict.fromkeys((FinetuneFull().learning_rate, *settings.learning_rates))
    return {rate: [_full_run(settings, rate, seed) for seed in settings.seeds] for rate in rates}


def _full_run(settings: StudyRank, rate: float, seed: int) -> Run:
    section = FinetuneFull(data=settings.new_data, learning_rate=rate, seed=seed)
    return Run(f"full, rate {rate:g}, seed {seed}", "finetune_full", {"finetune_full": section})


def _ranks(settings: StudyRank, tuned: Tuned, full: FullTuned) -> Table:
    rows: list[Row] = []
    for r, fixed in product(settings.ranks, (False, True)):
        alpha = DOCUMENT.alpha if fixed else float(r)
        scores = [score for lora, score in tuned[f"rank {r}"] if lora.alpha == alpha]
        rows.append({"rank": r, "alpha": "1" if fixed else "r", **spreads(scores)})
    rows.append({"rank": None, "alpha": "full", **spreads(full[FinetuneFull().learning_rate])})
    return Table("ranks", "Rank, with alpha = rank and with the document's alpha of 1", rows, FORMATS)


def _alphas(settings: StudyRank, tuned: Tuned) -> Table:
    rows: list[Row] = [
        {"alpha": a, "scale": a / DOCUMENT.rank, **spreads([s for lora, s in tuned["alphas"] if lora.alpha == a])}
        for a in settings.alphas
    ]
    return Table("alphas", f"Alpha, at rank {DOCUMENT.rank}", rows, {**FORMATS, "alpha": "g", "scale": "g"})


def _rates(settings: StudyRank, tuned: Tuned, full: FullTuned) -> Table:
    rows: list[Row] = []
    for rate in settings.learning_rates:
        lora = [score for section, score in tuned["rates"] if section.learning_rate == rate]
        rows += [
            {"learning_rate": rate, "method": name, "diverged": len(settings.seeds) - len(scores), **spreads(scores)}
            for name, scores in (("lora", lora), ("full", full[rate]))
        ]
    return Table(
        "rates", "Learning rate, LoRA at alpha = rank and full fine-tuning", rows, {**FORMATS, "learning_rate": "g"}
    )


def _text(ranks: Table, alphas: Table, rates: Table) -> str:
    alpha_r = [row for row in ranks.rows if row["alpha"] == "r"]
    full = next(row for row in ranks.rows if row["alpha"] == "full")
    losses = ", ".join(f"{_format_loss(row)} at r = {row['rank']}" for row in alpha_r)
    return "\n\n".join(
        [
            COLUMNS_EXPLAINED,
            f"With alpha = r the new loss is {losses}; full fine-tuning has {_format_loss(full)}. "
            f"{_describe_smallest_rank(alpha_r)}",
            f"Alpha at rank {DOCUMENT.rank}: "
            + ", ".join(f"{row['alpha']:g} → {_format_loss(row)}" for row in alphas.rows)
            + ".",
            _describe_rates(rates),
        ]
    )


def _format_loss(row: Row) -> str:
    return "none, as every run diverged" if row["new_loss"] is None else f"{mean(row['new_loss']):.3f}"


def _converged(rows: Sequence[Row]) -> list[Row]:
    """The rows where at least one seed did not diverge."""
    return [row for row in rows if row["new_loss"] is not None]


def _describe_smallest_rank(rows: Sequence[Row]) -> str:
    losses = {row["rank"]: mean(row["new_loss"]) for row in _converged(rows)}
    if not losses:
        return "No rank learns."
    enough = next(r for r, loss in losses.items() if loss <= min(losses.values()) + NEAR)
    return f"The smallest rank within {NEAR:g} nats of the best loss is {enough}."


def _describe_rates(rates: Table) -> str:
    """The range of learning rates where each method is within `NEAR` of its best loss."""
    parts = []
    for method, name in (("full", "full fine-tuning"), ("lora", "LoRA")):
        rows = _converged([row for row in rates.rows if row["method"] == method])
        if not rows:
            parts.append(f"{name} diverges at each")
            continue
        losses = {mean(row["learning_rate"]): mean(row["new_loss"]) for row in rows}
        good = [rate for rate, loss in losses.items() if loss <= min(losses.values()) + NEAR]
        parts.append(f"{name} is within {NEAR:g} nats of its best from {min(good):g} to {max(good):g}")
    return "Learning rate: " + ", ".join(parts) + "."


def _draw(figure: Figure, ranks: Table, alphas: Table, rates: Table) -> None:
    left, middle, right = figure.subplots(1, 3)
    for alpha, color, marker in (("r", COLORS["lora"], "o"), ("1", COLORS["prompt"], "s")):
        _line(left, [row for row in ranks.rows if row["alpha"] == alpha], "rank", f"alpha = {alpha}", color, marker)
    full = next(row for row in ranks.rows if row["alpha"] == "full")
    if _converged([full]):
        left.axhline(mean(full["new_loss"]), color=COLORS["full"], linestyle="--", label="full fine-tuning")
    _line(middle, alphas.rows, "alpha", f"r = {DOCUMENT.rank}", COLORS["lora"], "o")
    for method, marker in (("full", "s"), ("lora", "o")):
        _line(right, [r for r in rates.rows if r["method"] == method], "learning_rate", method, COLORS[method], marker)
    for axis, name, rows in (
        (left, "rank", ranks.rows),
        (middle, "alpha", alphas.rows),
        (right, "learning_rate", rates.rows),
    ):
        axis.set(xlabel=name.replace("_", " "))
        if not _converged(rows):
            continue
        axis.set(xscale="log", yscale="log")
        measured = sorted({mean(row[name]) for row in rows if row[name] is not None})
        axis.set_xticks(measured, [f"{value:g}" for value in measured])
        axis.set_xticks([], minor=True)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    left.set_ylabel("new loss (nats per token)")


def _line(axis: Figure, rows: Sequence[Row], name: str, label: str, color: str, marker: str) -> None:
    cells = {row[name]: cell for row in rows if isinstance(cell := row["new_loss"], Spread)}
    style = {"label": label, "color": color, "marker": marker}
    axis.errorbar(list(cells), [c.mean for c in cells.values()], yerr=min_max(cells.values()), **style)
