"""What a 4-bit merge keeps of a small task: `python -m bench.into OUT` trains and merges, for three
seeds.

The base is LORA_BENCH_BASE, an imported checkpoint of SmolLM2-135M-Instruct, or
`smollm2/artifacts/base`. The table of docs/how-to/merge.md is what it prints. On one thread it
takes an hour.
"""

import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench.real import BASE as DEFAULT
from bench.recipe_tasks import TASKS, lines
from lora_workbench import api
from pipeline.export.into import Kind
from pipeline.files.artifact import read_json

BASE = Path(os.environ.get("LORA_BENCH_BASE", DEFAULT)).resolve()
SEEDS = (0, 1, 2)
KINDS: tuple[Kind, ...] = ("q4_k_m", "nf4")
# times in words → digits: the base hardly knows it, and a few hundred rows teach it
TASK = replace(next(task for task in TASKS if task.name == "times"), rows=600, held_out=128)
SETTINGS = {
    "finetune_lora.epochs": 3,
    "finetune_lora.learning_rate": 1e-3,
    "finetune_lora.rank": 8,
    "finetune_lora.retention_weight": 0.0,
    "finetune_lora.retention_data": "",
}


def adapter(out: Path, seed: int) -> Path:
    """An adapter trained on the task."""
    files = [out / "train.jsonl", out / "held_out.jsonl"]
    for file, rows in zip(files, TASK.split(), strict=True):
        file.write_text("\n".join(lines(rows)) + "\n")
    settings = {**SETTINGS, "finetune_lora.seed": seed}
    project = api.train(
        BASE, files[0], out / f"seed-{seed}", eval_data=files[1], set=settings, on_event=api.show
    )
    return project.artifact("finetune_lora")


def merged(folder: Path, out: Path, kind: Kind, data: Path) -> dict[str, Any]:
    """The certificate of a merge with GPTQ, in which the nearest codes are measured too."""
    if not out.exists():
        api.merge(folder, out, base=BASE, into=kind, rounding="gptq", data=data)
    entry: dict[str, Any] = read_json(out / "certificate.json", "Merge again")["into"]
    return entry


def table(out: Path) -> Iterator[str]:
    """Markdown, a row of each model, with a number of each seed."""
    data = out / "held_out.jsonl"
    adapters = {seed: adapter(out, seed) for seed in SEEDS}
    yield "| | KL to base + adapter | loss | of what was learned |"
    yield "|---|---|---|---|"
    for kind in KINDS:
        entries = [
            merged(folder, out / f"{kind}-{seed}", kind, data) for seed, folder in adapters.items()
        ]
        for models in zip(*(entry["models"] for entry in entries), strict=True):
            cells = (
                f"{kind}, {models[0]['model']}",
                ", ".join(f"{model['divergence']:.3f}" for model in models),
                ", ".join(f"{model['loss']:.3f}" for model in models),
                ", ".join(f"{model['kept']:.1%}" for model in models),
            )
            yield f"| {' | '.join(cells)} |"
    losses = [f"{entry['base_loss']:.2f} → {entry['tuned_loss']:.3f}" for entry in entries]
    yield f"| trained | | {', '.join(losses)} | |"


if __name__ == "__main__":
    torch.set_num_threads(1)
    target = Path(sys.argv[1])
    target.mkdir(parents=True, exist_ok=True)
    for line in table(target):
        print(line, flush=True)
