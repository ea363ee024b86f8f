"""The tables of an evaluation, for its report, `lora report` and the Results screen."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.files.artifact import read_manifest
from pipeline.inference.catalog import measured_of
from pipeline.project.stage_graph import Project, Stage

COLUMNS = (  # of the comparison, in two lines each; sizes follow, with their unit
    "trained\nparams",
    "share\nof all",
    "answers\nas data",
    "new\nloss",
    "new\ncompleted",
    "old\nloss",
    "old loss\nchange",
    "KL from\nbase",
    "answers\nkept",
    "prefers\nchosen",
)
LEGEND = (  # a heading, and the line that explains it
    (
        "answers\nas data",
        "answers as data: sample answers that are as expected; of long texts their ROUGE-L.",
    ),
    (
        "new\nloss",
        "new: the sentences trained on, or held out from training. loss: nats per token.",
    ),
    ("new\ncompleted", "completed: new sentences finished word for word."),
    ("old\nloss", "old: texts that were not trained on now. change: against the base."),
    ("KL from\nbase", "KL: of the next-token predictions, on old sentences."),
    ("answers\nkept", "answers kept: old next-token first choices that are still the base's."),
    (
        "prefers\nchosen",
        "prefers chosen: held-out pairs whose chosen answer is likelier per token, before → after.",
    ),
    ("", "size: weights to store; an adapter's beside one copy of its base."),
)
MISSING = "–"
TASK_COLUMNS = ("task", "model", "score", "95% interval", "change", "its interval", "n")
TASKS = (
    "score: mean over the n examples, from 0 to 1. change: from the base's, example\nby example. "
    "Intervals: bootstrap."
)
UNITS = ((10**9, "GB"), (10**6, "MB"), (1000, "kB"))


def stages_by_variant(project: Project) -> dict[str, Stage]:
    """The stage that made each of the project's variants, with its title and look."""
    return {
        name: project.readable[adapter or base]
        for name, (base, adapter) in project.variants.items()
    }


def beside(project: Project, metrics: Mapping[str, Any]) -> dict[Stage, dict[str, Any]]:
    """Trained models that an evaluation's `metrics` lack, with what else is known of them.

    They were made since, or are adapters without a section in the params file, made with `--set`.
    The numbers are those of their training, or of another evaluation.
    """
    models: dict[Stage, dict[str, Any]] = {}
    for stage in project.graph.product.values():
        read = stage.name in project.readable or stage.kind == "adapter"
        if stage.look and stage.variant and stage.variant not in metrics and read:
            folder = project.artifact(stage.name)
            # not made yet, or of another version
            with suppress(UserError, KeyError, TypeError, ZeroDivisionError):
                models[stage] = {**cost(folder, True), **measured_of(folder)}
    return models


def cost(folder: Path, trained: bool) -> dict[str, Any]:
    """An artifact's parameters and preferences by its manifest, and the size of its weights.

    `trained`: whether a method made it, so that its trained parameters count. Raises UserError.
    """
    manifest = read_manifest(folder)
    parameters = manifest["parameters"]
    numbers: dict[str, Any] = {"parameters": parameters["total"], "bytes": weight_bytes(folder)}
    if trained:
        numbers |= {
            "trainable": parameters["trainable"],
            "trainable_percent": 100 * parameters["trainable"] / parameters["total"],
        }
    if "preferences" in manifest:
        numbers["preferences"] = manifest["preferences"]
    return numbers


def weight_bytes(folder: Path) -> int:
    """The size in bytes of an artifact's weights."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def by_variant(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Each variant's numbers: metrics.json without its `gate`."""
    return {name: numbers for name, numbers in metrics.items() if name != "gate"}


def task_scores(metrics: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings and a row of texts for each task and variant, for report and terminal."""
    scored_by = {variant: numbers.get("tasks", {}) for variant, numbers in metrics.items()}
    tasks = dict.fromkeys(task for scored in scored_by.values() for task in scored)
    rows = []
    for task in tasks:
        for variant, scored in scored_by.items():
            if task not in scored:
                continue
            scores = scored[task]
            change, its_interval = MISSING, ""
            if difference := scores.get("difference"):
                change, its_interval = f"{difference['score']:+.3f}", _interval(difference, "+")
            mean, n = f"{scores['score']:.3f}", f"{scores['n']:,}"
            rows.append([task, variant, mean, _interval(scores), change, its_interval, n])
    return list(TASK_COLUMNS), rows


def _interval(numbers: Mapping[str, Any], sign: str = "") -> str:
    return f"{numbers['low']:{sign}.3f} to {numbers['high']:{sign}.3f}"


def comparison(metrics: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings and a row of texts for each variant: what it learned and what it forgot.

    A column without a number is left out.
    """
    largest = max((numbers["bytes"] for numbers in metrics.values()), default=0)
    unit, name = next((pair for pair in UNITS if largest >= 10 * pair[0]), UNITS[-1])
    size = f"size\n({name})"
    cells = {
        variant: {"model": variant, **_cells(numbers), size: f"{numbers['bytes'] / unit:,.0f}"}
        for variant, numbers in metrics.items()
    }
    measured = {column for row in cells.values() for column in row}
    shown = [column for column in ("model", *COLUMNS, size) if column in measured]
    rows = []
    for row in cells.values():
        rows.append([row.get(column, MISSING) for column in shown])
    return shown, rows


def legend(columns: Sequence[str]) -> str:
    """What the columns of `comparison` mean, a line each."""
    return "\n".join(line for heading, line in LEGEND if not heading or heading in columns)


def certified(metrics: Mapping[str, Any]) -> list[str]:
    """A line for each variant that has another's numbers, by the certificate of its merge."""
    return [
        f"{name}: the numbers of {numbers['measured_as']}, by the certificate of the merge."
        for name, numbers in metrics.items()
        if "measured_as" in numbers
    ]


def _cells(numbers: Mapping[str, Any]) -> dict[str, str]:
    """Heading of COLUMNS → what was measured, as text."""
    cells = {}
    if trained := numbers.get("trainable"):
        # a terminal has no room for more digits, which metrics.json has
        shown = f"{trained:,}" if trained < 1_000_000 else f"{trained / 1e6:,.1f}M"
        cells["trained\nparams"] = shown
        cells["share\nof all"] = f"{numbers['trainable_percent']:.1f}%"

    answers = numbers.get("answers", {})
    if answers.get("n"):
        cells["answers\nas data"] = f"{answers['as_expected']}/{answers['n']}"
    elif similar := answers.get("similar"):
        cells["answers\nas data"] = f"{similar['rouge_l']:.2f}"

    if "new_loss" in numbers:
        cells["new\nloss"] = f"{numbers['new_loss']:.3f}"
    if "new_completed" in numbers:
        cells["new\ncompleted"] = f"{numbers['new_completed']}/{numbers['new_sentences']}"

    if forgetting := numbers.get("forgetting"):
        cells["old\nloss"] = f"{numbers['old_loss']:.3f}"
        cells["old loss\nchange"] = f"{forgetting['loss_rise']:+.3f}"
        cells["KL from\nbase"] = f"{forgetting['divergence']:.3f}"
        cells["answers\nkept"] = f"{forgetting['answers_kept']:.0%}"

    if preferences := numbers.get("preferences"):
        before, after = (preferences[when]["accuracy"] for when in ("before", "after"))
        cells["prefers\nchosen"] = f"{before:.0%} → {after:.0%}"
    return cells
