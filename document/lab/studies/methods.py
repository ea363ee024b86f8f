"""study_methods: cost, learning and forgetting of every method on the same data (§7, §9.3)."""

from collections.abc import Generator, Sequence
from typing import Annotated, Any

from lab.measures import COLUMNS_EXPLAINED, FORMATS, Knowledge, RetentionScorer
from lab.report import COLORS, Figure, Findings, legend_beside, min_max
from lab.runner import METHODS, Trained, train
from lab.studies import study_stage
from lab.tables import Row, Spread, Table, shown, spreads, times
from pipeline.files.artifact import read_manifest
from pipeline.project.logs.run_log import Telemetry, last_telemetry
from pipeline.project.params.schema import Count, Section, Seed
from pipeline.project.runner import Event, Job

PLACE = "§7, §9.3"
TRAINED = (
    "train_from_scratch",
    "finetune_full",
    "finetune_freeze",
    "finetune_lora",
    "finetune_prefix",
    "finetune_prompt",
)
FROM_SCRATCH = "training from scratch"
NEARLY_ALL = 7  # of 8 sentences
LARGE = "qwen3-8b"
# method, rank, options of the calculator
LARGE_METHODS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "full fine-tuning": ("full", 8, {}),
    "layer freezing, 1 of 36 blocks": ("freeze", 8, {"last_blocks": 1, "train_embeddings": False}),
    "layer freezing, 18 of 36 blocks": (
        "freeze",
        8,
        {"last_blocks": 18, "train_embeddings": False},
    ),
    "LoRA, r = 8": ("lora", 8, {}),
    "LoRA, r = 64": ("lora", 64, {}),
    "QLoRA, r = 8": ("qlora", 8, {}),
    "prefix tuning, 20 tokens": ("prefix", 8, {"virtual_tokens": 20}),
    "prompt tuning, 20 tokens": ("prompt", 8, {"virtual_tokens": 20}),
}


class StudyMethods(Section, frozen=True, kw_only=True):
    """§7 and §9.3: every method on the same data, each with its own stage's settings."""

    old_data: Annotated[str, "sentences of the base, on which forgetting is measured"] = (
        "data/pretrain.de.txt"
    )
    new_data: Annotated[str, "the sentences trained on"] = "data/finetune.de.txt"
    prompt_words: Annotated[Count, "words of a new sentence given as its prompt"] = 2
    seeds: Annotated[tuple[Seed, ...], "each is a run of its own"] = (0, 1)


STAGE = study_stage(
    __name__,
    PLACE,
    title="Methods side by side",
    about="every method on the same data: share, memory, time, learned, forgotten",
    settings=StudyMethods,
    data=(
        "old_data",
        "new_data",
        *(f"{stage}.data" for stage in TRAINED),
        "finetune_lora.retention_data",
    ),
    extra_sections=TRAINED,
    quantizes=True,  # QLoRA is one of the methods
)


def measure(job: Job, settings: StudyMethods) -> Generator[Event, None, Findings]:
    """Train every method with each seed → three tables, and a table of times in the run's
    folder.
    """
    scorer = RetentionScorer.of(job, settings.old_data, settings.new_data, settings.prompt_words)
    base, params = job.artifact("expand_vocab"), job.project.params
    runs = {
        name: [way.run(name, params, seed) for seed in settings.seeds]
        for name, way in METHODS.items()
    }
    # From the beginning if it was killed: times are of all steps.
    made = yield from train(
        job, [run for by_seed in runs.values() for run in by_seed], resume=False
    )
    by_run = {one.run: one for one in made}
    by_method = {name: [by_run[run.name] for run in by_seed] for name, by_seed in runs.items()}
    knowledge = [
        {
            "method": name,
            **spreads(Knowledge._fields, [scorer.measure(one.load(base)) for one in by_seed]),
        }
        for name, by_seed in by_method.items()
    ]
    cost = [_cost(name, by_seed[0]) for name, by_seed in by_method.items()]
    times([time_of(name, by_seed) for name, by_seed in by_method.items()]).write(job.run)
    formats = {"share": ".1%", "predicted_kB": ".0f", "measured_kB": ".0f", "stored_kB": ".0f"}
    tables = (
        Table("cost", "Trainable parameters, memory and storage", cost, formats),
        Table("knowledge", "Learned and forgotten", knowledge, FORMATS),
        _large(),
    )
    return Findings(
        _text(cost, knowledge), tables, lambda figure: _draw(figure, knowledge), (9, 4.5)
    )


