"""A merge into 4 or 8 bits that says what rounding costs of the update, and loses less of it.

`gguf.py` and `nf4.py` write a base's quantized merge, `gptq.py` rounds it for the inputs that the
merged model sees, `update.py` compares stored codes, and `models.py` what the models answer.
"""

from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pipeline.errors import UserError
from pipeline.export.formats import Export
from pipeline.project.runner import Event

Kind = Literal["nf4", "q4_k_m", "q8_0"]
Rounding = Literal["nearest", "gptq"]
ENTRY = "into"  # of certificate.json
NEARLY_ALL = 0.95  # of what was learned: no advice is needed
LABELS = {"base": "{0} of the base", "apart": "adapter beside it"}


class Into(NamedTuple):
    """What to quantize a merge into, and how."""

    kind: Kind
    rounding: Rounding = "nearest"
    data: Path | None = None  # examples of what was learned


def write(export: Export, into: Into, out: Path) -> Generator[Event, None, dict[str, Any]]:
    """Write the quantized merge with its certificate, which is returned. Raises UserError."""
    from pipeline.files.artifact import read_json
    from pipeline.weights.merge import CERTIFICATE

    if export.precision:
        raise UserError(f"--precision is of plain merges: leave it out with --into {into.kind}.")
    if into.kind == "nf4":
        from pipeline.export.into import nf4

        yield from nf4.write(export, into, out)
    else:
        from pipeline.export.into import gguf

        yield from gguf.write(export, into, out)
    return dict(read_json(out / CERTIFICATE, "Merge again"))


def describe(entry: Mapping[str, Any]) -> list[str]:
    """What was lost, as a table of at most 80 columns, and what would help."""
    kind, models = entry["kind"], entry["models"]
    nearest = entry["update"]["nearest"].values()
    lines = []
    if nearest:
        lines.append(f"{len(nearest)} changed matrices in {kind}, each number rounded to nearest:")
        for name, what in (
            ("codes_changed", "of the stored codes changed by the update"),
            ("rows_changed", "of the rows have a changed code"),
            ("share_of_step", "the update, as a share of the error of rounding"),
            ("contained", "times the update is contained"),
            ("lost", "of the update's size is off, by rounding before and after it"),
        ):
            values = [value[name] for value in nearest if value[name] is not None]
            if values:
                lines.append(f"  {min(values):8.4g} to {max(values):<8.4g} {what}")
    rows = [("", "KL", "first choice", "loss", "kept")]
    for model in models:
        has_loss = model["loss"] is not None
        rows.append(
            (
                label_of(model["model"], kind),
                f"{max(model['divergence'], 0):.1e}",
                f"{model['same_first_choices']} of {entry['prompts_checked']}",
                f"{model['loss']:.3f}" if has_loss else "",
                f"{model['kept']:.0%}" if has_loss and model["kept"] is not None else "",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *others in rows:
        cells = map(str.rjust, others, widths[1:])
        lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return [*lines, *_advice(entry)]


def label_of(model: str, kind: str) -> str:
    """A model of the table, in words."""
    return LABELS.get(model, f"merged, {model}").format(kind)


def _advice(entry: Mapping[str, Any]) -> list[str]:
    """What the numbers say, and what would lose less."""
    models = {model["model"]: model for model in entry["models"]}
    kind, written = entry["kind"], models[entry["rounding"]]
    costs, anyway = (max(model["divergence"], 0) for model in (written, models["base"]))
    lines = [
        f"KL in nats per token to base + adapter, of {label_of('base', kind)} to the base: rounding "
        f"costs {anyway:.1e} anyway, the merge {costs:.1e}."
    ]
    has_tasks = written["kept"] is not None
    if has_tasks:
        lines.append(
            f"{written['kept']:.0%} of what was learned is kept: of the fall of the loss on "
            f"{entry['examples_checked']} examples."
        )
    best = min(models.values(), key=lambda model: _badness(model, has_tasks))
    if best is written or (has_tasks and written["kept"] >= NEARLY_ALL):
        return lines
    help_ = {
        "gptq": "--rounding gptq loses less",
        "nearest": "--rounding nearest loses less here",
        "apart": f"the adapter beside the base in {kind} loses less: "
        + ("load the base in nf4" if kind == "nf4" else "`lora export --format gguf-adapter`"),
    }
    if best["model"] in help_:
        lines.append(f"{help_[best['model']]}.".capitalize())
    if entry["rounding"] == "nearest":
        lines.append("--rounding gptq chooses codes by the inputs of base + adapter: try it.")
    return lines


def _badness(model: Mapping[str, Any], has_tasks: bool) -> float:
    """What a model lost; the base in few bits is no candidate."""
    if model["model"] == "base":
        return float("inf")
    return float(-model["kept"] if has_tasks else model["divergence"])
