"""study_forgetting: new knowledge gained against old knowledge lost, epoch by epoch: a curve a method (§9.3)."""

from collections.abc import Generator, Mapping, Sequence

from pipeline.document.params import StudyForgetting
from pipeline.document.studies.shared.method_runs import METHODS
from pipeline.document.studies.shared.report import Figure, Findings, write_report
from pipeline.document.studies.shared.retention_score import FORMATS, RetentionScorer, retention_scorer
from pipeline.document.studies.shared.runner import Run, delete_runs, evaluate_checkpoints
from pipeline.document.tables import Row, Spread, Table, mean, shown
from pipeline.project.palette import COLORS
from pipeline.project.runner import Event, Facts, Job, Progress
from pipeline.training.loop import TrainingTask

TRADED = {  # method → how its curve is drawn
    **{"full fine-tuning": "-", "layer freezing": "--"},
    **{"LoRA": "-", "LoRA, new rows": "--", "LoRA, matrices alone": ":"},
    **{"prefix tuning": "-.", "prompt tuning": "-."},
}
WHOLE = {"eval_share": 0.0, "eval_every": 0, "patience": 0}  # every curve goes to the last epoch
SAME = 0.5  # nats a token on the new sentences: where the methods are compared
Losses = tuple[float, float, float]  # new loss, rise of the old one, share of old first choices kept
Curve = Mapping[int, Losses]  # by epoch
QUANTITIES = ("new_loss", "old_rise", "old_kept")


def forgetting(job: Job) -> Generator[Event, None, Facts]:
    """Each method trained with each seed, measured every so many epochs → two tables, a picture. Raises UserError."""
    settings = job.project.params.of(StudyForgetting)
    measures = retention_scorer(job, settings.old_data, settings.new_data)
    curves: dict[str, list[Curve]] = {name: [] for name in TRADED}
    wanted = [(name, seed) for name in TRADED for seed in settings.seeds]
    for number, (name, seed) in enumerate(wanted, 1):
        run = METHODS[name].run(name, job.project.params, seed, **WHOLE)
        curves[name].append((yield from _curve(job, run, settings.every, measures)))
        yield Progress(number, len(wanted), run.name)
    delete_runs(job)
    tables = _at_the_same(curves), _epochs(curves)
    found = Findings("Gained and lost, epoch by epoch", "§9.3", _text(tables[0]), tables)
    return write_report(job, found, lambda figure: _draw(figure, tables[1]), (9, 4.5))


def _curve(job: Job, run: Run, every: int, measures: RetentionScorer) -> Generator[Event, None, Curve]:
    """Before the first epoch, after every so many, and after the last."""
    an_epoch = 1

    def due(task: TrainingTask) -> list[int]:
        nonlocal an_epoch
        an_epoch = len(task.batches)
        return sorted({*range(0, task.total + 1, every * an_epoch), task.total})

    found = yield from evaluate_checkpoints(job, run, due, measures.losses)
    return {step // an_epoch: losses for step, losses in found.items()}


def _epochs(curves: Mapping[str, Sequence[Curve]]) -> Table:
    rows: list[Row] = [
        {"method": name, "epoch": epoch, **_spreads([curve[epoch] for curve in of])}
        for name, of in curves.items()
        for epoch in of[0]
    ]
    return Table("epochs", "Each epoch that was measured", rows, FORMATS)


def _spreads(found: Sequence[Losses]) -> dict[str, Spread]:
    return {name: Spread.of(values) for name, values in zip(QUANTITIES, zip(*found, strict=True), strict=True)}


def _at_the_same(curves: Mapping[str, Sequence[Curve]]) -> Table:
    """Each method at the first epoch with a new loss of `SAME` or less, and at its last."""
    rows: list[Row] = []
    for name, of in curves.items():
        first = [next((epoch for epoch, losses in curve.items() if losses[0] <= SAME), None) for curve in of]
        reached = [(epoch, curve[epoch]) for epoch, curve in zip(first, of, strict=True) if epoch is not None]
        last = [curve[max(curve)] for curve in of]
        there = len(reached) == len(of)
        rows.append(
            {
                "method": name,
                "epoch": Spread.of(epoch for epoch, _ in reached) if there else None,
                "rise_there": Spread.of(losses[1] for _, losses in reached) if there else None,
                "kept_there": Spread.of(losses[2] for _, losses in reached) if there else None,
                **_spreads(last),
            }
        )
    forms = {**FORMATS, "epoch": ".0f", "rise_there": ".2f", "kept_there": ".0%"}
    return Table("trade", f"At the first epoch with a new loss of {SAME:g} or less, and at the last", rows, forms)


def _text(trade: Table) -> str:
    there = [row for row in trade.rows if row["rise_there"] is not None]
    never = [str(row["method"]) for row in trade.rows if row["rise_there"] is None]
    ranked = sorted(there, key=lambda row: mean(row["rise_there"]))
    said = ", ".join(f"{row['method']} {shown(row['rise_there'], '.2f')}" for row in ranked)
    if not ranked:
        return f"No method brings the loss on the new sentences down to {SAME:g} nats a token with every seed."
    later = ", ".join(f"{row['method']} {mean(row['old_rise']) - mean(row['rise_there']):+.2f}" for row in ranked)
    return "\n\n".join(
        [
            f"Where each method has brought the loss on the new sentences down to {SAME:g} nats a token, the loss on "
            f"the old ones has risen by: {said}." + (f" {', '.join(never)} never come there." if never else ""),
            f"From there to the last epoch it rises further: {later}. By then the same sentences are only said with "
            "more certainty.",
        ]
    )


def _draw(figure: Figure, epochs: Table) -> None:
    """To the left is what was gained, upwards what was lost."""
    axis = figure.subplots()
    for name, line in TRADED.items():
        rows = [row for row in epochs.rows if row["method"] == name]
        x, y = ([mean(row[quantity]) for row in rows] for quantity in ("new_loss", "old_rise"))
        axis.plot(x, y, line, color=COLORS[METHODS[name].look], label=name, marker=".", markevery=5)
    axis.set(xlabel="new loss (nats a token), falling to the left", ylabel="old loss rises by (nats a token)")
    axis.set_xscale("log")
    axis.axvline(SAME, color="black", linewidth=0.6, label=f"new loss {SAME:g}")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
