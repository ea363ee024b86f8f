"""Trains the tasks of `python -m bench recipe` in many settings, and appends what came out to a
file.

`python -m bench.recipe_runs` goes on where it was stopped. The base is LORA_BENCH_BASE, an imported
checkpoint of SmolLM2-135M-Instruct, or `smollm2/artifacts/base`.
"""

import csv
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from time import process_time
from typing import Any

import torch
from msgspec import structs

from bench.real import BASE
from bench.recipe import RUNS, read_runs
from bench.recipe_settings import MANY, Setting, plan
from bench.recipe_tasks import RecipeTask, answer_of, lines
from pipeline.data.answers.match import match
from pipeline.data.answers.questions import prompt_and_answer
from pipeline.data.examples import Example
from pipeline.data.formats import read_examples
from pipeline.inference.completions import complete_all
from pipeline.inference.engine import LoadedModel, continued, load
from pipeline.inference.score import EvalScores, agreement, score
from pipeline.project.params.load import parse
from pipeline.project.runner import Job, run
from pipeline.project.stage_graph import Project
from pipeline.stages.finetune import prepare
from pipeline.stages.registry import GRAPH
from pipeline.training.loop import Diverged, steps
from pipeline.training.retention import COMPLETION
from pipeline.training.task import build_optimizer, prepare_model

DATA = Path(__file__).parents[1] / "data"
RETENTION, GENERAL = "retain.en.jsonl", "heldout.en.txt"
SPARE_TOKENS = 4  # beyond the longest expected answer
COLUMNS = (
    *("task", "rows", *(Setting._fields), "seed", "epoch"),
    *(
        "right",
        "loss_first",
        "loss_second",
        "kept",
        "rise",
        "train_seconds",
        "score_seconds",
        "tokens",
        "scores",
    ),
)


@dataclass(frozen=True)
class Workplace:
    """A project that is trained again and again, in a temporary folder, with its files."""

    project: Project

    @classmethod
    def make(cls, folder: Path, base: Path) -> "Workplace":
        params = f"base: {json.dumps(str(base.resolve()))}\nfinetune_lora: {{}}\n"
        path = folder / "params.yaml"
        path.write_text(params)
        project = Project.of(path, parse(params, path, GRAPH.sections), GRAPH)
        for _ in run(project, GRAPH.stages["import"]):
            pass
        workplace = cls(project)
        workplace._write_retention()
        return workplace

    def _write_retention(self) -> None:
        """The retention texts, with the prompts completed once as training does for every run."""
        texts = list[str]()
        for example in read_examples(DATA / RETENTION, RETENTION, prompts=True):
            rest = (
                continued(self.base, example.text, COMPLETION)
                if example.prompt == example.text
                else ""
            )
            texts.append(json.dumps({"text": example.text + rest}))
        (self.project.root / RETENTION).write_text("\n".join(texts) + "\n")

    @cached_property
    def base(self) -> LoadedModel:
        return load(self.project.artifact("import"))

    @cached_property
    def general(self) -> list[Example]:
        return read_examples(DATA / GENERAL, GENERAL)

    @cached_property
    def before(self) -> EvalScores:
        return score(self.base, self.general)

    def write(self, task: RecipeTask) -> tuple[str, list[Example]]:
        """The name of the file to train on, and the held-out examples."""
        names = [f"{task.name}.jsonl", f"{task.name}.held_out.jsonl"]
        for name, rows in zip(names, task.split(), strict=True):
            (self.project.root / name).write_text("\n".join(lines(rows)) + "\n")
        return names[0], read_examples(self.project.root / names[1], names[1])

    def job(self, data: str, setting: Setting, rows: int, seed: int) -> Job:
        """Training as `lora train` sets it up."""
        values = {**setting.params(rows), "data": data, "seed": seed}
        if setting.retention_weight:
            values["retention_data"] = RETENTION
        settings = structs.replace(self.project.params.finetune_lora, **values)
        params = self.project.params.replaced({"finetune_lora": settings})
        run_folder = self.project.root / "run"
        run_folder.mkdir(exist_ok=True)
        project = Project.of(self.project.root / "params.yaml", params, GRAPH)
        return Job(
            project, GRAPH.stages["finetune_lora"], self.project.root / "out", run_folder, "", None
        )