def _cost(name: str, made: Trained) -> Row:
    """Parameters and bytes of a method; they do not depend on the seed."""
    from pipeline.evaluation.comparison import weight_bytes

    manifest, telemetry = read_manifest(made.folder), _telemetry(made)
    trainable, total = manifest["parameters"]["trainable"], manifest["parameters"]["total"]
    return {
        "method": name,
        "trained": trainable,
        "share": trainable / total,
        "predicted_kB": telemetry.predicted / 1000 or None,
        "measured_kB": telemetry.measured / 1000,
        "stored_kB": weight_bytes(made.folder) / 1000,
        "several_tasks": manifest["kind"] == "adapter",
    }


def _telemetry(made: Trained) -> Telemetry:
    """Predicted and measured bytes of a run's largest step, and its seconds."""
    last = last_telemetry(made.folder.parent)
    assert last is not None, made.folder
    return last


def time_of(name: str, by_seed: Sequence[Trained]) -> Row:
    """The seconds of a method's training loop. They depend on the machine, so they are not in the
    artifact.
    """
    last = [_telemetry(made) for made in by_seed]
    steps, seconds = [line.step for line in last], [line.seconds for line in last]
    fastest = min(time / count for time, count in zip(seconds, steps, strict=True))
    return {
        "method": name,
        "steps": Spread.of(steps),
        "seconds": Spread.of(seconds),
        "ms_a_step": 1000 * fastest,
    }


def _large() -> Table:
    """The calculator's numbers for a real model: shares, and peak memory of a step of 2,048
    tokens.
    """
    from pipeline.calc.method import configure
    from pipeline.calc.report import answer
    from pipeline.calc.sources.open_model import built_in
    from pipeline.stages.registry import COUNTED

    model, rows = built_in(LARGE).shapes, list[Row]()
    for name, (kind, rank, options) in LARGE_METHODS.items():
        _, method, run = configure(model, COUNTED, kind, rank=rank, trainer="torch", **options)
        numbers = answer(model, method, run)
        trainable, total = numbers["parameters"]["trainable"], numbers["parameters"]["total"]
        peak = numbers["memory"]["peak"] / 1e9
        rows.append(
            {"method": name, "trained": trainable, "share": trainable / total, "peak_GB": peak}
        )
    return Table(
        LARGE.replace("-", "_"),
        "Qwen3-8B, by the calculator",
        rows,
        {"share": ".4%", "peak_GB": ".1f"},
    )


def _text(cost: Sequence[Row], knowledge: Sequence[Row]) -> str:
    learned = [
        row for row in knowledge if row["method"] != FROM_SCRATCH and row["new_done"] > NEARLY_ALL
    ]
    least = min(learned, key=lambda row: row["old_rise"], default=None)
    forgets_least = "None of the methods that start from the base learns nearly all new sentences."
    if least is not None:
        forgets_least = (
            "Among the methods that start from the base and learn nearly all new sentences, "
            f"{least['method']} forgets least: the loss on the old sentences rises by "
            f"{shown(least['old_rise'], '.2f')} nats."
        )
    off = max(
        abs(row["measured_kB"] / row["predicted_kB"] - 1) for row in cost if row["predicted_kB"]
    )
    shares = ", ".join(f"{row['method']} {shown(row['share'], '.1%')}" for row in cost)
    paragraphs = (
        f"{COLUMNS_EXPLAINED} *Predicted* and *measured*: bytes of tensors at the peak of the "
        "largest step. *Several tasks*: whether the method stores an adapter, so that tasks can be "
        "swapped on one unchanged base.",
        f"Trainable share of MiniGPT: {shares}. The memory prediction is within {off:.1%} of the "
        "measurement.",
        forgets_least,
        "Training times are in the run's folder, because they differ from run to run.",
    )
    return "\n\n".join(paragraphs)


def _draw(figure: Figure, knowledge: Sequence[Row]) -> None:
    """Learning against forgetting; the best method is at the bottom left."""
    axis = figure.subplots()
    for row, marker in zip(knowledge, "osD^vPX*d<s>p", strict=False):
        x, y = row["old_rise"], row["new_loss"]
        style = {"color": COLORS[METHODS[row["method"]].color], "marker": marker, "linestyle": ""}
        axis.errorbar(x, y, xerr=min_max([x]), yerr=min_max([y]), label=row["method"], **style)
    axis.set(
        xlabel="old loss rises by (nats per token)",
        ylabel="new loss (nats per token)",
        yscale="log",
    )
    axis.grid(alpha=0.3)
    legend_beside(axis)
