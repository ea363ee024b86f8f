"""study_quantization: the quality of a base whose blocks are quantized, from fp32 to ternary
(§10.1).

The blocks' linear weights are replaced by their dequantized values; embeddings, head, norms and
biases stay, as in QLoRA. Activations are not quantized, unlike in tensor cores, LLM.int8() or
BitNet.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from math import log2
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from msgspec.structs import replace

from lab.measures import document
from lab.report import COLORS, Figure, Findings, min_max
from lab.runner import Run, train
from lab.studies import study_stage
from lab.tables import Row, Table, shown, spreads
from pipeline.data.examples import Example
from pipeline.data.formats import read_examples
from pipeline.project.params.schema import Count, Section, Seed
from pipeline.project.runner import Event, Job, Progress

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lab.rounding import Precision
    from pipeline.inference.engine import LoadedModel
    from pipeline.inference.score import EvalScores

PLACE = "§10.1"
LARGE = "qwen3-8b"
NEGLIGIBLE_RISE = 0.001  # relative, of perplexity


class StudyQuantization(Section, frozen=True, kw_only=True):
    """§10.1: the quality of the quantized base, by precision."""

    data: Annotated[str, "for perplexity and for the calibration of GPTQ and AWQ"] = (
        "data/pretrain.de.txt"
    )
    document: Annotated[str, "the document's numbers and answers"] = "data/document.yaml"
    seeds: Annotated[tuple[Seed, ...], "of the base model"] = (0, 1, 2)
    group: Annotated[Count, "group size: weights of a row that share a scale"] = 64


STAGE = study_stage(
    __name__,
    PLACE,
    title="A base in fewer bits",
    about="what a base in fewer bits still knows, from fp32 to ternary",
    settings=StudyQuantization,
    data=("data", "document", "pretrain.data"),
    needs=("pretrain",),
    extra_sections=("pretrain",),
)


class Quality(NamedTuple):
    """One base in one precision: ‖W − Q‖/‖W‖, ‖(W − Q)X‖/‖WX‖, perplexity, and the share of first
    choices equal to the unquantized base's."""

    error: float
    output_error: float
    perplexity: float
    kept: float


def measure(job: Job, settings: StudyQuantization) -> Generator[Event, None, Findings]:
    """Measure every precision on each seed's base → three tables."""
    import torch

    from lab.rounding import entropy, four_bit_codes, precisions
    from pipeline.inference import engine

    examples = read_examples(job.path(settings.data), settings.data)
    claimed = document(job, settings.document, "quantization")
    pretrain = job.project.params.pretrain
    # The project's own base for its seed; for the other seeds, bases trained with the same
    # settings.
    runs = {
        seed: Run(f"base, seed {seed}", "pretrain", {"pretrain": replace(pretrain, seed=seed)})
        for seed in settings.seeds
        if seed != pretrain.seed
    }
    trained = {made.run: made.folder for made in (yield from train(job, list(runs.values())))}
    bases = [
        trained[runs[seed].name] if seed in runs else job.artifact("pretrain")
        for seed in settings.seeds
    ]
    every, by_base = precisions(settings.group), list[list[tuple[float, Quality]]]()
    for number, folder in enumerate(bases, 1):
        by_base.append(_measure_all(engine.load(folder), examples, every))
        yield Progress(number, len(bases), "in every precision")

    def normal(size: int) -> "Tensor":
        return torch.randn(size, size, generator=torch.Generator().manual_seed(0))

    numbers, quality = normal(256), list[Row]()
    for precision, by_seed in zip(every, zip(*by_base, strict=True), strict=True):
        # on inputs like the weights
        rounded = precision.quantize(numbers, numbers.T @ numbers).weight
        measured = spreads(Quality._fields, [each for _, each in by_seed])
        own = {"precision": precision.name, "bits": by_seed[0][0], "error": measured.pop("error")}
        of_normal = float((rounded - numbers).norm() / numbers.norm())
        quality.append({**own, "of_normal": of_normal, **measured})
    # NF4 is designed to maximize the entropy of its codes on normal numbers (Dettmers et al. 2023,
    # §3).
    codes = [
        {"precision": name, "entropy": entropy(codes), "best": log2(16)}
        for name, codes in four_bit_codes(normal(1024), settings.group).items()
    ]
    sizes = _sizes(every, claimed)
    formats = dict.fromkeys(("error", "of_normal", "output_error"), ".2%")
    formats |= {"bits": ".2f", "perplexity": ".3f", "kept": ".0%", "entropy": ".2f", "best": "g"}
    formats |= {
        "document_bits": "g",
        "document_GB": "g",
        "calculator_GB": ".2f",
        "calculator_GiB": ".2f",
    }
    tables = (
        Table(
            "precisions",
            "The base with its blocks' linears quantized",
            quality,
            formats,
            ("of_normal",),
        ),
        Table(
            "codes", "Entropy of the 16 four-bit codes on normal numbers, in bits", codes, formats
        ),
        Table(
            "sizes", "Qwen3-8B's weights: by the document, and by the calculator", sizes, formats
        ),
    )
    text = _text(settings, quality, codes, sizes, kurtosis(engine.load(bases[0])))
    return Findings(text, tables, lambda figure: _draw(figure, quality))


