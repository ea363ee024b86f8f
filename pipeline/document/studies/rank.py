"""study_rank: what rank, alpha and learning rate change, on the new sentences (§2.4, §5)."""

from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace
from itertools import product

from pipeline.document.params import StudyRank
from pipeline.document.studies.shared.report import Figure, Findings, write_report
from pipeline.document.studies.shared.retention_score import FORMATS, IN_WORDS, Knowledge, retention_scorer, spreads
from pipeline.document.studies.shared.runner import DOCUMENT, Run, adapters, delete_runs, run_stage, together
from pipeline.document.tables import Row, Spread, Table, mean, min_max
from pipeline.inference import engine
from pipeline.project.palette import COLORS
from pipeline.project.params.sections import FinetuneFull, FinetuneLora
from pipeline.project.runner import Event, Facts, Job
from pipeline.stages.finetune import finetune

NEAR = 0.05  # nats a token: as good as the best
Tuned = Mapping[str, Sequence[tuple[FinetuneLora, Knowledge]]]  # by the run's name
Whole = Mapping[float, Sequence[Knowledge]]  # full fine-tuning by learning rate


def rank(job: Job) -> Generator[Event, None, Facts]:
    """Adapters of every rank, alpha and rate, and full fine-tuning at every rate, with all seeds → three tables."""
    settings = job.project.params.of(StudyRank)
    measures = retention_scorer(job, settings.old_data, settings.new_data, settings.prompt_words)
    base = job.artifact("expand_vocab")
    sweeps, full = _sweeps(settings), _full(settings)
    folders = yield from run_stage(job, [*sweeps, *(run for runs in full.values() for run in runs)], diverging=True)
    tuned = {
        run.name: [(own, measures.measure(engine.load(base, at))) for at, own in adapters(run, folders[run.name])]
        if run.name in folders
        else []
        for run in sweeps
    }
    whole = {
        rate: [measures.measure(engine.load(folders[run.name])) for run in runs if run.name in folders]
        for rate, runs in full.items()
    }
    tables = _ranks(settings, tuned, whole), _alphas(settings, tuned), _rates(settings, tuned, whole)
    delete_runs(job)
    found = Findings("Rank, alpha and learning rate", "§2.4, §5", _text(*tables), tables)
    return write_report(job, found, lambda figure: _draw(figure, *tables), (11, 4))


def _sweeps(settings: StudyRank) -> list[Run]:
    """Of embeddings and head new rows train alone: in full they learn the sentences whatever the rank is."""
    base = replace(DOCUMENT, data=settings.new_data, train_embeddings="new_rows")
    even = replace(base, alpha=float(base.rank))  # a scale of 1 (§5.2)
    return [
        *(
            together(
                f"rank {r}",
                replace(base, rank=r),
                alpha=list(dict.fromkeys((base.alpha, float(r)))),
                seed=settings.seeds,
            )
            for r in settings.ranks
        ),
        together("alphas", base, alpha=settings.alphas, seed=settings.seeds),
        together("rates", even, learning_rate=settings.learning_rates, seed=settings.seeds),
    ]


def _full(settings: StudyRank) -> dict[float, list[Run]]:
    """Full fine-tuning at each rate and at the document's."""
    rates = dict.fromkeys((FinetuneFull().learning_rate, *settings.learning_rates))
    return {rate: [_full_run(settings, rate, seed) for seed in settings.seeds] for rate in rates}


def _full_run(settings: StudyRank, rate: float, seed: int) -> Run:
    section = FinetuneFull(data=settings.new_data, learning_rate=rate, seed=seed)
    return Run(f"full, rate {rate:g}, seed {seed}", "finetune_full", finetune, {"finetune_full": section})


def _ranks(settings: StudyRank, tuned: Tuned, whole: Whole) -> Table:
    rows: list[Row] = []
    for r, fixed in product(settings.ranks, (False, True)):
        alpha = DOCUMENT.alpha if fixed else float(r)
        found = [one for own, one in tuned[f"rank {r}"] if own.alpha == alpha]
        rows.append({"rank": r, "alpha": "1" if fixed else "r", **spreads(found)})
    rows.append({"rank": None, "alpha": "full", **spreads(whole[FinetuneFull().learning_rate])})
    return Table("ranks", "Rank, with alpha = rank and with the document's alpha of 1", rows, FORMATS)


