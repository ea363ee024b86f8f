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
from pipeline.views.curves import Curve, Runs, RunView
from pipeline.views.series import METRICS, Column
from tui.app import Workbench
from tui.dialogs import Ask, PathScreen
from tui.panes.plot.scale import Range, power_of_ten
from tui.screens.curves.lines import Drawn

QUESTION = (
    "Save what is shown as a picture (.svg, .png), or the numbers of the runs that are on (.csv)"
)
KINDS = (".svg", ".png", ".csv")
COLUMNS_EXPORTED = 600  # points of a line, at most


def panel(
    metric: str, lines: Sequence[Drawn], x: Range, y: Range | None = None, log: bool = False
) -> dict[str, Any]:
    """A panel for `pipeline.stages.charts`, in plain values. With `log`, `y` is given in exponents
    of ten.
    """
    if y and log:
        y = power_of_ten(y[0]), power_of_ten(y[1])
    curves = [_curve(line, metric, x) for line in lines]
    return {"title": METRICS[metric].title, "log": log, "y": y, "curves": curves}


def _curve(drawn: Drawn, metric: str, x: Range) -> dict[str, Any]:
    curve, look = drawn.curve, drawn.curve.view.look
    columns = drawn.columns(metric, x, COLUMNS_EXPORTED)
    line, flat = drawn.line(metric, x, COLUMNS_EXPORTED, labels=False), curve.flat()
    note = f", | flat from epoch {flat[0]:.0f}" if flat and metric == "loss" else ""
    return {
        "label": "" if drawn.quiet else f"{curve.view.run.curve_label(curve.name)}{note}",
        "color": look.color,
        "sign": look.sign,
        "dim": drawn.quiet,
        "flat": line.flat,
        **{name: [getattr(column, name) for column in columns] for name in Column._fields},
        "held_out": {"x": [at for at, _ in line.marks], "y": [value for _, value in line.marks]},
    }


async def ask_path(workbench: Workbench, views: Sequence[RunView]) -> Path | None:
    """Ask where to save; None if the user does not. Raises UserError if nothing can be written
    there.
    """
    stem = f"curves-{views[0].run.stage}" if len(views) == 1 else "curves"
    names = (f"{stem}{number}.svg" for number in ("", *(f"-{n}" for n in range(2, 1000))))
    free = next((name for name in names if not (workbench.root / name).exists()), f"{stem}.svg")
    answer = await workbench.push_screen_wait(PathScreen(QUESTION, free))
    if answer is None:
        return None
    path = path_for(workbench.root, answer)
    ask = Ask(f"{answer} exists.", {"y": "replace it"}, title="Export")
    if path.exists() and not await workbench.push_screen_wait(ask):
        return None
    return path


async def save(path: Path, runs: Runs, panels: Sequence[dict[str, Any]], x: Range) -> None:
    """Write the numbers of the runs that are on, or the panels, as the suffix of `path` says.
    Raises UserError and OSError.
    """
    kind, title = path.suffix[1:].lower(), f"smoothing {runs.smoothing:g}"
    if kind == "csv":
        chunks = csv_lines(runs.curves)
    else:
        picture = {"format": kind, "title": title, "x": x, "panels": panels}
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


def csv_lines(curves: Sequence[Curve]) -> Iterator[bytes]:
    """The header, then all rows, one chunk per curve. A column that no run has is left out."""
    optional = [name for name in OPTIONAL if any(curve.log.series[name].y for curve in curves)]
    yield (",".join(("run", *COLUMNS, *optional)) + "\n").encode()
    for curve in curves:
        label, log, text = curve.view.run.curve_label(curve.name), curve.log, StringIO()
        rows = csv.writer(text, lineterminator="\n")
        # step → value
        sparse = [dict(zip(log.series[n].x, log.series[n].y, strict=True)) for n in optional]
        for step, *values in zip(
            log.steps, *(log.columns[column] for column in COLUMNS), strict=True
        ):
            cells = [*values, *(column.get(step) for column in sparse)]
            rows.writerow([label, *("" if cell is None else f"{cell:.10g}" for cell in cells)])
        yield text.getvalue().encode()


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
