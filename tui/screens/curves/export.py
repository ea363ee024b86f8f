"""Export the Curves screen: a dialog for format and path; a chart, drawn by another process, or the numbers as CSV."""

import asyncio
import csv
import json
import sys
from collections.abc import Iterator, Sequence
from io import StringIO
from pathlib import Path
from typing import Any, ClassVar

from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import Button, Input, RadioButton, RadioSet, Static

from pipeline.errors import UserError
from pipeline.project.logs.run_log import COLUMNS, OPTIONAL
from tui.screens.curves.metrics import METRICS
from tui.screens.curves.runs import RunView
from tui.screens.curves.selection import Drawn
from tui.widgets.plot.scale import Range, power_of_ten

LABELS = {"svg": "SVG, a picture for print", "png": "PNG, a picture", "csv": "CSV, the numbers"}
FORMATS = tuple(LABELS)
COLUMNS_EXPORTED = 600  # points of a line, at most


def panel(metric: str, drawn: Sequence[Drawn], x: Range, y: Range | None = None, log: bool = False) -> dict[str, Any]:
    """A panel for `pipeline.stages.charts`, in plain values. With `log`, `y` is given in exponents of ten."""
    parts = []
    for line in drawn:
        columns, held_out = line.columns(metric, x, COLUMNS_EXPORTED), METRICS[metric].held_out
        marks = line.columns(held_out, x, COLUMNS_EXPORTED) if held_out and not line.quiet else []
        flat = line.flat() if metric == "loss" and not line.quiet else None
        flat_column = next((c for c in columns if flat and c.x >= flat[1] >= columns[0].x), None)
        label = line.view.run.curve_label(line.curve_log.name) + (f", | flat from epoch {flat[0]:.0f}" if flat else "")
        parts.append(
            {
                "label": "" if line.quiet else label,
                "color": line.look.color,
                "sign": line.look.sign,
                "dim": line.quiet,
                "flat": (flat_column.x, flat_column.mean) if flat_column else None,
                "x": [column.x for column in columns],
                "low": [column.low for column in columns],
                "high": [column.high for column in columns],
                "mean": [column.mean for column in columns],
                "held_out": {"x": [c.x for c in marks], "y": [c.mean for c in marks]},
            }
        )
    if y and log:
        y = power_of_ten(y[0]), power_of_ten(y[1])
    return {"title": METRICS[metric].title, "log": log, "y": y, "curves": parts}


async def render_chart(chart: dict[str, Any]) -> bytes:
    """The chart as the bytes of an image file. Raises UserError if the drawing process fails."""
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "pipeline.stages.charts"), stdin=pipe, stdout=pipe, stderr=pipe
    )
    out, err = await process.communicate(json.dumps(chart).encode())
    if process.returncode:
        reason = (err.decode(errors="replace").strip().splitlines() or [f"exit code {process.returncode}"])[-1]
        raise UserError(f"The chart could not be drawn: {reason}. Export CSV instead, or run `lora doctor`.")
    return out


def csv_lines(views: Sequence[RunView]) -> Iterator[bytes]:
    """The header, then all rows, one chunk per curve. A column that no run has is left out."""
    curves = [(view.run.curve_label(curve.name), curve.log) for view in views for curve in view.curve_logs.values()]
    optional = [name for name in OPTIONAL if any(log.series[name].y for _, log in curves)]
    yield (",".join(("run", *COLUMNS, *optional)) + "\n").encode()
    for label, log in curves:
        text = StringIO()
        rows = csv.writer(text, lineterminator="\n")
        sparse = [dict(zip(log.series[n].x, log.series[n].y, strict=True)) for n in optional]  # step → value
        for step, *values in zip(log.steps, *(log.columns[column] for column in COLUMNS), strict=True):
            cells = [*values, *(column.get(step) for column in sparse)]
            rows.writerow([label, *("" if cell is None else f"{cell:.10g}" for cell in cells)])
        yield text.getvalue().encode()


class Format(RadioButton):
    """A radio button that is empty when off: Textual's differs in colour only."""

    @property
    def _button(self) -> Content:
        self.BUTTON_INNER = "●" if self.value else " "
        return super()._button


class ExportScreen(ModalScreen[Path | None]):
    """Asks for a format and a path; returns the path, whose suffix is the format."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "dismiss", "Close")]
    DEFAULT_CSS = """
    ExportScreen { align: center middle; }
    ExportScreen Input { margin: 1 0; }
    ExportScreen Horizontal { height: auto; align-horizontal: right; }
    ExportScreen Button { margin-left: 2; }
    ExportScreen RadioSet { width: 100%; }
    """

    def __init__(self, root: Path, stem: str) -> None:
        super().__init__()
        self.root, self.stem = root, stem

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog"):
            yield Static("Export what is shown: the runs that are switched on, this range, this smoothing.")
            with RadioSet():
                for kind in FORMATS:
                    yield Format(LABELS[kind], value=kind == FORMATS[0], id=kind)
            yield Input(self._default(FORMATS[0]), placeholder="a path, from the project's folder")
            yield Static(id="note")
            with Horizontal():
                yield Button("Export", variant="primary", id="export")
                yield Button("Cancel", id="cancel")

    def on_mount(self) -> None:
        self.set_focus(self.query_one(Input))

    def _default(self, kind: str) -> str:
        """A name that does not exist yet: curves.svg, else curves-2.svg, …"""
        names = (f"{self.stem}{number}.{kind}" for number in ("", *(f"-{number}" for number in range(2, 1000))))
        return next((name for name in names if not (self.root / name).exists()), f"{self.stem}.{kind}")

    @property
    def path(self) -> Path:
        return self.root / Path(self.query_one(Input).value.strip()).expanduser()

    @on(RadioSet.Changed)
    def _format_changed(self, event: RadioSet.Changed) -> None:
        kind, field = str(event.pressed.id), self.query_one(Input)
        chosen = Path(field.value)
        defaults = [self._default(name) for name in FORMATS]
        field.value = self._default(kind) if field.value in defaults else str(chosen.with_suffix(f".{kind}"))

    @on(Input.Changed)
    def _update_note(self) -> None:
        self.query_one("#note", Static).update(
            self._problem() or ("" if not self.path.exists() else "will be replaced")
        )

    def _problem(self) -> str:
        """Why the path is invalid; empty if it is valid."""
        kind = self.path.suffix.removeprefix(".").lower()
        if kind not in FORMATS:
            return f"The path must end in {', '.join(f'.{name}' for name in FORMATS)}."
        return "" if self.path.parent.is_dir() else f"{self.path.parent} is not a folder."

    @on(Input.Submitted)
    @on(Button.Pressed, "#export")
    def _export(self) -> None:
        if not self._problem():
            self.dismiss(self.path)

    @on(Button.Pressed, "#cancel")
    def _cancel(self) -> None:
        self.dismiss(None)
