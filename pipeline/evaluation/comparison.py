"""What an evaluation measured, as the tables of its report, of `lora report` and of the Results
screen.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.files.artifact import read_manifest
from pipeline.inference.catalog import measured_of
from pipeline.project.stage_graph import Project, Stage

COLUMNS = (  # of the comparison, in two lines each; sizes follow, with their unit
    *(
        "trained\nparams",
        "share\nof all",
        "answers\nas data",
        "new\nloss",
        "new\ncompleted",
        "old\nloss",
    ),
    *("old loss\nchange", "KL from\nbase", "answers\nkept", "prefers\nchosen"),
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
    """Trained models that an evaluation's `metrics` lack: the numbers that training, or another
    evaluation, measured.

    They are those that were made since, and adapters without a section in the params file, which
    `--set` made.
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
    """What an artifact's manifest has of parameters and preferences, and the size of its weights on
    disk.

    `trained`: whether a method made it, which has trained parameters to count. Raises UserError.
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
    """Each variant's numbers: what metrics.json holds beside its `gate`."""
    return {name: numbers for name, numbers in metrics.items() if name != "gate"}


def task_scores(metrics: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings and a row of texts for each task and variant, for report and terminal; no rows
    without tasks.
    """
    rows = [
        [
            task,
            variant,
            f"{scores['score']:.3f}",
            _interval(scores),
            *_difference(scores),
            f"{scores['n']:,}",
        ]
        for task in dict.fromkeys(
            task for numbers in metrics.values() for task in numbers.get("tasks", {})
        )
        for variant, numbers in metrics.items()
        if task in numbers.get("tasks", {})
        for scores in (numbers["tasks"][task],)
    ]
    return list(TASK_COLUMNS), rows


def _difference(scores: Mapping[str, Any]) -> tuple[str, str]:
    difference = scores.get("difference")
    return (
        (f"{difference['score']:+.3f}", _interval(difference, "+")) if difference else (MISSING, "")
    )


def _interval(numbers: Mapping[str, Any], sign: str = "") -> str:
    return f"{numbers['low']:{sign}.3f} to {numbers['high']:{sign}.3f}"


def comparison(metrics: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings and a row of texts for each variant: what was learned, what was forgotten, for
    report and terminal.

    A column that was measured of no variant is left out.
    """
    largest = max((numbers["bytes"] for numbers in metrics.values()), default=0)
    unit, name = next((pair for pair in UNITS if largest >= 10 * pair[0]), UNITS[-1])
    rows = [
        [variant, *_cells(numbers), f"{numbers['bytes'] / unit:,.0f}"]
        for variant, numbers in metrics.items()
    ]
    columns = ["model", *COLUMNS, f"size\n({name})"]
    shown = [n for n in range(len(columns)) if any(row[n] != MISSING for row in rows)]
    return [columns[n] for n in shown], [[row[n] for n in shown] for row in rows]


def legend(columns: Sequence[str]) -> str:
    """What the columns of `comparison` mean, a line each."""
    return "\n".join(line for heading, line in LEGEND if not heading or heading in columns)


def certified(metrics: Mapping[str, Any]) -> list[str]:
    """A line for each variant whose numbers are another's, as its certificate says that both answer
    alike.
    """
    copies = {
        name: numbers["measured_as"]
        for name, numbers in metrics.items()
        if "measured_as" in numbers
    }
    return [
        f"{name}: the numbers of {other}, by the certificate of the merge."
        for name, other in copies.items()
    ]


def _cells(numbers: Mapping[str, Any]) -> list[str]:
    trained, forgetting, preferences = map(numbers.get, ("trainable", "forgetting", "preferences"))
    return [
        _count(trained) if trained else MISSING,
        f"{numbers['trainable_percent']:.1f}%" if trained else MISSING,
        _answers(numbers.get("answers", {})),
        f"{numbers['new_loss']:.3f}" if "new_loss" in numbers else MISSING,
        f"{numbers['new_completed']}/{numbers['new_sentences']}"
        if "new_completed" in numbers
        else MISSING,
        f"{numbers['old_loss']:.3f}" if forgetting else MISSING,
        f"{forgetting['loss_rise']:+.3f}" if forgetting else MISSING,
        f"{forgetting['divergence']:.3f}" if forgetting else MISSING,
        f"{forgetting['answers_kept']:.0%}" if forgetting else MISSING,
        " → ".join(f"{preferences[when]['accuracy']:.0%}" for when in ("before", "after"))
        if preferences
        else MISSING,
    ]


def _answers(counts: Mapping[str, Any]) -> str:
    if counts.get("n"):
        return f"{counts['as_expected']}/{counts['n']}"
    similar = counts.get("similar")
    return f"{similar['rouge_l']:.2f}" if similar else MISSING


def _count(number: int) -> str:
    """Whole, or where a terminal has no room for that in millions: metrics.json has all digits."""
    return f"{number:,}" if number < 1_000_000 else f"{number / 1e6:,.1f}M"
