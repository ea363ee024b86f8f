"""A merge into 4 or 8 bits that says what rounding costs of the update, and loses less of it.

`gguf.py` and `nf4.py` write a base's quantized merge, `gptq.py` rounds it for the inputs that the
merged model sees, `update.py` compares stored codes, and `models.py` what the models answer.
"""

from collections.abc import Generator, Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Any, Literal, NamedTuple

from pipeline.errors import UserError
from pipeline.export.formats import Export
from pipeline.project.runner import Event

Kind = Literal["nf4", "q4_k_m", "q8_0"]
Rounding = Literal["nearest", "gptq"]
ENTRY = "into"  # of certificate.json
CLEARLY = 0.9  # of a cost: above it, a difference is no advice
# of the table of the update: an entry of the certificate, its format, and its words
MEASURES = (
    ("codes_changed", ".1%", "of the codes differ from the base's"),
    ("rows_changed", ".1%", "of the rows have such a code"),
    ("share_of_step", ".3g", "times the error of rounding: the update's size"),
    ("contained", ".3g", "times the update is contained"),
    ("lost", ".3g", "times its size: what rounding adds or takes"),
)


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
    """What was lost, as tables of at most 80 columns, and what would help."""
    return [*_update_table(entry), *_model_table(entry), *_advice(entry)]


def _update_table(entry: Mapping[str, Any]) -> Iterator[str]:
    """What is left of the update: the median of the matrices, the least and the most."""
    matrices = entry["update"]["nearest"].values()
    if matrices:
        yield f"The update of {len(matrices)} matrices, rounded to the nearest {entry['kind']}:"
    for name, form, what in MEASURES:
        values = [matrix[name] for matrix in matrices if matrix[name] is not None]
        if values:
            least, middle, most = (f(values).__format__(form) for f in (min, median, max))
            yield f"  {middle:>6} ({least} to {most}) {what}"


def _model_table(entry: Mapping[str, Any]) -> Iterator[str]:
    rows = [("", "KL", "first choices", "loss", "learned")]
    for model in entry["models"]:
        loss, kept = model["loss"], model["kept"]
        rows.append(
            (
                _label(model["model"], entry["kind"]),
                f"{max(model['divergence'], 0):.1e}",
                f"{model['same_first_choices']} of {entry['prompts_checked']}",
                "" if loss is None else f"{loss:.3f}",
                "" if kept is None else f"{kept:.0%}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for label, *numbers in rows:
        cells = map(str.rjust, numbers, widths[1:])
        yield "  ".join([label.ljust(widths[0]), *cells]).rstrip()


def _label(model: str, kind: str) -> str:
    if model == "base":
        return f"{kind} of the base"
    return "adapter beside it" if model == "apart" else f"{kind} of the merge, {model}"


def _advice(entry: Mapping[str, Any]) -> Iterator[str]:
    """What the numbers say, and what would lose less."""
    models = {model["model"]: model for model in entry["models"]}
    kind, written = entry["kind"], models[entry["rounding"]]
    anyway, cost = (max(model["divergence"], 0) for model in (models.pop("base"), written))
    yield (
        f"Rounding costs the base {anyway:.1e} nats per token (KL to the base), and what was "
        f"written {cost:.1e} (KL to base + adapter)."
    )
    kept = written["kept"]
    if kept is not None:
        yield (
            f"It keeps {kept:.0%} of what was learned: of the fall of the loss on "
            f"{entry['examples_checked']} examples."
        )
    cheapest = min(models.values(), key=lambda model: _cost(model, kept is not None))
    best = cheapest["model"]
    if _cost(cheapest, kept is not None) > CLEARLY * _cost(written, kept is not None):
        best = entry["rounding"]
    if best == "apart":
        how = "load the base in nf4" if kind == "nf4" else "lora export --format gguf-adapter"
        yield f"The adapter beside a base in {kind} loses less: {how}."
    elif best != entry["rounding"]:
        yield f"--rounding {best} loses less."
    if entry["rounding"] == "nearest":
        yield "--rounding gptq chooses the codes by the inputs of base + adapter."


def _cost(model: Mapping[str, Any], by_task: bool) -> float:
    cost: float = 1 - model["kept"] if by_task else model["divergence"]
    return max(0.0, cost)
