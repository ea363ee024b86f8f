"""study_methods: cost, learning and forgetting of every method on the same data (§7, §9.3)."""

import csv
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.calc.method import configure
from pipeline.calc.open_model import built_in
from pipeline.calc.report import answer
from pipeline.document.params import StudyMethods
from pipeline.document.studies.shared.method_runs import METHODS
from pipeline.document.studies.shared.report import Figure, Findings, write_report
from pipeline.document.studies.shared.retention_score import COLUMNS_EXPLAINED, FORMATS, retention_scorer, spreads
from pipeline.document.studies.shared.runner import delete_runs, run_stage
from pipeline.document.tables import Row, Spread, Table, mean, min_max, shown, times
from pipeline.files.artifact import read_manifest
from pipeline.inference import engine
from pipeline.inference.engine import LoadedModel
from pipeline.project.logs.run_log import TELEMETRY
from pipeline.project.runner import Event, Facts, Job
from pipeline.stages.evaluate import weight_bytes
from pipeline.stages.registry import COLORS, COUNTED

LARGE = "qwen3-8b"
COST = {"share": ".1%", "predicted_kB": ".0f", "measured_kB": ".0f", "stored_kB": ".0f"}
FROM_SCRATCH = "training from scratch"
NEARLY_ALL = 7  # of 8 sentences


def run(job: Job) -> Generator[Event, None, Facts]:
    """Train every method with each seed → three tables, a picture, and a table of times in the run's folder."""
    settings = job.project.params.of(StudyMethods)
    scorer = retention_scorer(job, settings.old_data, settings.new_data, settings.prompt_words)
    base = job.artifact("expand_vocab")
    runs = {
        name: [method.run(name, job.project.params, seed) for seed in settings.seeds]
        for name, method in METHODS.items()
    }
    folders = yield from run_stage(job, [run for by_seed in runs.values() for run in by_seed], resume=False)
    by_method = {name: [folders[run.name] for run in by_seed] for name, by_seed in runs.items()}
    scores = {name: [scorer.measure(_load(folder, base)) for folder in made] for name, made in by_method.items()}
    knowledge = Table(
        "knowledge",
        "Learned and forgotten",
        [{"method": n, **spreads(by_seed)} for n, by_seed in scores.items()],
        FORMATS,
    )
    cost = Table(
        "cost", "Trainable parameters, memory and storage", [_cost(n, made[0]) for n, made in by_method.items()], COST
    )
    _time(by_method).write(job.run)
    delete_runs(job)
    findings = Findings("Methods side by side", "§7, §9.3", _text(cost, knowledge), (cost, knowledge, _large()))
    return write_report(job, findings, lambda figure: _draw(figure, knowledge), (9, 4.5))


def _cost(name: str, folder: Path) -> Row:
    """Parameters and bytes of a method; they do not depend on the seed."""
    manifest, telemetry = read_manifest(folder), _telemetry(folder)
    parameters = manifest["parameters"]
    return {
        "method": name,
        "trained": parameters["trainable"],
        "share": parameters["trainable"] / parameters["total"],
        "predicted_kB": int(telemetry["predicted_tensor_bytes"]) / 1000 or None,
        "measured_kB": int(telemetry["measured_tensor_bytes"]) / 1000,
        "stored_kB": weight_bytes(folder) / 1000,
        "several_tasks": manifest["kind"] == "adapter",
    }


def _load(folder: Path, base: Path) -> LoadedModel:
    return engine.load(base, folder) if read_manifest(folder)["kind"] == "adapter" else engine.load(folder)


def _telemetry(folder: Path) -> dict[str, str]:
    """The last line of a run's telemetry: predicted and measured bytes of the largest step, and seconds."""
    with (folder.parent / TELEMETRY).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))[-1]


