"""What a stage's run says of itself: `run.json` in its run folder."""

import fcntl
import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

JOURNAL = "run.json"


@dataclass(frozen=True)
class Journal:
    """The last word of a run: how far it is of how much, or why it ended."""

    state: Literal["running", "done", "stopped", "failed"]
    pid: int
    started: float
    done: int
    total: int
    text: str
    message: str
    notes: list[str]


def read(folder: Path) -> Journal | None:
    """The journal of a run folder; None where there is none, or none that can be read."""
    try:
        tree = json.loads((folder / JOURNAL).read_text(encoding="utf-8"))
        return Journal(**{field.name: tree[field.name] for field in fields(Journal)})
    except (OSError, ValueError, KeyError, TypeError):
        return None


def alive(folder: Path) -> bool:
    """Whether a process holds the run's lock."""
    try:
        with (folder / "lock").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
