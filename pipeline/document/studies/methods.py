"""study_methods: every method on the same data, what it takes, what it learns, what it forgets (§7, §9.3)."""

import csv
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.calc.report import answer
from pipeline.calc.settings import parse_method, parse_training_config
from pipeline.calc.sources.open_model import built_in
from pipeline.document.params import StudyMethods
from pipeline.document.studies.shared.method_runs import METHODS
from pipeline.document.studies.shared.report import Figure, Findings, write_report
from pipeline.document.studies.shared.retention_score import FORMATS, IN_WORDS, retention_scorer, spreads
from pipeline.document.studies.shared.runner import delete_runs, run_stage
from pipeline.document.tables import Row, Spread, Table, mean, min_max, shown, times
from pipeline.files.artifact import read_manifest
from pipeline.inference import engine
from pipeline.inference.engine import LoadedModel
from pipeline.project.logs.run_log import TELEMETRY
from pipeline.project.palette import COLORS
from pipeline.project.runner import Event, Facts, Job
from pipeline.stages.evaluate import weight_bytes

LARGE = "qwen3-8b"
COST = {"share": ".1%", "predicted_kB": ".0f", "measured_kB": ".0f", "stored_kB": ".0f"}
NEVER_THE_BASE = "training from scratch"
MOST = 7  # of 8 sentences


def methods(job: Job) -> Generator[Event, None, Facts]:
    """Every method trained with each seed, by its own stage's code → two tables, one of times beside the run."""
    settings = job.project.params.of(StudyMethods)
    measures = retention_scorer(job, settings.old_data, settings.new_data, settings.prompt_words)
    base = job.artifact("expand_vocab")
    runs = {
        name: [method.run(name, job.project.params, seed) for seed in settings.seeds]
        for name, method in METHODS.items()
    }
    folders = yield from run_stage(job, [run for of in runs.values() for run in of], resume=False)
    by_method = {name: [folders[run.name] for run in of] for name, of in runs.items()}
    learned = {name: [measures.measure(_loaded(folder, base)) for folder in of] for name, of in by_method.items()}
    knowledge = Table(
        "knowledge", "Learned and forgotten", [{"method": n, **spreads(of)} for n, of in learned.items()], FORMATS
    )
    cost = Table(
        "cost", "What trains, what it takes, what is stored", [_cost(n, of[0]) for n, of in by_method.items()], COST
    )
    _time(by_method).write(job.run)
    delete_runs(job)
    found = Findings("Methods side by side", "§7, §9.3", _text(cost, knowledge), (cost, knowledge, _large()))
    return write_report(job, found, lambda figure: _draw(figure, knowledge), (9, 4.5))


def _cost(name: str, folder: Path) -> Row:
    """Parameters and bytes: they are the same with every seed."""
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


def _loaded(folder: Path, base: Path) -> LoadedModel:
    return engine.load(base, folder) if read_manifest(folder)["kind"] == "adapter" else engine.load(folder)


def _telemetry(folder: Path) -> dict[str, str]:
    """The last line of a run's telemetry: what was predicted and measured of its largest step, and its seconds."""
    with (folder.parent / TELEMETRY).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))[-1]


def _time(by_method: Mapping[str, Sequence[Path]]) -> Table:
    """Seconds of each method's loop: of the machine that it ran on, and so not a part of what the study finds."""
    rows: list[Row] = []
    for name, of in by_method.items():
        last = [_telemetry(folder) for folder in of]
        steps, seconds = [int(one["step"]) for one in last], [float(one["seconds"]) for one in last]
        least = min(taken / number for taken, number in zip(seconds, steps, strict=True))
        rows.append(
            {"method": name, "steps": Spread.of(steps), "seconds": Spread.of(seconds), "ms_a_step": 1000 * least}
        )
    return times(rows)


def _large() -> Table:
    """What the calculator says of a real model: shares, and bytes at the peak of a step of 2,048 tokens."""
    model = built_in(LARGE).shapes
    asked: dict[str, tuple[str, int, dict[str, Any]]] = {
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
    for name, (kind, rank, more) in asked.items():
        run = parse_training_config(model, kind, virtual_tokens=more.get("virtual_tokens", 0))
        said = answer(model, parse_method(kind, rank, None, "attention", **more), run)
        rows.append(
            {
                "method": name,
                "trained": said["parameters"]["trainable"],
                "share": said["parameters"]["trainable"] / said["parameters"]["total"],
                "peak_GB": said["memory"]["peak"] / 1e9,
            }
        )
    return Table(LARGE.replace("-", "_"), "Qwen3-8B, by the calculator", rows, {"share": ".4%", "peak_GB": ".1f"})


def _text(cost: Table, knowledge: Table) -> str:
    learned = [row for row in knowledge.rows if row["method"] != NEVER_THE_BASE and mean(row["new_done"]) > MOST]
    least = min(learned, key=lambda row: mean(row["old_rise"]), default=None)
    both = [(row["measured_kB"], row["predicted_kB"]) for row in cost.rows]
    off = max(abs(m / p - 1) for m, p in both if isinstance(m, float) and isinstance(p, float))
    shares = ", ".join(f"{row['method']} {shown(row['share'], '.1%')}" for row in cost.rows)
    return "\n\n".join(
        [
            IN_WORDS
            + " *Predicted* and *measured* are bytes of tensors at the peak of the largest step; *several tasks*: "
            "whether what is stored is put on one unchanged base, so that tasks can be swapped.",
            f"Of MiniGPT there trains: {shares}. The prediction of memory is within {off:.1%} of what was measured.",
            "None of the methods that begin with the base learns nearly all new sentences."
            if least is None
            else f"Of the methods that begin with the base and learn nearly all new sentences, {least['method']} "
            f"forgets least: the loss on the old ones rises by {shown(least['old_rise'], '.2f')} nats.",
            "How long each takes stands in the run's folder: it differs from run to run.",
        ]
    )


def _draw(figure: Figure, knowledge: Table) -> None:
    """What is learned against what is forgotten: the best is below on the left."""
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
            color=COLORS[method.look],
            marker="osD^vPX*d<s>p"[number],
            linestyle="",
            label=str(row["method"]),
        )
    axis.set(xlabel="old loss rises by (nats a token)", ylabel="new loss (nats a token)", yscale="log")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
