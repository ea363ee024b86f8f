"""Tables of measurements: written and read as CSV, shown in the terminal and as Markdown.

A quantity measured with several seeds is a `Spread`: three columns x, x_low and x_high in the file,
one cell "x ±y" on display.
"""

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.files.artifact import read_manifest

LOW, HIGH = "_low", "_high"
TIME = "time"


class Spread(float):
    """A quantity over several runs, such as seeds: the number is their mean, with the extremes
    `low` and `high`.
    """

    low: float
    high: float

    def __new__(cls, mean: float, low: float, high: float) -> "Spread":
        spread = super().__new__(cls, mean)
        spread.low, spread.high = low, high
        return spread

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread":
        """Raises ValueError if `values` is empty."""
        numbers = list(values)
        if not numbers:
            raise ValueError("a spread needs at least one value")
        return cls(math.fsum(numbers) / len(numbers), min(numbers), max(numbers))


def spreads(names: Sequence[str], by_seed: Sequence[Sequence[float]]) -> dict[str, "Cell"]:
    """Name → Spread over the seeds of one tuple of numbers each; empty cells if there are none, as
    all diverged.
    """
    if not by_seed:
        return dict.fromkeys(names)
    return {
        name: Spread.of(values)
        for name, values in zip(names, zip(*by_seed, strict=True), strict=True)
    }


Cell = str | int | float | bool | None  # a float may be a Spread
Row = Mapping[str, Any]  # column → cell; readers know a column's type


@dataclass(frozen=True)
class Table:
    """One or more rows with the same columns. `name` is the file's name without .csv.

    `formats`: column → format of its numbers, such as ".0%" (default: four digits). `hidden`:
    columns that are in the file but not shown.
    """

    name: str
    title: str
    rows: Sequence[Row]
    formats: Mapping[str, str] = field(default_factory=dict)
    hidden: Sequence[str] = ()

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(self.rows[0])

    @property
    def heads(self) -> dict[str, bool]:
        """Heading of each column shown → whether the column is numeric."""
        names = [name for name in self.columns if name not in self.hidden]
        return {
            n.replace("_", " "): not any(isinstance(row[n], str) for row in self.rows)
            for n in names
        }

    def shown(self) -> list[list[str]]:
        """The rows as text, without hidden columns."""
        names = [name for name in self.columns if name not in self.hidden]
        return [
            [shown(row[name], self.formats.get(name, "")) for name in names] for row in self.rows
        ]

    def markdown(self) -> str:
        """The table as Markdown, numbers right-aligned."""
        alignments = ["---:" if number else "---" for number in self.heads.values()]
        return markdown((list(self.heads), alignments, *self.shown()))

    def write(self, folder: Path) -> None:
        """Write `name`.csv, numbers with six digits. Columns with a Spread get `_low` and `_high`
        beside them.
        """
        spreads = {
            name for row in self.rows for name, cell in row.items() if isinstance(cell, Spread)
        }
        columns = [
            name + end
            for name in self.columns
            for end in (("", LOW, HIGH) if name in spreads else ("",))
        ]
        with (folder / f"{self.name}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(columns)
            for row in self.rows:
                values: list[Cell] = []
                for name in self.columns:
                    cell = row[name]
                    ends = (cell.low, cell.high) if isinstance(cell, Spread) else (cell, cell)
                    values += (cell, *ends) if name in spreads else (cell,)
                writer.writerow(map(_format_csv, values))


def _format_csv(value: Cell) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    # Six digits: float32 has seven, and the last differs with the order in which a machine sums.
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def shown(cell: Cell, form: str = "") -> str:
    """A cell as text; a spread as its mean and the largest deviation from it: 94% ±3."""
    if cell is None or isinstance(cell, str):
        return cell or "–"
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    if isinstance(cell, Spread):
        mean, deviation = (
            f"{value:{form or '.3g'}}" for value in (cell, max(cell.high - cell, cell - cell.low))
        )
        return mean if float(deviation.rstrip("%")) == 0 else f"{mean} ±{deviation.rstrip('%')}"
    return f"{cell:{form or (',' if isinstance(cell, int) else '.4g')}}"


def markdown(lines: Iterable[Sequence[str]]) -> str:
    """The lines of a Markdown table, heads and alignments first."""
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def times(rows: Sequence[Row]) -> Table:
    """The table TIME of a run's folder. It is not part of the artifact, since seconds differ from
    run to run.
    """
    return Table(
        TIME, "Time on this machine", rows, {"steps": ".0f", "seconds": ".2f", "ms_a_step": ".2f"}
    )


def read_table(path: Path) -> list[dict[str, Cell]]:
    """Read the rows of a file written by `Table.write`. Raises UserError."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            lines = list(csv.DictReader(file, strict=True))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist. Run its study, or `dvc repro`.") from None
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{path}: {error}. Run its study again.") from None
    rows: list[dict[str, Cell]] = []
    for line in lines:
        values, row = {name: _parse_value(text) for name, text in line.items()}, dict[str, Cell]()
        for name, value in values.items():  # x, x_low and x_high are one spread
            if name.endswith((LOW, HIGH)) and name.removesuffix(LOW).removesuffix(HIGH) in values:
                continue
            spread = (value, values.get(name + LOW), values.get(name + HIGH))
            numbers = [float(number) for number in spread if isinstance(number, int | float)]
            row[name] = Spread(*numbers) if len(numbers) == 3 else value
        rows.append(row)
    return rows


def described(path: Path) -> Table:
    """The table in a file, with the title and the formats that the manifest beside it has. Raises
    UserError.
    """
    rows = read_table(path)
    if not rows:
        raise UserError(f"{path} has no rows. Make it again.")
    try:
        about = read_manifest(path.parent)["tables"][path.stem]
        return Table(
            path.stem, str(about["title"]), rows, dict(about["formats"]), list(about["hidden"])
        )
    # that of a figure or of a model describes no tables
    except (UserError, KeyError, TypeError, ValueError):
        return Table(path.stem, path.stem.replace("_", " "), rows)


def _parse_value(text: str | None) -> Cell:
    if not text:
        return None
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
