"""study_quantization: the quality of a base whose blocks are quantized, from fp32 to ternary (§10.1).

The blocks' linear weights are replaced by their dequantized values; embeddings, head, norms and biases stay, as in
QLoRA. Activations are not quantized, unlike in tensor cores, LLM.int8() or BitNet.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from math import log2
from pathlib import Path
from typing import Any

import torch
from msgspec.structs import replace
from torch import Tensor, nn

from pipeline.calc.memory import weight_bytes
from pipeline.calc.open_model import built_in
from pipeline.data.examples import Example
from pipeline.data.read import read_examples
from pipeline.document import rounding
from pipeline.document.params import StudyQuantization
from pipeline.document.rounding import Rounded
from pipeline.document.studies.shared.next_token import document
from pipeline.document.studies.shared.precisions import Precision, entropy, four_bit_codes, precisions
from pipeline.document.studies.shared.report import Figure, Findings, write_report
from pipeline.document.studies.shared.runner import Run, delete_runs, run_stage
from pipeline.document.tables import Row, Spread, Table, min_max, shown, spread
from pipeline.inference import engine
from pipeline.inference.engine import LoadedModel
from pipeline.inference.score import EvalScores, score
from pipeline.models.quantized_linear import quantizable
from pipeline.project.runner import Event, Facts, Job, Progress
from pipeline.stages.registry import COLORS

LARGE = "qwen3-8b"
NEGLIGIBLE_RISE = 0.001  # relative, of perplexity


@dataclass(frozen=True)
class QuantizedQuality:
    """One base in one precision: bits per weight, ‖W − Q‖/‖W‖, ‖(W − Q)X‖/‖WX‖, perplexity, share of first choices
    equal to the unquantized base's."""

    bits: float
    error: float
    output_error: float
    perplexity: float
    kept: float


def run(job: Job) -> Generator[Event, None, Facts]:
    """Measure every precision on each seed's base → three tables and a picture. Raises UserError."""
    settings = job.project.params.of(StudyQuantization)
    examples = read_examples(job.path(settings.data), settings.data)
    claimed = document(job.path(settings.document), settings.document, "quantization")
    bases = yield from _bases(job, settings)
    measured, rows = precisions(settings.group), list[list[QuantizedQuality]]()
    for number, folder in enumerate(bases, 1):
        rows.append(_measure_all(engine.load(folder), examples, measured))
        yield Progress(number, len(bases), "in every precision")
    tables = _precisions(measured, rows), _codes(settings.group), _sizes(measured, claimed)
    text = _text(settings, *tables, kurtosis(engine.load(bases[0])))
    delete_runs(job)
    return write_report(
        job, Findings("A base in fewer bits", "§10.1", text, tables), lambda figure: _draw(figure, tables[0])
    )


def _bases(job: Job, settings: StudyQuantization) -> Generator[Event, None, list[Path]]:
    """One base per seed: the project's own for its seed, and for other seeds bases trained with the same settings."""
    params = job.project.params
    project_seed = params.pretrain.seed
    runs = {
        seed: Run(f"base, seed {seed}", "pretrain", {"pretrain": replace(params.pretrain, seed=seed)})
        for seed in settings.seeds
        if seed != project_seed
    }
    folders = yield from run_stage(job, list(runs.values()))
    return [job.artifact("pretrain") if seed == project_seed else folders[runs[seed].name] for seed in settings.seeds]


@torch.no_grad()
def _measure_all(
    base: LoadedModel, examples: Sequence[Example], all_precisions: Sequence[Precision]
) -> list[QuantizedQuality]:
    linears = {name: base.model.get_submodule(name) for name in quantizable(base.model)}
    before, grams = calibrated(base, examples, linears)
    weights = {name: linear.weight.detach().clone() for name, linear in linears.items()}  # type: ignore[operator]
    qualities = []
    for precision in all_precisions:
        rounded = {name: precision.quantize(weights[name], grams[name]) for name in weights}
        for name, linear in linears.items():
            linear.weight = nn.Parameter(rounded[name].weight, requires_grad=False)
        qualities.append(_quality(weights, rounded, grams, before, score(base, examples)))
    return qualities


