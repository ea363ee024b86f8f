"""Figure 2: loss curves and trainable parameters of the three methods that the document compares
(§2.3, §9.3).
"""

from collections.abc import Sequence
from typing import Any

from lab.report import WIDE, Findings
from lab.tables import Row, Table, shown
from pipeline.files.artifact import read_manifest
from pipeline.project.logs.run_log import LOSS, Step, epoch_means, final_loss, flat_from, read_steps
from pipeline.project.runner import Job
from pipeline.stages.registry import METHODS, STAGES
from pipeline.stages.report import compare

PLACE = "Figure 2, §2.3"
COMPARED = ("finetune_full", "finetune_freeze", "finetune_lora")
ENOUGH = 30  # epochs that would have been enough, according to the document


def render(job: Job) -> Findings:
    """From each run's loss.csv and manifest."""
    curves: dict[str, Sequence[Step]] = {}
    counts: dict[str, dict[str, Any]] = {}
    methods, epochs = list[Row](), list[Row]()
    for method, folder in (
        (STAGES[stage].method, job.project.artifact(stage)) for stage in COMPARED
    ):
        curves[method] = steps = read_steps(folder / LOSS)
        parameters = read_manifest(folder)["parameters"]
        trainable, percent = (
            parameters["trainable"],
            100 * parameters["trainable"] / parameters["total"],
        )
        counts[method] = {"trainable": trainable, "trainable_percent": percent}
        means = epoch_means(steps)
        drop = means[0] - means[-1] if means else 0.0
        # Empty if the run ends by then or its loss does not drop.
        by_30 = (means[0] - means[ENOUGH - 1]) / drop if len(means) > ENOUGH and drop > 0 else None
        own = {"method": method, "trainable": trainable, "share": percent / 100}
        methods.append(
            {
                **own,
                "flat_from_epoch": flat_from(steps),
                "final_loss": final_loss(steps),
                "drop_by_30": by_30,
            }
        )
        epochs += [
            {"method": method, "epoch": epoch, "loss": loss} for epoch, loss in enumerate(means, 1)
        ]
    title = (
        "Trainable parameters, and the epoch from which the loss is flat: it stays within 5% of "
        "the total drop"
    )
    formats = {"share": ".1%", "final_loss": ".3f", "drop_by_30": ".1%", "flat_from_epoch": ""}
    tables = (
        Table("loss_curves_methods", title, methods, formats),
        Table("loss_curves", "Mean loss of each epoch, nats per token", epochs),
    )

    def flat(row: Row) -> str:
        epoch = row["flat_from_epoch"]
        return f"{METHODS[row['method']].title} {f'from epoch {epoch}' if epoch else 'not yet'}"

    ends = [(row["flat_from_epoch"], row["method"]) for row in methods if row["flat_from_epoch"]]
    first = f" The earliest is {METHODS[min(ends)[1]].title}." if ends else ""
    shares = ", ".join(
        f"{METHODS[row['method']].title} {shown(row['drop_by_30'], '.1%')}"
        for row in methods
        if row["drop_by_30"] is not None
    )
    by_30th = (
        f" Share of the total drop by epoch {ENOUGH}, which the document says is enough: {shares}."
        if shares
        else ""
    )
    text = (
        "Left: the mean training loss of each epoch on a logarithmic scale; a stroke marks the "
        "epoch from which it is "
        "flat. Right: the trainable parameters of each method.\n\n"
        "The document says that all three converge around epoch 25 to 35, LoRA first. Measured: "
        f"{'; '.join(map(flat, methods))}.{first}{by_30th}"
    )
    shows = f"flat: {', '.join(map(flat, methods))}"
    return Findings(
        text,
        tables,
        lambda figure: compare(figure, METHODS, curves, counts),
        (WIDE, 3.0),
        shows,
        "Loss curves from MiniGPT fine-tuning",
    )
