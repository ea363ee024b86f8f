"""Figure 2: loss curves and trainable parameters of the three methods that the document compares (§2.3, §9.3)."""

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.document.figures.draw.figure import RenderedFigure
from pipeline.document.figures.draw.style import WIDE
from pipeline.document.tables import Row, Table, shown
from pipeline.files.artifact import read_manifest
from pipeline.project.logs.run_log import LOSS, Step, epoch_means, final_loss, flat_from, read_steps
from pipeline.project.runner import Job
from pipeline.stages.registry import METHODS, STAGES
from pipeline.stages.report import compare

NAME = "loss_curves"
COMPARED = ("finetune_full", "finetune_freeze", "finetune_lora")
ENOUGH = 30  # epochs that would have been enough, according to the document


def loss_curves(job: Job) -> RenderedFigure:
    """Figure 2, from each run's loss.csv."""
    folders = {STAGES[stage].method: job.project.artifact(stage) for stage in COMPARED}
    curves = {method: read_steps(folder / LOSS) for method, folder in folders.items()}
    counts = {method: _trainable_counts(read_manifest(folder)["parameters"]) for method, folder in folders.items()}
    methods = _methods(curves, counts)
    return RenderedFigure(
        NAME,
        "Figure 2, §2.3",
        "Loss curves from MiniGPT fine-tuning",
        _summary(methods),
        _caption(methods),
        (methods, _epochs(curves)),
        lambda figure: compare(figure, METHODS, curves, counts),
        (WIDE, 3.0),
    )


def _trainable_counts(parameters: Mapping[str, int]) -> dict[str, Any]:
    trainable = parameters["trainable"]
    return {"trainable": trainable, "trainable_percent": 100 * trainable / parameters["total"]}


def _epochs(curves: Mapping[str, Sequence[Step]]) -> Table:
    rows: list[Row] = [
        {"method": method, "epoch": epoch, "loss": loss}
        for method, steps in curves.items()
        for epoch, loss in enumerate(epoch_means(steps), 1)
    ]
    return Table(NAME, "Mean loss of each epoch, nats per token", rows)


def _methods(curves: Mapping[str, Sequence[Step]], counts: Mapping[str, Mapping[str, Any]]) -> Table:
    rows: list[Row] = [
        {
            "method": method,
            "trainable": counts[method]["trainable"],
            "share": counts[method]["trainable_percent"] / 100,
            "flat_from_epoch": flat_from(steps),
            "final_loss": final_loss(steps),
            "drop_by_30": _share_of_drop(ENOUGH, epoch_means(steps)),
        }
        for method, steps in curves.items()
    ]
    formats = {"share": ".1%", "final_loss": ".3f", "drop_by_30": ".1%", "flat_from_epoch": ""}
    title = "Trainable parameters, and the epoch from which the loss is flat: it stays within 5% of the total drop"
    return Table(f"{NAME}_methods", title, rows, formats)


def _share_of_drop(epoch: int, means: Sequence[float]) -> float | None:
    """The share of the total drop reached by `epoch`; None if the run ends by then or the loss does not drop."""
    drop = means[0] - means[-1] if means else 0.0
    return (means[0] - means[epoch - 1]) / drop if len(means) > epoch and drop > 0 else None


def _describe_flat(row: Row) -> str:
    flat = row["flat_from_epoch"]
    return f"{METHODS[str(row['method'])]} {f'from epoch {flat}' if flat else 'not yet'}"


def _summary(methods: Table) -> str:
    return f"flat: {', '.join(_describe_flat(row) for row in methods.rows)}"


def _caption(methods: Table) -> str:
    flat = [(int(str(row["flat_from_epoch"])), str(row["method"])) for row in methods.rows if row["flat_from_epoch"]]
    first = f" The earliest is {METHODS[min(flat)[1]]}." if flat else ""
    done = [row for row in methods.rows if row["drop_by_30"] is not None]
    shares = ", ".join(f"{METHODS[str(row['method'])]} {shown(row['drop_by_30'], '.1%')}" for row in done)
    by_epoch = f" Share of the total drop by epoch {ENOUGH}, which the document says is enough: {shares}."
    return "\n\n".join(
        [
            "Left: the mean training loss of each epoch on a logarithmic scale; a stroke marks the epoch from which it "
            "is flat. Right: the trainable parameters of each method.",
            f"The document says that all three converge around epoch 25 to 35, LoRA first. Measured: "
            f"{'; '.join(_describe_flat(row) for row in methods.rows)}.{first}{by_epoch if done else ''}",
        ]
    )