def calibrated(
    base: LoadedModel, examples: Sequence[Example], linears: Mapping[str, nn.Module]
) -> tuple[EvalScores, dict[str, Tensor]]:
    """The base's scores on the examples, and the Gram matrix XᵀX (I, I) of each linear's inputs X (N, I)."""
    grams: dict[str, Tensor] = {}

    def accumulate(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def add(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            rows = inputs[0].detach().flatten(0, -2).double()  # (B, T, I) → (N, I)
            grams[name] = grams.get(name, torch.zeros((), dtype=torch.float64)) + rows.T @ rows

        return add

    _ = base.model.supports_packing  # computed now: it runs the model on test ids, which the hooks must not count
    hooks = [linear.register_forward_pre_hook(accumulate(name)) for name, linear in linears.items()]
    try:
        return score(base, examples), grams
    finally:
        for hook in hooks:
            hook.remove()


def _quality(
    weights: Mapping[str, Tensor],
    rounded: Mapping[str, Rounded],
    grams: Mapping[str, Tensor],
    before: EvalScores,
    after: EvalScores,
) -> QuantizedQuality:
    numbers = sum(weight.numel() for weight in weights.values())
    error = sum(float((weights[name] - q.weight).square().sum()) for name, q in rounded.items())
    norm = sum(float(weight.square().sum()) for weight in weights.values())
    errors = [rounding.output_error(weights[name], q.weight, grams[name]) for name, q in rounded.items()]
    norms = [rounding.output_error(weight, torch.zeros_like(weight), grams[name]) for name, weight in weights.items()]
    return QuantizedQuality(
        sum(q.bits * q.weight.numel() for q in rounded.values()) / numbers,
        (error / norm) ** 0.5,
        (sum(errors) / sum(norms)) ** 0.5,
        after.perplexity,
        float((after.choices == before.choices).double().mean()),
    )


def _precisions(all_precisions: Sequence[Precision], by_base: Sequence[Sequence[QuantizedQuality]]) -> Table:
    normal = _normal(256)
    rows: list[Row] = []
    for precision, by_seed in zip(all_precisions, zip(*by_base, strict=True), strict=True):
        rounded = precision.quantize(normal, normal.T @ normal).weight
        rows.append(
            {
                "precision": precision.name,
                "bits": by_seed[0].bits,
                "error": Spread.of(quality.error for quality in by_seed),
                "of_normal": float((rounded - normal).norm() / normal.norm()),
                "output_error": Spread.of(quality.output_error for quality in by_seed),
                "perplexity": Spread.of(quality.perplexity for quality in by_seed),
                "kept": Spread.of(quality.kept for quality in by_seed),
            }
        )
    formats = {"bits": ".2f", "error": ".2%", "of_normal": ".2%", "output_error": ".2%", "perplexity": ".3f"}
    return Table(
        "precisions", "The base with its blocks' linears quantized", rows, {**formats, "kept": ".0%"}, ("of_normal",)
    )


def _normal(size: int) -> Tensor:
    return torch.randn(size, size, generator=torch.Generator().manual_seed(0))


def _codes(group: int) -> Table:
    """The entropy of 4-bit codes on normal numbers, which NF4 is designed to maximize (Dettmers et al. 2023, §3)."""
    rows: list[Row] = [
        {"precision": name, "entropy": entropy(codes), "best": log2(16)}
        for name, codes in four_bit_codes(_normal(1024), group).items()
    ]
    return Table(
        "codes", "Entropy of the 16 four-bit codes on normal numbers, in bits", rows, {"entropy": ".2f", "best": "g"}
    )


def _sizes(all_precisions: Sequence[Precision], claimed: Mapping[str, Any]) -> Table:
    """The size of Qwen3-8B's weights: bits × parameters as in the document, and by the calculator."""
    model = built_in(LARGE).shapes
    rows: list[Row] = []
    for precision in all_precisions:
        document_row = claimed[precision.document] if precision.document else {}
        rows.append(
            {
                "precision": precision.name,
                "document_bits": document_row.get("bits"),
                "document_GB": document_row.get("GB"),
                "calculator_GB": weight_bytes(model, precision.calculator) / 1e9,
                "calculator_GiB": weight_bytes(model, precision.calculator) / 2**30,
            }
        )
    formats = {"document_bits": "g", "document_GB": "g", "calculator_GB": ".2f", "calculator_GiB": ".2f"}
    return Table("sizes", "Qwen3-8B's weights: by the document, and by the calculator", rows, formats)


@torch.no_grad()
def kurtosis(base: LoadedModel) -> float:
    """The kurtosis E z⁴ of the blocks' weights, each matrix standardized: 3 if normal, 1.8 if uniform."""
    fourth_moments = []
    for name in quantizable(base.model):
        weight = base.model.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        fourth_moments.append(((weight - weight.mean()) / weight.std()).pow(4).mean())
    return float(torch.stack(fourth_moments).mean())


def _text(settings: StudyQuantization, quality: Table, codes: Table, sizes: Table, weight_kurtosis: float) -> str:
    by_name = {str(row["precision"]): row for row in quality.rows}
    unchanged = [name for name, row in by_name.items() if spread(row["kept"]).low == 1]
    lost = {name: row for name, row in by_name.items() if name not in unchanged}
    fp32 = spread(by_name["FP32"]["perplexity"]).mean
    rises = {name: spread(row["perplexity"]).mean / fp32 - 1 for name, row in by_name.items()}
    worse = {name: rise for name, rise in rises.items() if rise >= NEGLIGIBLE_RISE}
    bits = {str(row["precision"]): shown(row["entropy"], ".2f") for row in codes.rows}
    gib = {str(row["precision"]): row["calculator_GiB"] for row in sizes.rows}
    return "\n\n".join(
        [
            "*Error*: ‖W − Q‖/‖W‖ over the weights of the blocks' linears, which are quantized. *Output error*: "
            "‖(W − Q)X‖/‖WX‖ on their inputs. *Kept*: the share of first choices on "
            f"`{settings.data}` equal to FP32's. *Bits*: per weight including scales, with groups of {settings.group}. "
            "Activations, embeddings, head, norms and biases are not quantized.",
            f"All first choices are kept on every base in: {', '.join(unchanged)}."
            + "".join(f" {name} keeps {shown(row['kept'], '.0%')}." for name, row in lost.items()),
            "Over FP32, perplexity rises by "
            + ", ".join(f"{rise:.1%} in {name}" for name, rise in worse.items())
            + f"; by less than {NEGLIGIBLE_RISE:.1%} in all others.",
            _describe_calibration(by_name),
            f"NF4's levels are the quantiles of a normal distribution. These weights have a kurtosis of "
            f"{weight_kurtosis:.1f} (normal: 3, uniform: 1.8). The error on them is "
            f"{shown(by_name['NF4']['error'], '.1%')} for NF4 and {shown(by_name['INT4 nearest']['error'], '.1%')} for "
            "INT4's uniform levels; on a matrix of normal numbers it is "
            f"{shown(by_name['NF4']['of_normal'], '.1%')} and {shown(by_name['INT4 nearest']['of_normal'], '.1%')}.",
            "A 4-bit code carries the most information if all 16 levels are equally frequent: 4 bits of entropy. On "
            f"normal numbers NF4 has {bits['NF4']}, INT4 {bits['INT4 nearest']}.",
            f"Qwen3-8B takes {shown(gib['FP32'], '.1f')} GiB in FP32, {shown(gib['BF16'], '.1f')} in BF16, "
            f"{shown(gib['INT8'], '.1f')} in INT8 and {shown(gib['NF4 double'], '.1f')} in NF4 with double "
            "quantization. Embeddings and head stay in 16 bits, and scales are included.",
        ]
    )


def _describe_calibration(rows: Mapping[str, Row]) -> str:
    """The output errors with and without calibration on the inputs."""
    pairs = (("INT4 GPTQ", "INT4 nearest"), ("INT4 AWQ", "INT4 nearest"), ("2-bit GPTQ", "2-bit nearest"))
    errors = {name: shown(row["output_error"], ".1%") for name, row in rows.items()}
    comparisons = (f"{errors[method]} in {method} against {errors[nearest]}" for method, nearest in pairs)
    return f"Output error with calibration, against rounding to nearest: {', '.join(comparisons)}."


def _draw(figure: Figure, quality: Table) -> None:
    left, right = figure.subplots(1, 2)
    names = [str(row["precision"]) for row in quality.rows]
    positions = range(len(names))
    for name, color, marker in (("error", COLORS["freeze"], "s"), ("output_error", COLORS["lora"], "o")):
        cells = {y: cell for y, row in enumerate(quality.rows) if (cell := spread(row[name])).low}  # FP32 has error 0
        bars = min_max(cells.values())
        style = {"color": color, "marker": marker, "linestyle": "", "label": name.replace("_", " ")}
        left.errorbar([c.mean for c in cells.values()], list(cells), xerr=bars, **style)
    left.set(xscale="log", xlabel="relative error")
    left.set_yticks(positions, names, fontsize=8)
    left.legend(fontsize=8)
    choices, perplexity = ([spread(row[name]) for row in quality.rows] for name in ("kept", "perplexity"))
    right.barh(
        positions,
        [c.mean for c in choices],
        xerr=min_max(choices),
        color=COLORS["scratch"],
    )
    for y, value in zip(positions, perplexity, strict=True):
        right.annotate(f"perplexity {value.mean:.2f}", (0.02, y), va="center", fontsize=7)
    right.set(xlabel="first choices kept", xlim=(0, 1))
    right.set_yticks([])
    for axis in (left, right):
        axis.grid(alpha=0.3, axis="x")
        axis.set_ylim(len(names) - 0.4, -0.6)  # most bits at the top
