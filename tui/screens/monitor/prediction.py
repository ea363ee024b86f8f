"""The memory that a running stage predicted for itself, and what it measured since: from its run
folder.
"""

import re
from pathlib import Path
from typing import NamedTuple

from pipeline.calc.settings import CONTEXT
from pipeline.project.logs.run_log import TELEMETRY, TELEMETRY_COLUMNS, parse_telemetry
from pipeline.project.logs.run_state import Journal

TAIL = 1024  # bytes: several lines of telemetry
_NOTE = re.compile(r"([\d.]+) (GiB|MiB|KiB|B) of tensors (predicted|measured) at the peak")
_UNITS = {"GiB": 2**30, "MiB": 2**20, "KiB": 2**10, "B": 1}


class Prediction(NamedTuple):
    """Bytes of tensors at the peak of a step (0: not known), and the peak of the whole process on
    the CPU.
    """

    predicted: int
    measured: int = 0
    resident: int = 0
    device: str = ""

    @property
    def on_gpu(self) -> int:
        """Bytes that are predicted for each GPU of the run, with CUDA's context; 0 if it does not
        run on one.
        """
        return self.predicted + CONTEXT if self.device == "cuda" else 0

    @property
    def of_process(self) -> int:
        """Bytes that are predicted for the process: beside the tensors it holds libraries. 0 until
        that is measured.
        """
        if self.device == "cuda" or not (self.predicted and self.measured):
            return 0
        return self.resident - self.measured + self.predicted


def read_prediction(folder: Path, run: Journal | None) -> Prediction | None:
    """What a stage's run folder says. Its telemetry is written in blocks; until the first, its
    notes say it.
    """
    for path in (folder / TELEMETRY, *folder.glob(f"*/{TELEMETRY}")):
        if prediction := _last_line(path):
            return prediction
    found = {
        match[3]: round(float(match[1]) * _UNITS[match[2]])
        for match in map(_NOTE.search, run.notes if run else ())
        if match
    }
    return (
        Prediction(found["predicted"], found.get("measured", 0)) if "predicted" in found else None
    )


def _last_line(path: Path) -> Prediction | None:
    """The last complete line of a telemetry file, or None if it has no prediction."""
    try:
        with path.open("rb") as file:
            file.seek(max(file.seek(0, 2) - TAIL, 0))
            *_, line, _ = file.read().decode(errors="replace").split("\n")
        telemetry, device = (
            parse_telemetry(line),
            line.split(",")[TELEMETRY_COLUMNS.index("device")],
        )
    except (OSError, ValueError):
        return None
    if not telemetry.predicted:
        return None
    return Prediction(telemetry.predicted, telemetry.measured, telemetry.resident, device)
