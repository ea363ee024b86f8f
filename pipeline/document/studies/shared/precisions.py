"""The rows of the document's table of precisions (§10.1), each as a way to round a weight."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.document import rounding
from pipeline.document.rounding import Grid, Rounded
from pipeline.models.quantization import nf4

Way = Callable[[Tensor, Tensor], Rounded]  # W (O, I) and XᵀX (I, I) of its inputs


@dataclass(frozen=True)
class Precision:
    """`document`: its row there, if it has one; `calculator`: what `lora calc` calls it."""

    name: str
    document: str | None
    calculator: str
    way: Way


def precisions(group: int) -> list[Precision]:
    """From most bits to fewest. Of whole numbers the document has GPTQ and AWQ; plain rounding stands beside them."""
    return [
        Precision("FP32", "FP32", "fp32", lambda w, _: rounding.as_dtype(w, torch.float32)),
        Precision("TF32", "TF32", "tf32", lambda w, _: rounding.tf32(w)),
        Precision("FP16", "FP16", "fp16", lambda w, _: rounding.as_dtype(w, torch.float16)),
        Precision("BF16", "BF16", "bf16", lambda w, _: rounding.as_dtype(w, torch.bfloat16)),
        Precision("FP8 E4M3", "FP8 (E4M3)", "fp8", lambda w, _: rounding.fp8(w)),
        Precision("INT8", "INT8", "int8", lambda w, _: rounding.int8(w)),
        Precision("NF4", "NF4", "nf4", lambda w, _: rounding.normal_float(w)),
        Precision("NF4 double", None, "nf4-dq", lambda w, _: rounding.normal_float(w, double=True)),
        Precision("INT4 nearest", None, "gptq", _nearest(4, group)),
        Precision("INT4 GPTQ", "INT4 (GPTQ)", "gptq", _gptq(4, group)),
        Precision("INT4 AWQ", "INT4 (AWQ)", "awq", lambda w, gram: rounding.awq(w, gram, 4, group)),
        Precision("3-bit nearest", "3-bit", "3bit", _nearest(3, group)),
        Precision("3-bit GPTQ", None, "3bit", _gptq(3, group)),
        Precision("2-bit nearest", "2-bit", "2bit", _nearest(2, group)),
        Precision("2-bit GPTQ", None, "2bit", _gptq(2, group)),
        Precision("ternary", "1-bit (BitNet)", "1.58bit", lambda w, _: rounding.ternary(w)),
    ]


def four_bit_codes(weight: Tensor, group: int) -> dict[str, Tensor]:
    """Which of its 16 levels each number gets, by precision: NF4 in its own blocks, INT4 in groups of a row."""
    even = [Grid.of(part, 4).codes(part) for part in torch.split(weight, group, dim=1)]
    return {"NF4": nf4.quantize(weight).codes, "INT4 nearest": torch.cat(even, dim=1)}


def entropy(codes: Tensor) -> float:
    """Of how often each code is used, in bits: their number's logarithm where all are used equally often."""
    counts = torch.bincount(codes.flatten().int())
    shares = counts[counts > 0].double() / codes.numel()
    return -float((shares * shares.log2()).sum())


def _nearest(bits: int, group: int) -> Way:
    return lambda weight, _: rounding.nearest(weight, bits, group)


def _gptq(bits: int, group: int) -> Way:
    return lambda weight, gram: rounding.gptq(weight, gram, bits, group)
