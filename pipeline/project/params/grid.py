"""The adapters of a sweep: every combination of the values in its grid, each with a name that says what is its own."""

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

TABLE = "sweep.json"  # name → how the adapter ended; in the run folder as far as that is known
DONE, STOPPED, DIVERGED = "done", "stopped early", "diverged"
MOST = 256  # adapters in one pass
LONGEST = 100  # characters of a name, which is a folder's
SHORT = {"learning_rate": "lr", "target_modules": "targets", "init_lora_weights": "init", "loraplus_ratio": "plus"}


def variants(base: FinetuneLora, sweep: FinetuneSweep) -> dict[str, FinetuneLora]:
    """Name → settings of each adapter, in the grid's order; the base's own where the grid is empty.

    Raises UserError for a combination that cannot be, for one that is there twice, and for too many.
    """
    keys, lists = list(sweep.grid), list(sweep.grid.values())
    if (count := prod(map(len, lists))) > MOST:
        raise UserError(f"finetune_sweep.grid makes {count} adapters; {MOST} can train together. Shorten its lists.")
    combinations = [dict(zip(keys, values, strict=True)) for values in product(*lists)]
    twice = next((values for n, values in enumerate(combinations) if values in combinations[:n]), None)
    if twice is not None:
        raise UserError(f"finetune_sweep.grid has {_name(twice)} twice. Leave one of them out.")
    names = _apart([_name(values) or "adapter" for values in combinations])
    return dict(zip(names, (replace(base, **values) for values in combinations), strict=True))


def read_run_outcomes(folder: Path) -> dict[str, str]:
    """Name → how it ended, of each adapter that has, from an artifact or a run folder. Never raises."""
    try:
        rows = json.loads((folder / TABLE).read_text(encoding="utf-8"))
        return {name: str(row["state"]) for name, row in rows.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def tell_ends(folder: Path, rows: Mapping[str, Mapping[str, Any]]) -> None:
    """Write which adapters have ended before the others, whole or not at all. What cannot be written stops no stage."""
    new = folder / f".{TABLE}.{os.getpid()}.tmp"
    with suppress(OSError):
        new.write_text(json.dumps(rows, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        new.replace(folder / TABLE)


def _name(values: Mapping[str, Any]) -> str:
    """rank-4_seed-0: a folder's name anywhere."""
    return "_".join(f"{SHORT.get(key, key)}-{_said(value)}" for key, value in values.items())


def _said(value: Any) -> str:
    if isinstance(value, Mapping):
        return "+".join(f"{_said(key)}={_said(item)}" for key, item in value.items()) or "none"
    if isinstance(value, tuple):
        return "+".join(map(_said, value))
    return re.sub(r"[^\w.=+-]+", "~", f"{value:g}" if isinstance(value, float) else str(value))


def _apart(names: Iterable[str]) -> list[str]:
    """The names, the long ones cut, each with a number behind it where there would be two of it."""
    found: list[str] = []
    for name in names:
        short, number = name[:LONGEST], 2
        while short in found:
            short, number = f"{name[:LONGEST]}.{number}", number + 1
        found.append(short)
    return found
