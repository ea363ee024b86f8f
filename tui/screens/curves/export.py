"""Export the Curves screen: a chart, drawn by another process, or the numbers as CSV."""

import asyncio
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.project.logs.run_log import COLUMNS, OPTIONAL
from tui.screens.curves.series import Log, Series
from tui.widgets.plot.curve import Curve, Range

FORMATS = ("svg", "png", "csv")


def panel(title: str, labels: Sequence[str], curves: Sequence[Curve], y: Range | None, log: bool) -> dict[str, Any]:
    """A panel for `pipeline.stages.charts`. `y` and the curves hold plain values, not exponents of ten."""
    return {"title": title, "log": log, "y": y, "curves": list(map(_curve_data, labels, curves))}


def _curve_data(label: str, curve: Curve) -> dict[str, Any]:
    columns, flat = curve.columns, curve.flat_column()
    return {
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
        name = '"' + label.replace('"', '""') + '"' if set(label) & set(',"\n') else label
        columns: list[Iterator[str]] = [map(_format_number, log.columns[column]) for column in COLUMNS]
        columns += [_sparse_cells(log.steps, log.series[column]) for column in optional]
        yield "".join(f"{name},{','.join(row)}\n" for row in zip(*columns, strict=True)).encode()


def _sparse_cells(steps: Iterable[float], series: Series) -> Iterator[str]:
    """A cell per step, empty where the series has no value."""
    values = dict(zip(series.x, series.y, strict=True))
    return (_format_number(values[step]) if step in values else "" for step in steps)


def _format_number(value: float) -> str:
    return f"{value:.10g}"


def save(path: Path, chunks: Iterable[bytes]) -> None:
    """Write to a temporary file, then rename it to `path` (atomic). Raises OSError."""
    new = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with new.open("wb") as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        new.unlink(missing_ok=True)


def free_name(root: Path, stem: str, kind: str) -> Path:
    """A path that does not exist yet: curves.svg, else curves-2.svg, …"""
    numbers = ["", *(f"-{number}" for number in range(2, 1000))]
    paths = (root / f"{stem}{number}.{kind}" for number in numbers)
    return next((path for path in paths if not path.exists()), root / f"{stem}.{kind}")
