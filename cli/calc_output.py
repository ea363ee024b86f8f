"""What all answers of `lora calc` share: where they go, what was asked, and how a size is written."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cli.console import print_json
from pipeline.calc.fit import gpus
from pipeline.calc.settings import Method, Run
from pipeline.calc.sources import Model
from pipeline.errors import UserError

GIB, MIB = 2**30, 2**20


@dataclass(frozen=True)
class Output:
    """Where an answer goes: one JSON document, CSV rows, or a table on the terminal."""

    json: bool
    csv: bool

    def __post_init__(self) -> None:
        if self.json and self.csv:
            raise UserError("--json and --csv exclude each other.")

    def rows(self, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> bool:
        """Print rows as JSON or CSV; False where neither was asked for."""
        if self.json:
            print_json([dict(zip(columns, row, strict=True)) for row in rows])
        elif self.csv:
            import csv

            csv.writer(sys.stdout, lineterminator="\n").writerows([columns, *rows])
        return self.json or self.csv


@dataclass(frozen=True)
class Question:
    """A model and one configuration of it."""

    model: Model
    method: Method
    run: Run


def title_of(method: Method) -> str:
    """The method in words."""
    if method.kind == "lora":
        name = "DoRA" if method.dora else "rsLoRA" if method.rslora else "LoRA"
        ends = {"none": "", "all": ", embeddings and head", "new_rows": f", {method.new_rows} new rows"}
        return f"{name} r={method.rank} on {', '.join(method.targets)}{ends[method.embeddings]}"
    if method.kind == "freeze":
        blocks = f"freeze, last {method.last_blocks} blocks"
        return f"{blocks}, embeddings and head" if method.train_embeddings else blocks
    if method.kind in ("prefix", "prompt"):
        return f"{method.kind} tuning, {method.virtual_tokens} virtual tokens"
    return "full fine-tuning"


def gib(size: float) -> str:
    """GiB with two decimals; what is smaller than that in MiB or KiB, so that a tiny model has numbers too."""
    if size == 0:
        return "0"
    if size < 0.01 * GIB:
        return f"{size / MIB:.2f} MiB" if size >= 0.1 * MIB else f"{size / 1024:.1f} KiB"
    return f"{size / GIB:.2f}"


def smallest(size: int) -> str:
    """The label of the smallest NVIDIA device that holds so many bytes."""
    cards = (one for name, one in gpus().items() if not name.startswith("mac-"))
    return next((one.label for one in cards if one.bytes >= size), "none of these")
