"""Ways to keep a weight in few bits, to be read: the rows of the document's §10.1.

Each takes W (O, I) and gives what is left of it, in fp32, with the bits that a weight then takes, its scales included.
Where inputs X (N, I) are known, by their Gram matrix G = XᵀX, the error that counts is that of the output:
‖(W − Q)Xᵀ‖² = tr (W − Q)G(W − Q)ᵀ.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.calc.precision import NF4_BLOCK, NF4_BLOCK_2
from pipeline.models.quantization import nf4

SCALE = 16  # bits of a group's scale
E4M3_LARGEST = 448.0
DAMPING = 0.01  # of G's mean diagonal, added to it (Frantar et al. 2023, §3.3)
EXPONENTS = 21  # of AWQ's search, from 0 to 1


class Rounded(NamedTuple):
    """What is left of a weight, and the bits a number of it takes."""

    weight: Tensor
    bits: float


def as_dtype(weight: Tensor, dtype: torch.dtype) -> Rounded:
    """Each number's nearest in a 16- or 32-bit precision."""
    return Rounded(weight.to(dtype).float(), 8 * dtype.itemsize)


def tf32(weight: Tensor) -> Rounded:
    """10 of fp32's 23 bits of fraction, nearest and ties to even: as a tensor core reads it. Stored it stays fp32."""
    bits = weight.float().contiguous().view(torch.int32)
    dropped = 13
    odd = (bits >> dropped) & 1
    return Rounded(((bits + (1 << (dropped - 1)) - 1 + odd) >> dropped << dropped).view(torch.float32), 32)


def fp8(weight: Tensor) -> Rounded:
    """E4M3, 4 bits of exponent and 3 of fraction, the largest weight at its end: one fp32 scale for all."""
    scale = _not_zero(weight.abs().max()) / E4M3_LARGEST
    return Rounded((weight / scale).to(torch.float8_e4m3fn).float() * scale, 8 + 32 / weight.numel())


def int8(weight: Tensor) -> Rounded:
    """±127 steps of each row's largest magnitude (LLM.int8(), Dettmers et al. 2022, §2), without its outliers."""
    scale = _not_zero(weight.abs().amax(1, keepdim=True)) / 127
    return Rounded((weight / scale).round() * scale, 8 + 32 / weight.shape[1])


def normal_float(weight: Tensor, double: bool = False) -> Rounded:
    """NF4, of scales in fp32 or, `double`, in 8 bits: see nf4.py."""
    scales = (8 + 32 / NF4_BLOCK_2) / NF4_BLOCK if double else 32 / NF4_BLOCK
    return Rounded(nf4.dequantize(nf4.quantize(weight.float(), double=double)), 4 + scales)


def ternary(weight: Tensor) -> Rounded:
    """-1, 0 and 1 times the mean magnitude (BitNet b1.58, Ma et al. 2024, §2): trained so there, here only rounded."""
    scale = _not_zero(weight.abs().mean())
    return Rounded((weight / scale).round().clamp(-1, 1) * scale, math.log2(3) + 32 / weight.numel())


class Grid(NamedTuple):
    """2^bits even steps for each row of a group: scale·(code − zero), (O, 1) each, from its least to its greatest
    weight."""

    scale: Tensor
    zero: Tensor
    most: int

    @classmethod
    def of(cls, group: Tensor, bits: int) -> "Grid":
        """Of a group (O, n); 0 is one of its steps, scales are kept in fp16."""
        low, high = group.amin(1, keepdim=True).clamp(max=0), group.amax(1, keepdim=True).clamp(min=0)
        most = 2**bits - 1
        scale = _not_zero(((high - low) / most).half().float())
        return cls(scale, (-low / scale).round(), most)

    def codes(self, weight: Tensor) -> Tensor:
        """Of each weight's nearest step, from 0 to 2^bits − 1."""
        return ((weight / self.scale).round() + self.zero).clamp(0, self.most)

    def nearest(self, weight: Tensor) -> Tensor:
        return (self.codes(weight) - self.zero) * self.scale


def grouped_bits(bits: int, group: int) -> float:
    """A weight's, with its share of a group's scale and zero."""
    return bits + (SCALE + bits) / group


def nearest(weight: Tensor, bits: int, group: int) -> Rounded:
    """Each weight's nearest step of its group of `group` inputs, or fewer where a row has fewer."""
    group = min(group, weight.shape[1])
    parts = [Grid.of(part, bits).nearest(part) for part in torch.split(weight.float(), group, dim=1)]
    return Rounded(torch.cat(parts, dim=1), grouped_bits(bits, group))


def gptq(weight: Tensor, gram: Tensor, bits: int, group: int) -> Rounded:
    """One input after the other: its weights are rounded, and those still to come make up for the error.

    With U from G⁻¹ = UᵀU, upper triangular, rounding column i by e changes the best of the rest by −e·Uᵢⱼ/Uᵢᵢ
    (Frantar et al. 2023, §3.3). A group's grid is that of its weights when the first of them is reached.
    """
    columns = weight.shape[1]
    group = min(group, columns)
    left, found = weight.double().clone(), torch.empty_like(weight, dtype=torch.float32)
    upper = _inverse_root(gram.double())
    for start in range(0, columns, group):
        grid = Grid.of(left[:, start : start + group].float(), bits)
        for column in range(start, min(start + group, columns)):
            rounded = grid.nearest(left[:, column : column + 1].float())
            found[:, column] = rounded[:, 0]
            error = (left[:, column] - rounded[:, 0]) / upper[column, column]
            left[:, column:] -= torch.outer(error, upper[column, column:])
    return Rounded(found, grouped_bits(bits, group))


def _inverse_root(gram: Tensor) -> Tensor:
    """Upper triangular U with UᵀU = (G + damping)⁻¹. Inputs that are never there stand for themselves alone."""
    diagonal = gram.diagonal().mean().clamp(min=1e-30) * DAMPING
    damped = gram + diagonal * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    upper: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return upper


def awq(weight: Tensor, gram: Tensor, bits: int, group: int) -> Rounded:
    """Inputs that are large are made larger before rounding, and smaller after it: Q(W·s)/s, s = (their size)ᵃ.

    Of exponents a from 0 to 1 that with the least error of the output (Lin et al. 2024, §3.2). In a model 1/s is a
    part of the layer before, so that it takes no bits.
    """
    size = _not_zero(gram.diagonal().sqrt()).float()
    tried = []
    for exponent in torch.linspace(0, 1, EXPONENTS):
        s = size**exponent
        s = s / (s.max() * s.min()).sqrt()
        tried.append(nearest(weight * s, bits, group).weight / s)
    best = min(tried, key=lambda found: output_error(weight, found, gram))
    return Rounded(best, grouped_bits(bits, min(group, weight.shape[1])))


def output_error(weight: Tensor, rounded: Tensor, gram: Tensor) -> float:
    """‖(W − Q)Xᵀ‖²."""
    off = weight.double() - rounded.double()
    return float(((off @ gram.double()) * off).sum())


def _not_zero(scale: Tensor) -> Tensor:
    """To divide by: 1 where all that is scaled is 0."""
    return torch.where(scale == 0, torch.ones_like(scale), scale)
