"""Tables of what was measured: written as CSV, read back by those who check it, shown on a terminal or a page.

A quantity that was measured several times, with other seeds, is a `Spread`: three columns x, x_low and x_high in the
file, one cell where it is shown.
"""

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from pipeline.errors import UserError

LOW, HIGH = "_low", "_high"
TIME = "time"


class Spread(NamedTuple):
    """Mean, least and greatest of several runs."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread":
        """Raises ValueError where there are none."""
        found = list(values)
        if not found:
            raise ValueError("a spread of no values")
        return cls(math.fsum(found) / len(found), min(found), max(found))


def min_max(cells: Iterable[Spread]) -> list[list[float]]:
    """How far the least lies below each mean and the greatest above it: error bars."""
    found = list(cells)
    return [[c.mean - c.low for c in found], [c.high - c.mean for c in found]]


def mean(cell: "Cell") -> float:
    """A cell's number, of a spread the mean. Raises TypeError for a cell that holds none."""
    if isinstance(cell, Spread):
        return cell.mean
    if not isinstance(cell, int | float):
        raise TypeError(f"{cell!r} is no number")
    return float(cell)


def spread(cell: "Cell") -> Spread:
    """A cell that is one. Raises TypeError for any other."""
    if not isinstance(cell, Spread):
        raise TypeError(f"{cell!r} is no spread")
    return cell


Value = str | int | float | bool | None
Cell = Value | Spread
Row = Mapping[str, Cell]


@dataclass(frozen=True)
class Table:
    """Rows of the same columns, at least one; `name` is the file's, without .csv.

    `formats`: column → how its numbers are shown, such as ".0%"; others with four digits. `hidden`: columns that are
    for who reads the file.
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
        """The columns that are shown, in words, and whether they hold numbers."""
        names = [name for name in self.columns if name not in self.hidden]
        return {n.replace("_", " "): not any(isinstance(row[n], str) for row in self.rows) for n in names}

    def shown(self) -> list[list[str]]:
        """Every cell that is shown, as text."""
        names = [name for name in self.columns if name not in self.hidden]
        return [[shown(row[name], self.formats.get(name, "")) for name in names] for row in self.rows]

    def markdown(self) -> str:
        """The table for a page, numbers to the right."""
        ends = ["---:" if number else "---" for number in self.heads.values()]
        return "".join(f"| {' | '.join(line)} |\n" for line in (list(self.heads), ends, *self.shown()))

    def write(self, folder: Path) -> None:
        """`name`.csv, numbers to six digits."""
        spread = {name for row in self.rows for name, cell in row.items() if isinstance(cell, Spread)}
        columns = [name + end for name in self.columns for end in (("", LOW, HIGH) if name in spread else ("",))]
        with (folder / f"{self.name}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(columns)
            for row in self.rows:
                cells = (_values(row[name], name in spread) for name in self.columns)
                writer.writerow([_written(value) for values in cells for value in values])


def _values(cell: Cell, spread: bool) -> tuple[Value, ...]:
    if isinstance(cell, Spread):
        return tuple(cell)
    return (cell,) * 3 if spread else (cell,)


def _written(value: Value) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def shown(cell: Cell, form: str = "") -> str:
    """A cell as text; of a spread the mean and how far a run lies from it at most: 94% ±3."""
    if cell is None or isinstance(cell, str):
        return cell or "–"
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    if isinstance(cell, Spread):
        mean, far = (
            f"{value:{form or '.3g'}}" for value in (cell.mean, max(cell.high - cell.mean, cell.mean - cell.low))
        )
        return mean if float(far.rstrip("%")) == 0 else f"{mean} ±{far.rstrip('%')}"
    return f"{cell:{form or (',' if isinstance(cell, int) else '.4g')}}"


def times(rows: Sequence[Row]) -> Table:
    """TIME of a run's folder: seconds differ from run to run, and so are no part of what a study finds."""
    return Table(TIME, "Time on this machine", rows, {"steps": ".0f", "seconds": ".2f", "ms_a_step": ".2f"})


def read_table(path: Path) -> list[dict[str, Cell]]:
    """The rows of a file that `Table.write` wrote. Raises UserError."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            lines = list(csv.DictReader(file, strict=True))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist. Run its study, or `dvc repro`.") from None
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{path}: {error}. Run its study again.") from None
    return [_joined({name: _read(text) for name, text in line.items()}) for line in lines]


def _joined(values: Mapping[str, Value]) -> dict[str, Cell]:
    """The three columns of a spread as one."""
    found: dict[str, Cell] = {}
    for name, value in values.items():
        low, high = values.get(name + LOW), values.get(name + HIGH)
        if name.endswith((LOW, HIGH)) and name.removesuffix(LOW).removesuffix(HIGH) in values:
            continue
        spread = all(isinstance(each, int | float) for each in (value, low, high))
        found[name] = Spread(float(value), float(low), float(high)) if spread else value  # type: ignore[arg-type]
    return found


def _read(text: str | None) -> Value:
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
