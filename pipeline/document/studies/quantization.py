"""study_quantization: what a base whose blocks are kept in fewer bits still knows, from fp32 to ternary (§10.1).

The weights of the blocks' linears are rounded and put back; embeddings, head, norms and biases stay, as QLoRA has it.
Inputs are not rounded: what a tensor core, LLM.int8() or BitNet does to them is not in these numbers.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import log2
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.calc.memory import weight_bytes
from pipeline.calc.sources.open_model import built_in
from pipeline.data.examples import Example, read_examples
from pipeline.document import rounding
from pipeline.document.params import StudyQuantization
from pipeline.document.rounding import Rounded
from pipeline.document.studies.shared.next_token import document
from pipeline.document.studies.shared.precisions import Precision, entropy, four_bit_codes, precisions
from pipeline.document.studies.shared.report import Figure, Findings, write_report
from pipeline.document.studies.shared.runner import Run, delete_runs, run_stage
from pipeline.document.tables import Row, Spread, Table, shown, spread
from pipeline.inference import engine
from pipeline.inference.engine import LoadedModel
from pipeline.inference.score import EvalScores, score
from pipeline.models.quantization.quantized_linear import quantizable
from pipeline.project.palette import COLORS
from pipeline.project.runner import Event, Facts, Job, Progress
from pipeline.stages.pretrain import pretrain

LARGE = "qwen3-8b"
LITTLE = 0.001  # of perplexity


@dataclass(frozen=True)
class QuantizedQuality:
    """One base in one precision: bits a weight, ‖W − Q‖/‖W‖, ‖(W − Q)X‖/‖WX‖, perplexity, first choices kept."""

    bits: float
    error: float
    output_error: float
    perplexity: float
    kept: float


def quantization(job: Job) -> Generator[Event, None, Facts]:
    """Every precision on each seed's base → three tables and a picture. Raises UserError."""
    settings = job.project.params.of(StudyQuantization)
    examples = read_examples(job.path(settings.data), settings.data)
    claimed = document(job.path(settings.document), settings.document, "quantization")
    bases = yield from _bases(job, settings)
    ways, found = precisions(settings.group), list[list[QuantizedQuality]]()
    for number, folder in enumerate(bases, 1):
        found.append(_in_every(engine.load(folder), examples, ways))
        yield Progress(number, len(bases), "in every precision")
    tables = _precisions(ways, found), _codes(settings.group), _sizes(ways, claimed)
    text = _text(settings, *tables, kurtosis(engine.load(bases[0])))
    delete_runs(job)
    return write_report(
        job, Findings("A base in fewer bits", "§10.1", text, tables), lambda figure: _draw(figure, tables[0])
    )


def _bases(job: Job, settings: StudyQuantization) -> Generator[Event, None, list[Path]]:
    """The project's own where its seed is asked for, others trained like it."""
    params = job.project.params
    own = params.pretrain.seed
    runs = {
        seed: Run(f"base, seed {seed}", "pretrain", pretrain, {"pretrain": replace(params.pretrain, seed=seed)})
        for seed in settings.seeds
        if seed != own
    }
    folders = yield from run_stage(job, list(runs.values()))
    return [job.artifact("pretrain") if seed == own else folders[runs[seed].name] for seed in settings.seeds]


@torch.no_grad()
def _in_every(base: LoadedModel, examples: Sequence[Example], ways: Sequence[Precision]) -> list[QuantizedQuality]:
    linears = {name: base.model.get_submodule(name) for name in quantizable(base.model)}
    before, grams = calibrated(base, examples, linears)
    weights = {name: linear.weight.detach().clone() for name, linear in linears.items()}  # type: ignore[operator]
    found = []
    for precision in ways:
        rounded = {name: precision.way(weights[name], grams[name]) for name in weights}
        for name, linear in linears.items():
            linear.weight = nn.Parameter(rounded[name].weight, requires_grad=False)
        scored = score(base, examples)
        found.append(_kept(weights, rounded, grams, before, scored))
    return found


