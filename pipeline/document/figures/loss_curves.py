"""Figure 2: the loss curves of the three methods that the document compares, and what each trains (§2.3, §9.3)."""

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.document.figures.draw.figure import RenderedFigure
from pipeline.document.figures.draw.style import WIDE
from pipeline.document.tables import Row, Table, shown
from pipeline.files.artifact import read_manifest
from pipeline.project.logs.run_log import LOSS, Step, epoch_means, final_loss, flat_from, read_steps
from pipeline.project.runner import Job
from pipeline.project.stage_graph import STAGES
from pipeline.stages.report import NAMES, compare

NAME = "loss_curves"
COMPARED = ("finetune_full", "finetune_freeze", "finetune_lora")
ENOUGH = 30  # epochs that the document says would have been enough


def loss_curves(job: Job) -> RenderedFigure:
    """Figure 2, from each run's loss.csv."""
    folders = {STAGES[stage].method: job.project.artifact(stage) for stage in COMPARED}
    curves = {method: read_steps(folder / LOSS) for method, folder in folders.items()}
    counts = {method: _counted(read_manifest(folder)["parameters"]) for method, folder in folders.items()}
    methods = _methods(curves, counts)
    return RenderedFigure(
        NAME,
        "Figure 2, §2.3",
        "Loss curves from MiniGPT fine-tuning",
        _shows(methods),
        _caption(methods),
        (methods, _epochs(curves)),
        lambda figure: compare(figure, curves, counts),
        (WIDE, 3.0),
    )


def _counted(parameters: Mapping[str, int]) -> dict[str, Any]:
    trainable = parameters["trainable"]
    return {"trainable": trainable, "trainable_percent": 100 * trainable / parameters["total"]}


def _epochs(curves: Mapping[str, Sequence[Step]]) -> Table:
    rows: list[Row] = [
        {"method": method, "epoch": epoch, "loss": loss}
        for method, steps in curves.items()
        for epoch, loss in enumerate(epoch_means(steps), 1)
    ]
    return Table(NAME, "Mean loss of each epoch, nats a token", rows)


def _methods(curves: Mapping[str, Sequence[Step]], counts: Mapping[str, Mapping[str, Any]]) -> Table:
    rows: list[Row] = [
        {
            "method": method,
            "trainable": counts[method]["trainable"],
            "share": counts[method]["trainable_percent"] / 100,
            "flat_from_epoch": flat_from(steps),
            "final_loss": final_loss(steps),
            "drop_by_30": _drop_by(ENOUGH, epoch_means(steps)),
        }
        for method, steps in curves.items()
    ]
    forms = {"share": ".1%", "final_loss": ".3f", "drop_by_30": ".1%", "flat_from_epoch": ""}
    title = "What trains, and from which epoch the loss is flat: every later one within 5% of the whole drop"
    return Table(f"{NAME}_methods", title, rows, forms)


def _drop_by(epoch: int, means: Sequence[float]) -> float | None:
    """The share of the whole drop that is done; None where the run is no longer than that, or does not drop."""
    drop = means[0] - means[-1] if means else 0.0
    return (means[0] - means[epoch - 1]) / drop if len(means) > epoch and drop > 0 else None


def _flat(row: Row) -> str:
    flat = row["flat_from_epoch"]
    return f"{NAMES[str(row['method'])]} {f'from epoch {flat}' if flat else 'not yet'}"


def _shows(methods: Table) -> str:
    return f"flat: {', '.join(_flat(row) for row in methods.rows)}"


def _caption(methods: Table) -> str:
    known = [(int(str(row["flat_from_epoch"])), str(row["method"])) for row in methods.rows if row["flat_from_epoch"]]
    first = f" The earliest is {NAMES[min(known)[1]]}." if known else ""
    done = [row for row in methods.rows if row["drop_by_30"] is not None]
    said = ", ".join(f"{NAMES[str(row['method'])]} {shown(row['drop_by_30'], '.1%')}" for row in done)
    by = f" By epoch {ENOUGH}, which the document says would have been enough, of the whole drop is done: {said}."
    return "\n\n".join(
        [
            "Left: the mean training loss of each epoch, on a logarithmic scale, with a stroke at the first epoch from "
            "which it is flat. Right: the parameters that each method trains.",
            f"The document says that all three converge around epoch 25 to 35, LoRA first. Measured: "
            f"{'; '.join(_flat(row) for row in methods.rows)}.{first}{by if done else ''}",
        ]
    )
