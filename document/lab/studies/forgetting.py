"""study_forgetting: new knowledge against forgetting, epoch by epoch, one curve per method
(§9.3).
"""

from collections.abc import Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated

from lab.measures import FORMATS, Losses, RetentionScorer
from lab.report import COLORS, Figure, Findings, legend_beside
from lab.runner import METHODS, checkpoints
from lab.studies import study_stage
from lab.tables import Row, Table, shown, spreads
from pipeline.project.params.schema import Count, Section, Seed
from pipeline.project.runner import Event, Job, Progress

if TYPE_CHECKING:
    from pipeline.training.task import TrainingTask

PLACE = "§9.3"
TUNED = ("finetune_full", "finetune_freeze", "finetune_lora", "finetune_prefix", "finetune_prompt")
LINE_STYLES = {  # method → line style of its curve
    "full fine-tuning": "-",
    "layer freezing": "--",
    "LoRA": "-",
    "LoRA, new rows": "--",
    "LoRA, matrices alone": ":",
    "prefix tuning": "-.",
    "prompt tuning": "-.",
}
TARGET_LOSS = 0.5  # nats per token on the new sentences, where the methods are compared
Curve = Mapping[int, Losses]  # by epoch


class StudyForgetting(Section, frozen=True, kw_only=True):
    """§9.3: new knowledge against forgetting, epoch by epoch."""

    old_data: Annotated[str, "sentences of the base, on which forgetting is measured"] = (
        "data/pretrain.de.txt"
    )
    new_data: Annotated[str, "the sentences trained on"] = "data/finetune.de.txt"
    seeds: Annotated[tuple[Seed, ...], "each is a run of its own"] = (0, 1, 2)
    every: Annotated[Count, "epochs between two measurements"] = 2


STAGE = study_stage(
    __name__,
    PLACE,
    title="Learning and forgetting, epoch by epoch",
    about="new knowledge gained against old lost, epoch by epoch",
    settings=StudyForgetting,
    data=(
        "old_data",
        "new_data",
        *(f"{stage}.data" for stage in TUNED),
        "finetune_lora.retention_data",
    ),
    extra_sections=TUNED,
)


def measure(job: Job, settings: StudyForgetting) -> Generator[Event, None, Findings]:
    """Train each method with each seed, and measure every few epochs → two tables."""
    scorer = RetentionScorer.of(job, settings.old_data, settings.new_data)

    def steps_of(task: "TrainingTask") -> set[int]:
        """Before the first epoch, after every few, and after the last."""
        return {*range(0, task.total + 1, settings.every * len(task.batches)), task.total}

    curves: dict[str, list[Curve]] = {name: [] for name in LINE_STYLES}
    wanted = [(name, seed) for name in LINE_STYLES for seed in settings.seeds]
    for number, (name, seed) in enumerate(wanted, 1):
        # Without early stopping, so that the curves are complete.
        run = METHODS[name].run(
            name, job.project.params, seed, max_steps=0, eval_share=0.0, eval_steps=0, patience=0
        )
        by_step = yield from checkpoints(job, run, steps_of, scorer.losses)
        per_epoch = max(by_step) // run.sections[run.stage].epochs
        curves[name].append({step // per_epoch: losses for step, losses in by_step.items()})
        yield Progress(number, len(wanted), run.name)
    epochs: list[Row] = [
        {
            "method": name,
            "epoch": epoch,
            **spreads(Losses._fields, [curve[epoch] for curve in by_seed]),
        }
        for name, by_seed in curves.items()
        for epoch in by_seed[0]
    ]
    trade = [_at_target(name, by_seed) for name, by_seed in curves.items()]
    title = f"At the first epoch with a new loss of {TARGET_LOSS:g} or less, and at the last"
    tables = (
        Table(
            "trade",
            title,
            trade,
            {**FORMATS, "epoch": ".0f", "rise_there": ".2f", "kept_there": ".0%"},
        ),
        Table("epochs", "All measured epochs", epochs, FORMATS),
    )
    return Findings(_text(trade), tables, lambda figure: _draw(figure, epochs), (9, 4.5))


def _at_target(name: str, curves: Sequence[Curve]) -> Row:
    """A method at each seed's first measured epoch with a new loss of `TARGET_LOSS` or less, and at
    its last.
    """
    first = [
        next((epoch for epoch, losses in curve.items() if losses[0] <= TARGET_LOSS), None)
        for curve in curves
    ]
    reached = [
        (epoch, *curve[epoch][1:])
        for epoch, curve in zip(first, curves, strict=True)
        if epoch is not None
    ]
    # empty cells unless every seed reaches it
    there = reached if len(reached) == len(curves) else []
    last = [curve[max(curve)] for curve in curves]
    return {
        "method": name,
        **spreads(("epoch", "rise_there", "kept_there"), there),
        **spreads(Losses._fields, last),
    }


def _text(trade: Sequence[Row]) -> str:
    reached = [row for row in trade if row["rise_there"] is not None]
    never = [row["method"] for row in trade if row["rise_there"] is None]
    ranked = sorted(reached, key=lambda row: row["rise_there"])
    if not ranked:
        return (
            f"No method reaches a loss of {TARGET_LOSS:g} nats per token on the new sentences "
            "with every seed."
        )
    rises = ", ".join(f"{row['method']} {shown(row['rise_there'], '.2f')}" for row in ranked)
    later = ", ".join(
        f"{row['method']} {row['old_rise'] - row['rise_there']:+.2f}" for row in ranked
    )
    others = f" These methods do not reach it: {', '.join(never)}." if never else ""
    return (
        f"When the loss on the new sentences reaches {TARGET_LOSS:g} nats per token, the loss on "
        f"the old sentences has risen by: {rises}.{others}\n"
        "\n"
        f"From there to the last epoch it rises further: {later}. In these epochs the model only "
        "becomes more certain of the new sentences."
    )


def _draw(figure: Figure, epochs: Sequence[Row]) -> None:
    """Learning goes to the left, forgetting upwards."""
    axis = figure.subplots()
    for name, line in LINE_STYLES.items():
        rows = [row for row in epochs if row["method"] == name]
        x, y = ([row[quantity] for row in rows] for quantity in ("new_loss", "old_rise"))
        axis.plot(
            x, y, line, color=COLORS[METHODS[name].color], label=name, marker=".", markevery=5
        )
    axis.set(
        xlabel="new loss (nats per token), falling to the left",
        ylabel="old loss rises by (nats per token)",
    )
    axis.set_xscale("log")
    axis.axvline(TARGET_LOSS, color="black", linewidth=0.6, label=f"new loss {TARGET_LOSS:g}")
    axis.grid(alpha=0.3)
    legend_beside(axis)
