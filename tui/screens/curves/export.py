"""Export what is shown: a chart, drawn by another process, or the numbers as CSV."""

import asyncio
import csv
import json
import sys
from collections.abc import Iterator, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.files.artifact import write_file
from pipeline.files.home import expand
from pipeline.project.logs.run_log import COLUMNS, OPTIONAL
from tui.screens.curves.metrics import METRICS
from tui.screens.curves.runs import RunView
from tui.screens.curves.selection import Drawn
from tui.widgets.plot.scale import Range, power_of_ten

KINDS = (".svg", ".png", ".csv")
COLUMNS_EXPORTED = 600  # points of a line, at most


def panel(
    metric: str, drawn: Sequence[Drawn], x: Range, y: Range | None = None, log: bool = False
) -> dict[str, Any]:
    """A panel for `pipeline.stages.charts`, in plain values. With `log`, `y` is given in exponents
    of ten.
    """
    parts = []
    for line in drawn:
        columns, held_out = line.columns(metric, x, COLUMNS_EXPORTED), METRICS[metric].held_out
        marks = line.columns(held_out, x, COLUMNS_EXPORTED) if held_out and not line.quiet else []
        flat = line.flat() if metric == "loss" and not line.quiet else None
        flat_column = next((c for c in columns if flat and c.x >= flat[1] >= columns[0].x), None)
        label = line.view.run.curve_label(line.curve_log.name) + (
            f", | flat from epoch {flat[0]:.0f}" if flat else ""
        )
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


async def save(
    path: Path,
    views: Sequence[RunView],
    panels: Sequence[dict[str, Any]],
    x: Range,
    smoothing: float,
) -> None:
    """Write the runs' numbers or the panels, as the suffix of `path` says. Raises UserError and
    OSError.
    """
    kind = path.suffix[1:].lower()
    if kind == "csv":
        chunks = csv_lines(views)
    else:
        picture = {"format": kind, "title": f"smoothing {smoothing:g}", "x": x, "panels": panels}
        chunks = iter([await render_chart(picture)])
    await asyncio.to_thread(write_file, path, chunks, durable=True)


async def render_chart(chart: dict[str, Any]) -> bytes:
    """The chart as the bytes of an image file. Raises UserError if the drawing process fails."""
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "pipeline.stages.charts", stdin=pipe, stdout=pipe, stderr=pipe
    )
    out, err = await process.communicate(json.dumps(chart).encode())
    if process.returncode:
        reason = (
            err.decode(errors="replace").strip().splitlines() or [f"exit code {process.returncode}"]
        )[-1]
        raise UserError(
            f"The chart could not be drawn: {reason}. Export CSV instead, or run `lora doctor`."
        )
    return out


def csv_lines(views: Sequence[RunView]) -> Iterator[bytes]:
    """The header, then all rows, one chunk per curve. A column that no run has is left out."""
    curves = [
        (view.run.curve_label(curve.name), curve.log)
        for view in views
        for curve in view.curve_logs.values()
    ]
    optional = [name for name in OPTIONAL if any(log.series[name].y for _, log in curves)]
    yield (",".join(("run", *COLUMNS, *optional)) + "\n").encode()
    for label, log in curves:
        text = StringIO()
        rows = csv.writer(text, lineterminator="\n")
        # step → value
        sparse = [dict(zip(log.series[n].x, log.series[n].y, strict=True)) for n in optional]
        for step, *values in zip(
            log.steps, *(log.columns[column] for column in COLUMNS), strict=True
        ):
            cells = [*values, *(column.get(step) for column in sparse)]
            rows.writerow([label, *("" if cell is None else f"{cell:.10g}" for cell in cells)])
        yield text.getvalue().encode()


def free_name(root: Path, stem: str) -> str:
    """A name that does not exist yet: curves.svg, else curves-2.svg, …"""
    names = (f"{stem}{number}.svg" for number in ("", *(f"-{number}" for number in range(2, 1000))))
    return next((name for name in names if not (root / name).exists()), f"{stem}.svg")


def path_for(root: Path, answer: str) -> Path:
    """The path that was typed. Raises UserError if nothing can be written there."""
    path = root / expand(answer)
    if path.suffix.lower() not in KINDS:
        raise UserError(
            f"{answer} must end in .svg or .png for a picture, or in .csv for the numbers."
        )
    if not path.parent.is_dir():
        raise UserError(f"{path.parent} is not a folder. Choose one that exists.")
    return path
