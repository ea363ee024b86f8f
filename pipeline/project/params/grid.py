"""The adapters of a sweep: every combination of the grid's values, named after them."""

import json
import os
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.project.params.sections import FinetuneLora, FinetuneSweep

TABLE = "sweep.json"  # adapter → outcome; in the run folder only those that ended so far
DONE, STOPPED, DIVERGED = "done", "stopped early", "diverged"
MAX_ADAPTERS = 256  # adapters in one pass
MAX_NAME = 100  # characters of a name, which is also a folder's
ABBREVIATIONS = {
    "learning_rate": "lr",
    "target_modules": "targets",
    "init_lora_weights": "init",
    "loraplus_ratio": "plus",
}


def variants(base: FinetuneLora, sweep: FinetuneSweep) -> dict[str, FinetuneLora]:
    """Name → settings of each adapter, in the grid's order; only `base` if the grid is empty.

    Raises UserError for an invalid or duplicate combination, and for too many.
    """
    keys, lists = list(sweep.grid), list(sweep.grid.values())
    if (count := prod(map(len, lists))) > MAX_ADAPTERS:
        raise UserError(
            f"finetune_sweep.grid has {count} combinations; at most {MAX_ADAPTERS} adapters can train together. "
            "Shorten its lists."
        )
    combinations = [dict(zip(keys, values, strict=True)) for values in product(*lists)]
    twice = next((values for n, values in enumerate(combinations) if values in combinations[:n]), None)
    if twice is not None:
        raise UserError(f"finetune_sweep.grid has {_adapter_name(twice)} twice. Remove one of them.")
    names = _disambiguate([_adapter_name(values) or "adapter" for values in combinations])
    return dict(zip(names, (replace(base, **values) for values in combinations), strict=True))


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


def _adapter_name(values: Mapping[str, Any]) -> str:
    """Such as rank-4_seed-0, a valid folder name on every file system."""
    return "_".join(f"{ABBREVIATIONS.get(key, key)}-{_format_value(value)}" for key, value in values.items())


def _format_value(value: Any) -> str:
    if isinstance(value, Mapping):
        return "+".join(f"{_format_value(key)}={_format_value(item)}" for key, item in value.items()) or "none"
    if isinstance(value, tuple):
        return "+".join(map(_format_value, value))
    return re.sub(r"[^\w.=+-]+", "~", f"{value:g}" if isinstance(value, float) else str(value))


def _disambiguate(names: Iterable[str]) -> list[str]:
    """Truncate long names, and append numbers to duplicates."""
    unique: list[str] = []
    for name in names:
        short, number = name[:MAX_NAME], 2
        while short in unique:
            short, number = f"{name[:MAX_NAME]}.{number}", number + 1
        unique.append(short)
    return unique