def _alphas(settings: StudyRank, tuned: Tuned) -> Table:
    rows: list[Row] = [
        {"alpha": a, "scale": a / DOCUMENT.rank, **spreads([one for own, one in tuned["alphas"] if own.alpha == a])}
        for a in settings.alphas
    ]
    return Table("alphas", f"Alpha, at rank {DOCUMENT.rank}", rows, {**FORMATS, "alpha": "g", "scale": "g"})


def _rates(settings: StudyRank, tuned: Tuned, whole: Whole) -> Table:
    rows: list[Row] = []
    for rate in settings.learning_rates:
        lora = [one for own, one in tuned["rates"] if own.learning_rate == rate]
        rows += [
            {"learning_rate": rate, "method": name, "diverged": len(settings.seeds) - len(found), **spreads(found)}
            for name, found in (("lora", lora), ("full", whole[rate]))
        ]
    return Table(
        "rates", "Learning rate, LoRA at alpha = rank and full fine-tuning", rows, {**FORMATS, "learning_rate": "g"}
    )


def _text(ranks: Table, alphas: Table, rates: Table) -> str:
    even = [row for row in ranks.rows if row["alpha"] == "r"]
    full = next(row for row in ranks.rows if row["alpha"] == "full")
    said = ", ".join(f"{_loss(row)} at r = {row['rank']}" for row in even)
    return "\n\n".join(
        [
            IN_WORDS,
            f"With alpha = r the new loss is {said}; full fine-tuning has {_loss(full)}. {_enough(even)}",
            f"Alpha at rank {DOCUMENT.rank}: "
            + ", ".join(f"{row['alpha']:g} → {_loss(row)}" for row in alphas.rows)
            + ".",
            _tolerance(rates),
        ]
    )


def _loss(row: Row) -> str:
    return "none, as every run diverged" if row["new_loss"] is None else f"{mean(row['new_loss']):.3f}"


def _learned(rows: Sequence[Row]) -> list[Row]:
    """Those of which at least one run ended with a finite loss."""
    return [row for row in rows if row["new_loss"] is not None]


def _enough(rows: Sequence[Row]) -> str:
    losses = {row["rank"]: mean(row["new_loss"]) for row in _learned(rows)}
    if not losses:
        return "No rank learns."
    enough = next(r for r, loss in losses.items() if loss <= min(losses.values()) + NEAR)
    return f"The least rank within {NEAR:g} nats of the best is {enough}."


def _tolerance(rates: Table) -> str:
    """The rates at which each method learns as well as it can, within `NEAR`."""
    said = []
    for method, name in (("full", "full fine-tuning"), ("lora", "LoRA")):
        rows = _learned([row for row in rates.rows if row["method"] == method])
        if not rows:
            said.append(f"{name} diverges at each")
            continue
        losses = {mean(row["learning_rate"]): mean(row["new_loss"]) for row in rows}
        good = [rate for rate, loss in losses.items() if loss <= min(losses.values()) + NEAR]
        said.append(f"{name} is within {NEAR:g} nats of its best from {min(good):g} to {max(good):g}")
    return "Learning rate: " + ", ".join(said) + "."


def _draw(figure: Figure, ranks: Table, alphas: Table, rates: Table) -> None:
    left, middle, right = figure.subplots(1, 3)
    for alpha, color, marker in (("r", COLORS["lora"], "o"), ("1", COLORS["prompt"], "s")):
        _line(left, [row for row in ranks.rows if row["alpha"] == alpha], "rank", f"alpha = {alpha}", color, marker)
    full = next(row for row in ranks.rows if row["alpha"] == "full")
    if _learned([full]):
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
        if not _learned(rows):
            continue
        axis.set(xscale="log", yscale="log")
        measured = sorted({mean(row[name]) for row in rows if row[name] is not None})
        axis.set_xticks(measured, [f"{value:g}" for value in measured])
        axis.set_xticks([], minor=True)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    left.set_ylabel("new loss (nats a token)")


def _line(axis: Figure, rows: Sequence[Row], name: str, label: str, color: str, marker: str) -> None:
    cells = {row[name]: cell for row in rows if isinstance(cell := row["new_loss"], Spread)}
    look = {"label": label, "color": color, "marker": marker}
    axis.errorbar(list(cells), [c.mean for c in cells.values()], yerr=min_max(cells.values()), **look)