def _measure_all(
    base: "LoadedModel", examples: Sequence[Example], precisions: "Sequence[Precision]"
) -> list[tuple[float, Quality]]:
    """Bits per weight and quality in each precision. The base keeps the last precision's
    weights.
    """
    import torch
    from torch import nn

    from lab.rounding import output_error
    from pipeline.inference.score import agreement, score
    from pipeline.models.quantized_linear import quantizable

    linears = {name: base.model.get_submodule(name) for name in quantizable(base.model)}
    before, grams = calibrated(base, examples, linears)
    weights = {
        name: linear.weight.detach().clone().to(grams[name].device)  # type: ignore[operator]
        for name, linear in linears.items()
    }
    count = sum(weight.numel() for weight in weights.values())
    norm = sum(float(weight.square().sum()) for weight in weights.values())
    outputs = sum(
        output_error(weight, torch.zeros_like(weight), grams[name])
        for name, weight in weights.items()
    )
    qualities = []
    for precision in precisions:
        rounded = {
            name: precision.quantize(weight, grams[name]) for name, weight in weights.items()
        }
        for name, linear in linears.items():
            linear.weight = nn.Parameter(
                rounded[name].weight.to(base.model.device), requires_grad=False
            )
        after = score(base, examples)
        error = sum(float((weights[name] - q.weight).square().sum()) for name, q in rounded.items())
        of_outputs = sum(
            output_error(weights[name], q.weight, grams[name]) for name, q in rounded.items()
        )
        kept = agreement(after.choices, before.choices)
        quality = Quality(
            (error / norm) ** 0.5, (of_outputs / outputs) ** 0.5, after.perplexity, kept
        )
        qualities.append(
            (sum(q.bits * q.weight.numel() for q in rounded.values()) / count, quality)
        )
    return qualities


def calibrated(
    base: "LoadedModel", examples: Sequence[Example], linears: "Mapping[str, nn.Module]"
) -> "tuple[EvalScores, dict[str, Tensor]]":
    """The base's scores on the examples, and the Gram matrix XᵀX (I, I) of each linear's inputs X
    (N, I).
    """
    import torch

    from pipeline.inference.score import score
    from pipeline.models.device import fp64_device

    grams: dict[str, Tensor] = {}

    def accumulate(name: str) -> "Callable[[nn.Module, tuple[Tensor, ...]], None]":
        def add(_module: "nn.Module", inputs: "tuple[Tensor, ...]") -> None:
            x = inputs[0].detach().flatten(0, -2)  # (B, T, I) → (N, I)
            rows = x.to(fp64_device(x.device), torch.float64)  # GPTQ inverts their sum
            grams[name] = grams.get(name, torch.zeros((), dtype=torch.float64)) + rows.T @ rows

        return add

    # computed now: it runs the model on test ids, which the hooks must not count
    _ = base.model.supports_packing
    hooks = [linear.register_forward_pre_hook(accumulate(name)) for name, linear in linears.items()]
    try:
        return score(base, examples), grams
    finally:
        for hook in hooks:
            hook.remove()


def kurtosis(base: "LoadedModel") -> float:
    """The kurtosis E z⁴ of the blocks' weights, each matrix standardized: 3 if normal, 1.8 if
    uniform.
    """
    import torch

    from pipeline.models.quantized_linear import quantizable

    weights: list[Any] = [base.model.get_submodule(name).weight for name in quantizable(base.model)]
    with torch.no_grad():
        return float(
            torch.stack([((w - w.mean()) / w.std()).pow(4).mean() for w in weights]).mean()
        )


def _sizes(precisions: "Sequence[Precision]", claimed: Mapping[str, Any]) -> list[Row]:
    """The size of Qwen3-8B's weights: bits × parameters as in the document, and by the
    calculator.
    """
    from pipeline.calc.memory import weight_bytes
    from pipeline.calc.sources.open_model import built_in

    model, rows = built_in(LARGE).shapes, list[Row]()
    for precision in precisions:
        told = claimed[precision.document] if precision.document else {}
        size = weight_bytes(model, precision.calculator)
        by_document = {"document_bits": told.get("bits"), "document_GB": told.get("GB")}
        by_calculator = {"calculator_GB": size / 1e9, "calculator_GiB": size / 2**30}
        rows.append({"precision": precision.name, **by_document, **by_calculator})
    return rows