def _time(by_method: Mapping[str, Sequence[Path]]) -> Table:
    """The seconds of each method's training loop. They depend on the machine, so they are not in the artifact."""
    rows: list[Row] = []
    for name, folders in by_method.items():
        last = [_telemetry(folder) for folder in folders]
        steps, seconds = [int(line["step"]) for line in last], [float(line["seconds"]) for line in last]
        fastest = min(time / count for time, count in zip(seconds, steps, strict=True))
        rows.append(
            {"method": name, "steps": Spread.of(steps), "seconds": Spread.of(seconds), "ms_a_step": 1000 * fastest}
        )
    return times(rows)


def _large() -> Table:
    """The calculator's numbers for a real model: shares, and peak memory of a step of 2,048 tokens."""
    model = built_in(LARGE).shapes
    settings: dict[str, tuple[str, int, dict[str, Any]]] = {
        "full fine-tuning": ("full", 8, {}),
        "layer freezing, 1 of 36 blocks": ("freeze", 8, {"last_blocks": 1, "train_embeddings": False}),
        "layer freezing, 18 of 36 blocks": ("freeze", 8, {"last_blocks": 18, "train_embeddings": False}),
        "LoRA, r = 8": ("lora", 8, {}),
        "LoRA, r = 64": ("lora", 64, {}),
        "QLoRA, r = 8": ("qlora", 8, {}),
        "prefix tuning, 20 tokens": ("prefix", 8, {"virtual_tokens": 20}),
        "prompt tuning, 20 tokens": ("prompt", 8, {"virtual_tokens": 20}),
    }
    rows: list[Row] = []
    for name, (kind, rank, options) in settings.items():
        _, finetuning, run = configure(model, COUNTED, kind, rank=rank, **options)
        numbers = answer(model, finetuning, run)
        rows.append(
            {
                "method": name,
                "trained": numbers["parameters"]["trainable"],
                "share": numbers["parameters"]["trainable"] / numbers["parameters"]["total"],
                "peak_GB": numbers["memory"]["peak"] / 1e9,
            }
        )
    return Table(LARGE.replace("-", "_"), "Qwen3-8B, by the calculator", rows, {"share": ".4%", "peak_GB": ".1f"})


def _text(cost: Table, knowledge: Table) -> str:
    learned = [row for row in knowledge.rows if row["method"] != FROM_SCRATCH and mean(row["new_done"]) > NEARLY_ALL]
    least = min(learned, key=lambda row: mean(row["old_rise"]), default=None)
    both = [(row["measured_kB"], row["predicted_kB"]) for row in cost.rows]
    off = max(abs(m / p - 1) for m, p in both if isinstance(m, float) and isinstance(p, float))
    shares = ", ".join(f"{row['method']} {shown(row['share'], '.1%')}" for row in cost.rows)
    return "\n\n".join(
        [
            COLUMNS_EXPLAINED
            + " *Predicted* and *measured*: bytes of tensors at the peak of the largest step. *Several tasks*: whether "
            "the method stores an adapter, so that tasks can be swapped on one unchanged base.",
            f"Trainable share of MiniGPT: {shares}. The memory prediction is within {off:.1%} of the measurement.",
            "None of the methods that start from the base learns nearly all new sentences."
            if least is None
            else f"Among the methods that start from the base and learn nearly all new sentences, {least['method']} "
            f"forgets least: the loss on the old sentences rises by {shown(least['old_rise'], '.2f')} nats.",
            "Training times are in the run's folder, because they differ from run to run.",
        ]
    )


def _draw(figure: Figure, knowledge: Table) -> None:
    """Learning against forgetting; the best method is at the bottom left."""
    axis = figure.subplots()
    for number, row in enumerate(knowledge.rows):
        method = METHODS[str(row["method"])]
        x, y = row["old_rise"], row["new_loss"]
        assert isinstance(x, Spread) and isinstance(y, Spread)
        axis.errorbar(
            x.mean,
            y.mean,
            xerr=min_max([x]),
            yerr=min_max([y]),
            color=COLORS[method.color],
            marker="osD^vPX*d<s>p"[number],
            linestyle="",
            label=str(row["method"]),
        )
    axis.set(xlabel="old loss rises by (nats per token)", ylabel="new loss (nats per token)", yscale="log")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
