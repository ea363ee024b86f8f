"""How each adapter of a sweep ended: `sweep.json`, in the artifact and, while it trains, in the run folder."""

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

TABLE = "sweep.json"  # adapter → outcome; in the run folder only those that ended so far
DONE, STOPPED, DIVERGED = "done", "stopped early", "diverged"


def read_run_outcomes(folder: Path) -> dict[str, str]:
    """Name → outcome of each adapter that has ended, from an artifact or a run folder. Never raises."""
    try:
        rows = json.loads((folder / TABLE).read_text(encoding="utf-8"))
        return {name: str(row["state"]) for name, row in rows.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def write_run_outcomes(folder: Path, rows: Mapping[str, Mapping[str, Any]]) -> None:
    """Write the outcomes of adapters that ended early, atomically. If that fails, training continues without."""
    new = folder / f".{TABLE}.{os.getpid()}.tmp"
    with suppress(OSError):
        new.write_text(json.dumps(rows, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        new.replace(folder / TABLE)
