"""A LoRA step in one process with all threads against data parallelism in two, with half of the
threads each.
"""

import csv
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from statistics import median

from bench.measure import Row

LORA = str(Path(sys.executable).parent / "lora")
SHAPE = {
    "d_model": 512,
    "layers": 8,
    "heads": 8,
    "feed_forward": 2048,
    "max_positions": 64,
    "epochs": 1,
}
STEPS, BATCH, WORDS = 8, 8, 48
RUNS = {
    "one process": [],
    "two processes": ["--devices", "2"],
    "two, base shared": ["--devices", "2", "--shard"],
}
ROUNDS = 3


def several() -> Iterator[Row]:
    """MiniGPT with 25 million parameters, 8 texts of 48 words per step."""
    with tempfile.TemporaryDirectory() as folder:
        project = _project(Path(folder) / "project")
        times: dict[str, list[float]] = {name: [] for name in RUNS}
        for _ in range(ROUNDS):
            for name, flags in RUNS.items():
                times[name].append(_step(project, flags))
    one, *others = (median(seconds) for seconds in times.values())
    for (name, *_), other in zip(list(RUNS.items())[1:], others, strict=True):
        goal = "at least 0.9 ×" if name == "two processes" else "at least 0.5 ×"
        ratio = one / other
        yield Row(
            f"LoRA step, {name}",
            other,
            f"one process, {one * 1e3:.0f} ms",
            ratio,
            goal,
            ratio >= float(goal[9:12]),
        )


def _project(root: Path) -> Path:
    _lora(root.parent, "new", str(root))
    chance = random.Random(0)
    words = (root / "data/pretrain.de.txt").read_text(encoding="utf-8").split()
    lines = [" ".join(chance.choices(words, k=WORDS)) for _ in range(STEPS * BATCH)]
    (root / "data/long.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    _lora(root, "pretrain", *(f"--set=pretrain.{key}={value}" for key, value in SHAPE.items()))
    _lora(root, "expand-vocab")
    return root


def _step(project: Path, flags: list[str]) -> float:
    """Median seconds between steps, without the first two."""
    values = {"data": "data/long.txt", "epochs": 1, "batch_size": BATCH, "window": 0}
    given = [f"--set=finetune_lora.{key}={value}" for key, value in values.items()]
    _lora(project, "finetune", "lora", "--force", *flags, *given)
    with (project / "runs/finetune_lora/telemetry.csv").open(encoding="utf-8") as file:
        seconds = [float(row["seconds"]) for row in csv.DictReader(file)]
    return median(later - earlier for earlier, later in pairwise(seconds[2:]))


def _lora(folder: Path, *arguments: str) -> None:
    variables = {**os.environ, "LORA_CACHE": str(folder / "cache")}
    subprocess.run([LORA, *arguments], cwd=folder, env=variables, check=True, capture_output=True)
