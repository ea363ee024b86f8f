"""Export what is shown: a chart, drawn by another process, or the numbers as CSV."""

import json
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.files.artifact import write_file
from pipeline.files.worker import python_module
from pipeline.project.logs.runs import Run
from pipeline.views.runs import steps_csv

QUESTION = (
    "Save what is shown as a picture (.svg, .png), or the numbers of the runs that are on (.csv)"
)
KINDS = (".svg", ".png", ".csv")


def check(path: Path) -> None:
    """Raises UserError if nothing can be written as the suffix says."""
    if path.suffix not in KINDS:
        raise UserError(
            f"{path.name} must end in .svg or .png for a picture, or in .csv for the numbers."
        )


def save(path: Path, runs: Iterable[Run], panels: list[dict[str, Any]], title: str) -> None:
    """Write the numbers of the runs, or the panels, as the suffix of `path` says; in a thread, as it
    takes long. Raises UserError and OSError.
    """
    if path.suffix == ".csv":
        contents = steps_csv(runs)
    else:
        contents = render_chart({"format": path.suffix[1:], "title": title, "panels": panels})
    write_file(path, [contents], durable=True)


def render_chart(chart: dict[str, Any]) -> bytes:
    """The chart as the bytes of an image file. Raises UserError if the drawing process fails."""
    command, text = python_module("pipeline.stages.charts"), json.dumps(chart).encode()
    done = subprocess.run(command, input=text, capture_output=True, check=False)
    if done.returncode:
        *_, reason = done.stderr.decode(errors="replace").splitlines() or ["it says no more"]
        raise UserError(
            f"The chart could not be drawn: {reason}. Export CSV instead, or run `lora doctor`."
        )
    return done.stdout
