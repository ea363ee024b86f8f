"""study_forgetting: new knowledge against forgetting, epoch by epoch, one curve per method (§9.3)."""

from collections.abc import Generator, Mapping, Sequence

from pipeline.document.params import StudyForgetting
from pipeline.document.studies.shared.method_runs import METHODS
from pipeline.document.studies.shared.report import Figure, Findings, write_report
from pipeline.document.studies.shared.retention_score import FORMATS, RetentionScorer, retention_scorer
from pipeline.document.studies.shared.runner import Run, delete_runs, evaluate_checkpoints
from pipeline.document.tables import Row, Spread, Table, mean, shown
from pipeline.project.runner import Event, Facts, Job, Progress
from pipeline.stages.registry import COLORS
from pipeline.training.loop import TrainingTask

LINE_STYLES = {  # method → line style of its curve
    **{"full fine-tuning": "-", "layer freezing": "--"},
    **{"LoRA": "-", "LoRA, new rows": "--", "LoRA, matrices alone": ":"},
    **{"prefix tuning": "-.", "prompt tuning": "-."},
}
ALL_EPOCHS = {"eval_share": 0.0, "eval_every": 0, "patience": 0}  # no early stopping, so that curves are complete
TARGET_LOSS = 0.5  # nats per token on the new sentences, where the methods are compared
Losses = tuple[float, float, float]  # new loss, old rise, old kept
Curve = Mapping[int, Losses]  # epoch → losses
QUANTITIES = ("new_loss", "old_rise", "old_kept")


def run(job: Job) -> Generator[Event, None, Facts]:
    """Train each method with each seed, measure every few epochs → two tables and a picture. Raises UserError."""
    settings = job.project.params.of(StudyForgetting)
    scorer = retention_scorer(job, settings.old_data, settings.new_data)
    curves: dict[str, list[Curve]] = {name: [] for name in LINE_STYLES}
    wanted = [(name, seed) for name in LINE_STYLES for seed in settings.seeds]
    for number, (name, seed) in enumerate(wanted, 1):
        run = METHODS[name].run(name, job.project.params, seed, **ALL_EPOCHS)
        curves[name].append((yield from _curve(job, run, settings.every, scorer)))
        yield Progress(number, len(wanted), run.name)
    delete_runs(job)
    tables = _at_target_loss(curves), _epochs(curves)
    findings = Findings("Learning and forgetting, epoch by epoch", "§9.3", _text(tables[0]), tables)
    return write_report(job, findings, lambda figure: _draw(figure, tables[1]), (9, 4.5))


def _curve(job: Job, run: Run, every: int, scorer: RetentionScorer) -> Generator[Event, None, Curve]:
    """The losses before the first epoch, after every `every` epochs, and after the last."""
    steps_per_epoch = 1

    def steps_of(task: TrainingTask) -> list[int]:
        nonlocal steps_per_epoch
        steps_per_epoch = len(task.batches)
        return sorted({*range(0, task.total + 1, every * steps_per_epoch), task.total})

    by_step = yield from evaluate_checkpoints(job, run, steps_of, scorer.losses)
    return {step // steps_per_epoch: losses for step, losses in by_step.items()}


def _epochs(curves: Mapping[str, Sequence[Curve]]) -> Table:
    rows: list[Row] = [
        {"method": name, "epoch": epoch, **_spreads([curve[epoch] for curve in of_method])}
        for name, of_method in curves.items()
        for epoch in of_method[0]
    ]
    return Table("epochs", "All measured epochs", rows, FORMATS)


def _spreads(by_seed: Sequence[Losses]) -> dict[str, Spread]:
    return {name: Spread.of(values) for name, values in zip(QUANTITIES, zip(*by_seed, strict=True), strict=True)}


def _at_target_loss(curves: Mapping[str, Sequence[Curve]]) -> Table:
    """Each method at the first measured epoch with a new loss of `TARGET_LOSS` or less, and at its last."""
    rows: list[Row] = []
    for name, of_method in curves.items():
        first = [
            next((epoch for epoch, losses in curve.items() if losses[0] <= TARGET_LOSS), None) for curve in of_method
        ]
        reached = [(epoch, curve[epoch]) for epoch, curve in zip(first, of_method, strict=True) if epoch is not None]
        last = [curve[max(curve)] for curve in of_method]
        all_reached = len(reached) == len(of_method)
        rows.append(
            {
                "method": name,
                "epoch": Spread.of(epoch for epoch, _ in reached) if all_reached else None,
                "rise_there": Spread.of(losses[1] for _, losses in reached) if all_reached else None,
                "kept_there": Spread.of(losses[2] for _, losses in reached) if all_reached else None,
                **_spreads(last),
            }
        )
    formats = {**FORMATS, "epoch": ".0f", "rise_there": ".2f", "kept_there": ".0%"}
    return Table(
        "trade", f"At the first epoch with a new loss of {TARGET_LOSS:g} or less, and at the last", rows, formats
    )


def _text(trade: Table) -> str:
    reached = [row for row in trade.rows if row["rise_there"] is not None]
    never = [str(row["method"]) for row in trade.rows if row["rise_there"] is None]
    ranked = sorted(reached, key=lambda row: mean(row["rise_there"]))
    rises = ", ".join(f"{row['method']} {shown(row['rise_there'], '.2f')}" for row in ranked)
    if not ranked:
        return f"No method reaches a loss of {TARGET_LOSS:g} nats per token on the new sentences with every seed."
    later = ", ".join(f"{row['method']} {mean(row['old_rise']) - mean(row['rise_there']):+.2f}" for row in ranked)
    return "\n\n".join(
        [
            f"When the loss on the new sentences reaches {TARGET_LOSS:g} nats per token, the loss on the old "
            f"sentences has risen by: {rises}."
            + (f" These methods do not reach it: {', '.join(never)}." if never else ""),
            f"From there to the last epoch it rises further: {later}. In these epochs the model only becomes more "
            "certain of the new sentences.",
        ]
    )


def _draw(figure: Figure, epochs: Table) -> None:
    """Learning goes to the left, forgetting upwards."""
    axis = figure.subplots()
    for name, line in LINE_STYLES.items():
        rows = [row for row in epochs.rows if row["method"] == name]
        x, y = ([mean(row[quantity]) for row in rows] for quantity in ("new_loss", "old_rise"))
        axis.plot(x, y, line, color=COLORS[METHODS[name].color], label=name, marker=".", markevery=5)
    axis.set(xlabel="new loss (nats per token), falling to the left", ylabel="old loss rises by (nats per token)")
    axis.set_xscale("log")
    axis.axvline(TARGET_LOSS, color="black", linewidth=0.6, label=f"new loss {TARGET_LOSS:g}")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
