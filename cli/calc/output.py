"""What all outputs of `lora calc` share: the format and the question."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cli.console import print_json
from pipeline.calc.architecture import Model
from pipeline.calc.settings import FinetuningMethod, TrainingConfig
from pipeline.errors import UserError


@dataclass(frozen=True)
class Output:
    """The output format: one JSON document, CSV rows, or a table on the terminal."""

    json: bool
    csv: bool

    def __post_init__(self) -> None:
        if self.json and self.csv:
            raise UserError("--json and --csv exclude each other.")

    def rows(self, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> bool:
        """Print rows as JSON or CSV. Returns False, without printing, if neither was requested."""
        if self.json:
            print_json([dict(zip(columns, row, strict=True)) for row in rows])
        elif self.csv:
            import csv

            csv.writer(sys.stdout, lineterminator="\n").writerows([columns, *rows])
        return self.json or self.csv


@dataclass(frozen=True)
class Question:
    """A model and a training configuration."""

    model: Model
    method: FinetuningMethod
    run: TrainingConfig
