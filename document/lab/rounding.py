"""Reference implementations of the quantization methods of the document's §10.1.

Each takes W (O, I) and returns the dequantized weight Q (O, I) in fp32, with the bits per weight
including scales. Methods that are calibrated on inputs X (N, I) take their Gram matrix G = XᵀX (I,
I) and reduce the error of the output: ‖(W − Q)Xᵀ‖² = tr (W − Q)G(W − Q)ᵀ.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.calc.settings import NF4_BLOCK, NF4_BLOCK_2
from pipeline.export.into.gptq import RoundColumn
from pipeline.export.into.gptq import gptq as compensated
from pipeline.models import nf4

SCALE = 16  # bits of a group's scale
E4M3_LARGEST = 448.0
EXPONENTS = 21  # of AWQ's search: its authors' 20 steps from 0, and 1


class Rounded(NamedTuple):
    """The dequantized weight (O, I), and the bits per weight."""

    weight: Tensor
    bits: float


def as_dtype(weight: Tensor, dtype: torch.dtype) -> Rounded:
    """Round to the nearest number of a 16- or 32-bit dtype."""
    return Rounded(weight.to(dtype).float(), 8 * dtype.itemsize)


def tf32(weight: Tensor) -> Rounded:
    """Round to 10 of fp32's 23 mantissa bits, ties to even, as a tensor core does. It is stored as
    fp32.
    """
    bits = weight.float().contiguous().view(torch.int32)
    dropped = 13
    odd = (bits >> dropped) & 1
    return Rounded(
        ((bits + (1 << (dropped - 1)) - 1 + odd) >> dropped << dropped).view(torch.float32), 32
    )


def fp8(weight: Tensor) -> Rounded:
    """E4M3: 4 exponent and 3 mantissa bits, one fp32 scale per tensor that maps its largest
    magnitude to 448.
    """
    scale = _not_zero(weight.abs().max()) / E4M3_LARGEST
    return Rounded(
        (weight / scale).to(torch.float8_e4m3fn).float() * scale, 8 + 32 / weight.numel()
    )


def int8(weight: Tensor) -> Rounded:
    """Absmax scaling per row to ±127 (LLM.int8(), Dettmers et al. 2022, §2), without outlier
    decomposition.
    """
    scale = _not_zero(weight.abs().amax(1, keepdim=True)) / 127
    return Rounded((weight / scale).round() * scale, 8 + 32 / weight.shape[1])


def normal_float(weight: Tensor, double: bool = False) -> Rounded:
    """NF4 with scales in fp32, or in 8 bits (`double`): see nf4.py."""
    scales = (8 + 32 / NF4_BLOCK_2) / NF4_BLOCK if double else 32 / NF4_BLOCK
    return Rounded(nf4.dequantize(nf4.quantize(weight.float(), double=double)), 4 + scales)


def ternary(weight: Tensor) -> Rounded:
    """{-1, 0, 1} times the mean magnitude (BitNet b1.58, Ma et al. 2024, §2). Here without BitNet's
    training.
    """
    scale = _not_zero(weight.abs().mean())
    return Rounded(
        (weight / scale).round().clamp(-1, 1) * scale, math.log2(3) + 32 / weight.numel()
    )


class Grid(NamedTuple):
    """An asymmetric uniform grid of 2^bits levels per row of a group: scale·(code − zero), both (O,
    1).
    """

    scale: Tensor
    zero: Tensor
    max_code: int

    @classmethod
    def of(cls, group: Tensor, bits: int) -> "Grid":
        """The grid of a group (O, n), from its smallest to its largest weight. 0 is a level; scales
        are in fp16.
        """
        low, high = (
            group.amin(1, keepdim=True).clamp(max=0),
            group.amax(1, keepdim=True).clamp(min=0),
        )
        max_code = 2**bits - 1
        scale = _not_zero(((high - low) / max_code).half().float())
        return cls(scale, (-low / scale).round(), max_code)

    def codes(self, weight: Tensor) -> Tensor:
        """The code of each weight's nearest level, from 0 to 2^bits − 1."""
        return ((weight / self.scale).round() + self.zero).clamp(0, self.max_code)

    def nearest(self, weight: Tensor) -> Tensor:
        return (self.codes(weight) - self.zero) * self.scale


def grouped_bits(bits: int, group: int) -> float:
    """Bits per weight, including its share of the group's scale and zero point."""
    return bits + (SCALE + bits) / group


def nearest(weight: Tensor, bits: int, group: int) -> Rounded:
    """Round each weight to the nearest level of its group of `group` inputs (at most the row's
    length).
    """
    group = min(group, weight.shape[1])
    parts = [
        Grid.of(part, bits).nearest(part) for part in torch.split(weight.float(), group, dim=1)
    ]
    return Rounded(torch.cat(parts, dim=1), grouped_bits(bits, group))


