"""What came of a sweep: a row an adapter."""

from pathlib import Path

from cli.console import stdout, table
from pipeline.files.artifact import read_json
from pipeline.project.params.grid import TABLE

COLUMNS = ("trained", "steps", "loss", "held out")


def show(folder: Path) -> None:
    """The table of a sweep's adapters."""
    rows = []
    for name, end in read_json(folder / TABLE, "Run `lora finetune sweep`").items():
        losses = ("" if end[key] is None else f"{end[key]:.4f}" for key in ("final_loss", "eval_loss"))
        rows.append((name, f"{end['trainable']:,}", f"{end['steps']:,}", *losses, end["state"]))
    stdout.print(table(("adapter", *COLUMNS, "end"), rows, right=COLUMNS))