def calibrated(
    base: LoadedModel, examples: Sequence[Example], linears: Mapping[str, nn.Module]
) -> tuple[EvalScores, dict[str, Tensor]]:
    """What the base says of the examples, and XᵀX (I, I) of what each linear reads meanwhile."""
    grams: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def add(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            rows = inputs[0].detach().flatten(0, -2).double()
            grams[name] = grams.get(name, torch.zeros((), dtype=torch.float64)) + rows.T @ rows

        return add

    _ = base.model.supports_packing  # tried on ids of its own, which are not to be counted
    hooks = [linear.register_forward_pre_hook(watch(name)) for name, linear in linears.items()]
    try:
        return score(base, examples), grams
    finally:
        for hook in hooks:
            hook.remove()


def _kept(
    weights: Mapping[str, Tensor],
    rounded: Mapping[str, Rounded],
    grams: Mapping[str, Tensor],
    before: EvalScores,
    after: EvalScores,
) -> QuantizedQuality:
    numbers = sum(weight.numel() for weight in weights.values())
    off = sum(float((weights[name] - one.weight).square().sum()) for name, one in rounded.items())
    size = sum(float(weight.square().sum()) for weight in weights.values())
    outputs = [rounding.output_error(weights[name], one.weight, grams[name]) for name, one in rounded.items()]
    whole = [rounding.output_error(weight, torch.zeros_like(weight), grams[name]) for name, weight in weights.items()]
    return QuantizedQuality(
        sum(one.bits * one.weight.numel() for one in rounded.values()) / numbers,
        (off / size) ** 0.5,
        (sum(outputs) / sum(whole)) ** 0.5,
        after.perplexity,
        float((after.choices == before.choices).double().mean()),
    )


def _precisions(ways: Sequence[Precision], found: Sequence[Sequence[QuantizedQuality]]) -> Table:
    normal = _normal(256)
    rows: list[Row] = []
    for precision, of in zip(ways, zip(*found, strict=True), strict=True):
        left = precision.way(normal, normal.T @ normal).weight
        rows.append(
            {
                "precision": precision.name,
                "bits": of[0].bits,
                "error": Spread.of(one.error for one in of),
                "of_normal": float((left - normal).norm() / normal.norm()),
                "output_error": Spread.of(one.output_error for one in of),
                "perplexity": Spread.of(one.perplexity for one in of),
                "kept": Spread.of(one.kept for one in of),
            }
        )
    forms = {"bits": ".2f", "error": ".2%", "of_normal": ".2%", "output_error": ".2%", "perplexity": ".3f"}
    return Table("precisions", "The base, its blocks' linears rounded", rows, {**forms, "kept": ".0%"}, ("of_normal",))


def _normal(size: int) -> Tensor:
    return torch.randn(size, size, generator=torch.Generator().manual_seed(0))


def _codes(group: int) -> Table:
    """How evenly normal numbers use the 16 levels of four bits: what NF4's optimum is of (Dettmers et al. 2023, §3)."""
    rows: list[Row] = [
        {"precision": name, "entropy": entropy(found), "best": log2(16)}
        for name, found in four_bit_codes(_normal(1024), group).items()
    ]
    return Table("codes", "The 16 codes of four bits on normal numbers, in bits", rows, {"entropy": ".2f", "best": "g"})


def _sizes(ways: Sequence[Precision], claimed: Mapping[str, Any]) -> Table:
    """Qwen3-8B's weights: bits times parameters, as the document has it, and as the calculator counts them."""
    model = built_in(LARGE).shapes
    rows: list[Row] = []
    for one in ways:
        said = claimed[one.document] if one.document else {}
        rows.append(
            {
                "precision": one.name,
                "document_bits": said.get("bits"),
                "document_GB": said.get("GB"),
                "calculator_GB": weight_bytes(model, one.calculator) / 1e9,
                "calculator_GiB": weight_bytes(model, one.calculator) / 2**30,
            }
        )
    forms = {"document_bits": "g", "document_GB": "g", "calculator_GB": ".2f", "calculator_GiB": ".2f"}
    return Table("sizes", "Qwen3-8B's weights: by the document, and by the calculator", rows, forms)


@torch.no_grad()
def kurtosis(base: LoadedModel) -> float:
    """E z⁴ of the blocks' weights, each matrix standardised: 3 for a normal distribution, 1.8 for an even one."""
    found = []
    for name in quantizable(base.model):
        weight = base.model.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        found.append(((weight - weight.mean()) / weight.std()).pow(4).mean())
    return float(torch.stack(found).mean())


def _text(settings: StudyQuantization, kept: Table, used: Table, sizes: Table, fourth: float) -> str:
    by_name = {str(row["precision"]): row for row in kept.rows}
    whole = [name for name, row in by_name.items() if spread(row["kept"]).low == 1]
    lost = {name: row for name, row in by_name.items() if name not in whole}
    first = spread(by_name["FP32"]["perplexity"]).mean
    rises = {name: spread(row["perplexity"]).mean / first - 1 for name, row in by_name.items()}
    dearer = {name: rise for name, rise in rises.items() if rise >= LITTLE}
    bits = {str(row["precision"]): shown(row["entropy"], ".2f") for row in used.rows}
    gib = {str(row["precision"]): row["calculator_GiB"] for row in sizes.rows}
    return "\n\n".join(
        [
            "*Error*: ‖W − Q‖/‖W‖ over the weights of the blocks' linears, which are rounded; *output error*: "
            "‖(W − Q)X‖/‖WX‖ for the inputs that they get. *Kept*: first choices on "
            f"`{settings.data}` that are FP32's. *Bits* are a weight's with its scales, in groups of {settings.group}. "
            "Inputs are not rounded, nor embeddings, head, norms and biases.",
            f"On every base all first choices are kept in: {', '.join(whole)}."
            + "".join(f" {name} keeps {shown(row['kept'], '.0%')}." for name, row in lost.items()),
            "Perplexity rises, against FP32, by "
            + ", ".join(f"{rise:.1%} in {name}" for name, rise in dearer.items())
            + f"; by less than {LITTLE:.1%} in all others.",
            _calibrated(by_name),
            f"NF4's levels are the quantiles of a normal distribution. These weights have a kurtosis of {fourth:.1f} "
            f"(3 is normal, 1.8 even): on them NF4 errs by {shown(by_name['NF4']['error'], '.1%')}, INT4's even steps "
            f"by {shown(by_name['INT4 nearest']['error'], '.1%')}; on a matrix of normal numbers "
            f"{shown(by_name['NF4']['of_normal'], '.1%')} and {shown(by_name['INT4 nearest']['of_normal'], '.1%')}.",
            "Optimal in information are 16 levels that are used equally often, which is 4 bits of entropy: on normal "
            f"numbers NF4's have {bits['NF4']}, INT4's {bits['INT4 nearest']}.",
            f"Qwen3-8B takes {shown(gib['FP32'], '.1f')} GiB in FP32, {shown(gib['BF16'], '.1f')} in BF16, "
            f"{shown(gib['INT8'], '.1f')} in INT8 and {shown(gib['NF4 double'], '.1f')} in NF4 with double "
            "quantization: embeddings and head stay in 16 bits, and scales take room.",
        ]
    )


def _calibrated(rows: Mapping[str, Row]) -> str:
    """What looking at the inputs is worth."""
    pairs = (("INT4 GPTQ", "INT4 nearest"), ("INT4 AWQ", "INT4 nearest"), ("2-bit GPTQ", "2-bit nearest"))
    said = (
        f"{shown(rows[one]['output_error'], '.1%')} in {one} against {shown(rows[other]['output_error'], '.1%')}"
        for one, other in pairs
    )
    return f"Output errors where inputs were looked at, and where each weight was rounded alone: {', '.join(said)}."


def _draw(figure: Figure, kept: Table) -> None:
    left, right = figure.subplots(1, 2)
    names = [str(row["precision"]) for row in kept.rows]
    places = range(len(names))
    for name, color, marker in (("error", COLORS["freeze"], "s"), ("output_error", COLORS["lora"], "o")):
        cells = {place: cell for place, row in enumerate(kept.rows) if (cell := spread(row[name])).low}  # FP32 has none
        ends = [[c.mean - c.low for c in cells.values()], [c.high - c.mean for c in cells.values()]]
        look = {"color": color, "marker": marker, "linestyle": "", "label": name.replace("_", " ")}
        left.errorbar([c.mean for c in cells.values()], list(cells), xerr=ends, **look)
    left.set(xscale="log", xlabel="relative error")
    left.set_yticks(places, names, fontsize=8)
    left.legend(fontsize=8)
    choices, perplexity = ([spread(row[name]) for row in kept.rows] for name in ("kept", "perplexity"))
    right.barh(
        places,
        [c.mean for c in choices],
        xerr=[[c.mean - c.low for c in choices], [c.high - c.mean for c in choices]],
        color=COLORS["scratch"],
    )
    for place, value in zip(places, perplexity, strict=True):
        right.annotate(f"perplexity {value.mean:.2f}", (0.02, place), va="center", fontsize=7)
    right.set(xlabel="first choices kept", xlim=(0, 1))
    right.set_yticks([])
    for axis in (left, right):
        axis.grid(alpha=0.3, axis="x")
        axis.set_ylim(len(names) - 0.4, -0.6)  # most bits at the top
