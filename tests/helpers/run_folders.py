"""Run folders made by hand, so that nothing in them depends on the machine."""

import fcntl
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TextIO

from pipeline.project.logs.run_log import COLUMNS, OPTIONAL, TELEMETRY_COLUMNS, write_run_outcomes
from tests.helpers.json_files import write_json

HEADER = ",".join(COLUMNS) + "\n"
START = {
    "finetune_full": 4.0,
    "finetune_freeze": 5.0,
    "finetune_lora": 6.0,
    "pretrain": 3.0,
    "train_from_scratch": 3.5,
}


def lines(start: float, first: int, last: int) -> str:
    """Steps `first` to `last` of a loss that falls from `start`, six steps an epoch."""
    text = ""
    for step in range(first, last + 1):
        loss = (
            start * math.exp(-step / 40) + 0.05 + 0.2 * abs(math.sin(step * step)) / (1 + step / 50)
        )
        text += f"{step},{(step - 1) // 6 + 1},{loss:.7g},0.001,{loss / 2:.7g},{step * 16}\n"
    return text


def measured(text: str, every: int = 30) -> str:
    """A log with an evaluation every so many steps, and the divergence from the base at each."""
    header, *rows = text.splitlines()
    found = [",".join((header, *OPTIONAL))]
    for row in rows:
        step, _, loss, *_ = row.split(",")
        held_out = f"{float(loss) * 1.1 + 0.3:.7g}" if int(step) % every == 0 else ""
        found.append(f"{row},{held_out},{0.02 * (1 - math.exp(-int(step) / 60)):.7g}")
    return "\n".join(found) + "\n"


def write_measured(root: Path, stage: str = "finetune_lora", every: int = 30) -> Path:
    """As write_run, with evaluations and divergence."""
    folder = write_run(root, stage)
    log = folder / "loss.csv"
    log.write_text(measured(log.read_text(encoding="utf-8"), every), encoding="utf-8")
    return folder


def write_run(
    root: Path,
    stage: str,
    steps: int = 300,
    state: str = "done",
    message: str = "",
    total: int = 300,
) -> Path:
    """A run folder with its logs and journal; returns it."""
    folder = root / "runs" / stage
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "loss.csv").write_text(HEADER + lines(START[stage], 1, steps), encoding="utf-8")
    rows = [f"{n},{n * 0.5:.6f},32.0,347078656,cpu,2034688,2036736\n" for n in range(1, steps + 1)]
    text = ",".join(TELEMETRY_COLUMNS) + "\n" + "".join(rows)
    (folder / "telemetry.csv").write_text(text, encoding="utf-8")
    journal(folder, state, steps, total, message)
    return folder


def write_sweep(
    root: Path,
    losses: Mapping[str, float],
    ends: Mapping[str, tuple[str, int]] | None = None,
    state: str = "done",
    steps: int = 300,
) -> Path:
    """A sweep's run folder: name → the loss its curve falls from; and of those that ended early,
    how and when.
    """
    ends = ends or {}
    folder = root / "runs/finetune_sweep"
    for name, start in losses.items():
        last = ends[name][1] if name in ends else steps
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "loss.csv").write_text(HEADER + lines(start, 1, last), encoding="utf-8")
        rows = [f"{n},{n * 0.5:.6f},32.0,347078656,cpu,0,2036736\n" for n in range(1, last + 1)]
        text = ",".join(TELEMETRY_COLUMNS) + "\n" + "".join(rows)
        (folder / name / "telemetry.csv").write_text(text, encoding="utf-8")
    write_ends(folder, ends)
    journal(folder, state, steps)
    return folder


def write_ends(folder: Path, ends: Mapping[str, tuple[str, int]]) -> None:
    write_run_outcomes(
        folder, {name: {"state": end, "steps": last} for name, (end, last) in ends.items()}
    )


def journal(
    folder: Path, state: str, done: int, total: int = 300, message: str = "", rate: float = 0.0
) -> None:
    """What the run says of itself."""
    word = {"state": state, "pid": 1, "started": 0.0, "done": done, "total": total, "rate": rate}
    write_json(folder / "run.json", {**word, "text": "", "message": message, "notes": []})


def hold(folder: Path) -> TextIO:
    """The run's lock, as its process holds it, until the file is closed."""
    file = (folder / "lock").open("a+")
    fcntl.flock(file, fcntl.LOCK_EX)
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file


def write_methods(root: Path) -> None:
    for stage in ("finetune_full", "finetune_freeze", "finetune_lora"):
        write_run(root, stage)


def write_samples(
    folder: Path, answers: Mapping[int, str | None], prompt: str = "die währung von bulgarien ist"
) -> None:
    """The samples of a run: step → its answer."""
    rows = ({"step": step, "prompt": prompt, "answer": answer} for step, answer in answers.items())
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "samples.jsonl").write_text(text, encoding="utf-8")
