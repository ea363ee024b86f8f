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
from tui.screens.curves.series import Log
from tui.widgets.line_chart import Curve, Range, power_of_ten

LABELS = {"svg": "SVG, a picture for print", "png": "PNG, a picture", "csv": "CSV, the numbers"}
FORMATS = tuple(LABELS)


def panel(
    title: str, labels: Sequence[str], curves: Sequence[Curve], y: Range | None = None, log: bool = False
) -> dict[str, Any]:
    """A panel for `pipeline.stages.charts`, in plain values. With `log`, `y` is given in exponents of ten."""
    parts = []
    for label, curve in zip(labels, curves, strict=True):
        columns, flat = curve.columns, curve.flat_column()
        parts.append(
            {
                "label": label,
                "color": curve.color,
                "sign": curve.sign,
                "dim": curve.dim,
                "flat": (flat.x, flat.mean) if flat else None,
                "x": [column.x for column in columns],
                "low": [column.low for column in columns],
                "high": [column.high for column in columns],
                "mean": [column.mean for column in columns],
                "held_out": {"x": [c.x for c in curve.held_out], "y": [c.mean for c in curve.held_out]},
            }
        )
    if y and log:
        y = power_of_ten(y[0]), power_of_ten(y[1])
    return {"title": title, "log": log, "y": y, "curves": parts}


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


def csv_lines(logs: Sequence[tuple[str, Log]]) -> Iterator[bytes]:
    """The header, then all rows, one chunk per run. A column that no run has is left out."""
    optional = [name for name in OPTIONAL if any(log.series[name].y for _, log in logs)]
    yield (",".join(("run", *COLUMNS, *optional)) + "\n").encode()
    for label, log in logs:
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