def measure(
    workplace: Workplace, loaded: LoadedModel, task: RecipeTask, held_out: Sequence[Example]
) -> dict[str, Any]:
    """What a model answers to the held-out rows, its losses on each half of them, and what it
    kept.
    """
    asked = [pair for example in held_out if (pair := prompt_and_answer(example, loaded.tokenizer))]
    longest = max(len(loaded.tokenizer.encode_following(answer)) for _, answer in asked)
    answers = complete_all(loaded, [prompt for prompt, _ in asked], longest + SPARE_TOKENS)
    expected = [answer_of(row) for row in task.split()[1]]
    matches = [match(answer, wanted) for answer, wanted in zip(answers, expected, strict=True)]
    scores = [each.as_expected if each.rouge_l is None else each.rouge_l for each in matches]
    middle = len(held_out) // 2
    general = score(loaded, workplace.general)
    return {
        "right": f"{sum(scores) / len(scores):.4f}",
        "loss_first": f"{score(loaded, held_out[:middle]).loss:.4f}",
        "loss_second": f"{score(loaded, held_out[middle:]).loss:.4f}",
        "kept": f"{agreement(general.choices, workplace.before.choices):.4f}",
        "rise": f"{general.loss - workplace.before.loss:.4f}",
        "scores": " ".join(f"{100 * each:.0f}" for each in scores),
        "answer": answers[0],
    }


def train(
    workplace: Workplace, task: RecipeTask, setting: Setting, seed: int
) -> Iterator[dict[str, Any]]:
    """A record per epoch."""
    data, held_out = workplace.write(task)
    started = process_time()
    preparing = prepare(workplace.job(data, setting, task.rows, seed))
    while True:
        try:
            next(preparing)
        except StopIteration as stop:
            setup = stop.value
            break
    lora, model = setup.task, setup.base.model
    prepare_model(model, lora.settings.gradient_checkpointing)
    optimizer = build_optimizer(model, lora.settings)
    loaded = LoadedModel("recipe", model, setup.base.tokenizer, workplace.base.base)
    model.train()
    seconds, tokens = process_time() - started, 0
    started = process_time()
    for number, record in enumerate(steps(lora, optimizer), 1):
        tokens = record[0].tokens
        epoch, rest = divmod(number, len(lora.batches))
        # one of few rows never ends there
        if rest or (epoch == 1 < setting.epochs and task.rows < MANY):
            continue
        seconds += process_time() - started
        started = process_time()
        model.eval()
        measured = measure(workplace, loaded, task, held_out)
        model.train()
        times = {
            "train_seconds": f"{seconds:.1f}",
            "score_seconds": f"{process_time() - started:.1f}",
        }
        yield {"epoch": epoch, "tokens": tokens, **times, **measured}
        started = process_time()


class Runs:
    """The file of what was measured: a row per task, setting, seed and epoch."""

    def __init__(self, path: Path) -> None:
        self.path = path
        measured = read_runs(path) if path.exists() else []
        self.done = {(each.task, each.setting, each.seed) for each in measured if each.is_last}

    def append(
        self, task: RecipeTask, setting: Setting, seed: int, record: Mapping[str, Any]
    ) -> None:
        row = {"task": task.name, "rows": task.rows, **setting._asdict(), "seed": seed, **record}
        is_new = not self.path.exists()
        # opened each time: what was measured is kept if this is killed
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
            if is_new:
                writer.writeheader()
            writer.writerow(row)
        if record["epoch"] == setting.epochs:
            self.done.add((task.name, setting, seed))
        sys.stdout.write("  ".join(f"{key} {value}" for key, value in row.items()) + "\n")
        sys.stdout.flush()


UNTRAINED = Setting(0.0, 0, 0, "none", 0, 0.0, 0)


def main(names: Sequence[str]) -> None:
    """Train what was not trained yet; only the tasks `names`, if there are any."""
    torch.set_num_threads(1)
    base, runs = Path(os.environ.get("LORA_BENCH_BASE", BASE)), Runs(RUNS)
    with TemporaryDirectory() as folder:
        workplace = Workplace.make(Path(folder), base)
        for task, setting, seed in plan():
            if (task.name, setting, seed) in runs.done or (names and task.name not in names):
                continue
            if (task.name, UNTRAINED, 0) not in runs.done:
                _, held_out = workplace.write(task)
                runs.append(
                    task,
                    UNTRAINED,
                    0,
                    {"epoch": 0, **measure(workplace, workplace.base, task, held_out)},
                )
            try:
                for record in train(workplace, task, setting, seed):
                    runs.append(task, setting, seed, record)
            except Diverged:
                runs.append(task, setting, seed, {"epoch": setting.epochs, "right": 0, "kept": 0})


if __name__ == "__main__":
    main(sys.argv[1:])