def gptq(weight: Tensor, gram: Tensor, bits: int, group: int) -> Rounded:
    """GPTQ (Frantar et al. 2023, §3.3): round column by column; the columns still to come
    compensate the error.

    A group's grid is computed from its compensated weights when its first column is reached.
    """
    group = min(group, weight.shape[1])

    def rounding(part: Tensor) -> RoundColumn:
        grid = Grid.of(part.float(), bits)
        return lambda column, _: grid.nearest(column[:, None].float())[:, 0]

    rounded = compensated(weight.double(), gram, rounding, group).float()
    return Rounded(rounded, grouped_bits(bits, group))


def awq(weight: Tensor, gram: Tensor, bits: int, group: int) -> Rounded:
    """AWQ (Lin et al. 2024, §3.2): scale up the columns of large inputs before rounding, Q(W·s)/s
    with s = |x|ᵃ.

    The exponent a in [0, 1] is the one with the smallest output error. In a model 1/s is folded
    into the preceding layer, so it takes no bits.
    """
    magnitude = _not_zero(gram.diagonal().sqrt()).float()  # (I,)
    candidates = []
    for exponent in torch.linspace(0, 1, EXPONENTS):
        s = magnitude**exponent
        # as its authors' code: centered at 1, so that fp16 holds the groups' scales
        s = s / (s.max() * s.min()).sqrt()
        candidates.append(nearest(weight * s, bits, group).weight / s)
    best = min(candidates, key=lambda candidate: output_error(weight, candidate, gram))
    return Rounded(best, grouped_bits(bits, min(group, weight.shape[1])))


def output_error(weight: Tensor, rounded: Tensor, gram: Tensor) -> float:
    """‖(W − Q)Xᵀ‖²."""
    error = weight.double() - rounded.double()  # (O, I)
    return float(((error @ gram.double()) * error).sum())


def _not_zero(scale: Tensor) -> Tensor:
    """Replace zeros, the scales of all-zero weights, by 1 to avoid dividing by 0."""
    return torch.where(scale == 0, torch.ones_like(scale), scale)


class Precision(NamedTuple):
    """`document`: its row in the document's table, or None; `calculator`: its name in `lora
    calc`.
    """

    name: str
    document: str | None
    calculator: str
    quantize: Callable[[Tensor, Tensor], Rounded]  # of W (O, I) and XᵀX (I, I) of its inputs


def precisions(group: int) -> list[Precision]:
    """From most to fewest bits. The document's INT4 is GPTQ and AWQ; rounding to nearest is
    added.
    """
    return [
        Precision("FP32", "FP32", "fp32", lambda w, _: as_dtype(w, torch.float32)),
        Precision("TF32", "TF32", "tf32", lambda w, _: tf32(w)),
        Precision("FP16", "FP16", "fp16", lambda w, _: as_dtype(w, torch.float16)),
        Precision("BF16", "BF16", "bf16", lambda w, _: as_dtype(w, torch.bfloat16)),
        Precision("FP8 E4M3", "FP8 (E4M3)", "fp8", lambda w, _: fp8(w)),
        Precision("INT8", "INT8", "int8", lambda w, _: int8(w)),
        Precision("NF4", "NF4", "nf4", lambda w, _: normal_float(w)),
        Precision("NF4 double", None, "nf4-dq", lambda w, _: normal_float(w, double=True)),
        Precision("INT4 nearest", None, "gptq", lambda w, _: nearest(w, 4, group)),
        Precision("INT4 GPTQ", "INT4 (GPTQ)", "gptq", lambda w, gram: gptq(w, gram, 4, group)),
        Precision("INT4 AWQ", "INT4 (AWQ)", "awq", lambda w, gram: awq(w, gram, 4, group)),
        Precision("3-bit nearest", "3-bit", "3bit", lambda w, _: nearest(w, 3, group)),
        Precision("3-bit GPTQ", None, "3bit", lambda w, gram: gptq(w, gram, 3, group)),
        Precision("2-bit nearest", "2-bit", "2bit", lambda w, _: nearest(w, 2, group)),
        Precision("2-bit GPTQ", None, "2bit", lambda w, gram: gptq(w, gram, 2, group)),
        Precision("ternary", "1-bit (BitNet)", "1.58bit", lambda w, _: ternary(w)),
    ]


def four_bit_codes(weight: Tensor, group: int) -> dict[str, Tensor]:
    """The code (0 to 15) of each number: of NF4 in its blocks, of INT4 in groups of a row."""
    int4 = [Grid.of(part, 4).codes(part) for part in torch.split(weight, group, dim=1)]
    return {"NF4": nf4.quantize(weight).codes, "INT4 nearest": torch.cat(int4, dim=1)}


def entropy(codes: Tensor) -> float:
    """The Shannon entropy of the codes in bits; at most log2 of their number, if all are equally
    frequent.
    """
    counts = torch.bincount(codes.flatten().int())
    shares = counts[counts > 0].double() / codes.numel()
    return -float((shares * shares.log2()).sum())
