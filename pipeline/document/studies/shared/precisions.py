"""The rows of the document's table of precisions (§10.1), each with its quantizer."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.document import rounding
from pipeline.document.rounding import Grid, Rounded
from pipeline.models import nf4

Quantizer = Callable[[Tensor, Tensor], Rounded]  # of W (O, I) and XᵀX (I, I) of its inputs


@dataclass(frozen=True)
class Precision:
    """`document`: its row in the document's table, or None; `calculator`: its name in `lora calc`."""

    name: str
    document: str | None
    calculator: str
    quantize: Quantizer


def precisions(group: int) -> list[Precision]:
    """From most to fewest bits. The document's INT4 is GPTQ and AWQ; rounding to nearest is added."""
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
    """The code (0 to 15) of each number: of NF4 in its blocks, of INT4 in groups of a row."""
    int4 = [Grid.of(part, 4).codes(part) for part in torch.split(weight, group, dim=1)]
    return {"NF4": nf4.quantize(weight).codes, "INT4 nearest": torch.cat(int4, dim=1)}


def entropy(codes: Tensor) -> float:
    """The Shannon entropy of the codes in bits; at most log2 of their number, if all are equally frequent."""
    counts = torch.bincount(codes.flatten().int())
    shares = counts[counts > 0].double() / codes.numel()
    return -float((shares * shares.log2()).sum())


def _nearest(bits: int, group: int) -> Quantizer:
    return lambda weight, _: rounding.nearest(weight, bits, group)


def _gptq(bits: int, group: int) -> Quantizer:
    return lambda weight, gram: rounding.gptq(weight, gram, bits, group)