def _text(
    settings: StudyQuantization,
    quality: Sequence[Row],
    codes: Sequence[Row],
    sizes: Sequence[Row],
    kurtosis: float,
) -> str:
    by_name = {row["precision"]: row for row in quality}
    unchanged = [name for name, row in by_name.items() if row["kept"].low == 1]
    lost = "".join(
        f" {n} keeps {shown(row['kept'], '.0%')}."
        for n, row in by_name.items()
        if n not in unchanged
    )
    fp32 = by_name["FP32"]["perplexity"]
    rises = {name: row["perplexity"] / fp32 - 1 for name, row in by_name.items()}
    worse = ", ".join(
        f"{rise:.1%} in {name}" for name, rise in rises.items() if rise >= NEGLIGIBLE_RISE
    )
    outputs, errors, of_normal = (
        {name: shown(row[column], ".1%") for name, row in by_name.items()}
        for column in ("output_error", "error", "of_normal")
    )
    pairs = (
        ("INT4 GPTQ", "INT4 nearest"),
        ("INT4 AWQ", "INT4 nearest"),
        ("2-bit GPTQ", "2-bit nearest"),
    )
    calibration = ", ".join(
        f"{outputs[method]} in {method} against {outputs[nearest]}" for method, nearest in pairs
    )
    bits = {row["precision"]: shown(row["entropy"], ".2f") for row in codes}
    gib = {row["precision"]: shown(row["calculator_GiB"], ".1f") for row in sizes}
    paragraphs = (
        "*Error*: ‖W − Q‖/‖W‖ over the weights of the blocks' linears, which are quantized. "
        "*Output error*: ‖(W − Q)X‖/‖WX‖ on their inputs. *Kept*: the share of first choices on "
        f"`{settings.data}` equal to FP32's. *Bits*: per weight including scales, with groups of "
        f"{settings.group}. Activations, embeddings, head, norms and biases are not quantized.",
        f"All first choices are kept on every base in: {', '.join(unchanged)}.{lost}",
        f"Over FP32, perplexity rises by {worse}; by less than {NEGLIGIBLE_RISE:.1%} in all "
        "others.",
        f"Output error with calibration, against rounding to nearest: {calibration}.",
        "NF4's levels are the quantiles of a normal distribution. These weights have a kurtosis of "
        f"{kurtosis:.1f} (normal: 3, uniform: 1.8). The error on them is {errors['NF4']} for NF4 "
        f"and {errors['INT4 nearest']} for INT4's uniform levels; on a matrix of normal numbers it "
        f"is {of_normal['NF4']} and {of_normal['INT4 nearest']}.",
        "A 4-bit code carries the most information if all 16 levels are equally frequent: 4 bits "
        f"of entropy. On normal numbers NF4 has {bits['NF4']}, INT4 {bits['INT4 nearest']}.",
        f"Qwen3-8B takes {gib['FP32']} GiB in FP32, {gib['BF16']} in BF16, {gib['INT8']} in INT8 "
        f"and {gib['NF4 double']} in NF4 with double quantization. Embeddings and head stay in 16 "
        "bits, and scales are included.",
    )
    return "\n\n".join(paragraphs)


def _draw(figure: Figure, quality: Sequence[Row]) -> None:
    """The errors, and the first choices kept, by precision; most bits at the top."""
    left, right = figure.subplots(1, 2)
    names = [row["precision"] for row in quality]
    positions = range(len(names))
    for name, color, marker in (("error", "freeze", "s"), ("output_error", "lora", "o")):
        cells = {y: row[name] for y, row in enumerate(quality) if row[name].low}  # FP32 has error 0
        style = {
            "color": COLORS[color],
            "marker": marker,
            "linestyle": "",
            "label": name.replace("_", " "),
        }
        left.errorbar(list(cells.values()), list(cells), xerr=min_max(cells.values()), **style)
    left.set(xscale="log", xlabel="relative error")
    left.set_yticks(positions, names, fontsize=8)
    left.legend(fontsize=8)
    kept = [row["kept"] for row in quality]
    right.barh(positions, kept, xerr=min_max(kept), color=COLORS["scratch"])
    for y, row in enumerate(quality):
        right.annotate(f"perplexity {row['perplexity']:.2f}", (0.02, y), va="center", fontsize=7)
    right.set(xlabel="first choices kept", xlim=(0, 1))
    right.set_yticks([])
    for axis in (left, right):
        axis.grid(alpha=0.3, axis="x")
        axis.set_ylim(len(names) - 0.4, -0.6)
