"""NF4, the 4-bit NormalFloat, with double quantization, to be read (QLoRA, Dettmers et al. 2023, §3 and appendix E).

A block of weights is its largest magnitude, the scale, times levels at equal steps of a normal distribution. Codes,
scales and weights are those of bitsandbytes 0.50 on an x86 CPU, to the last bit; what that takes is said where it is
odd. W (O, I) is N = O·I numbers in a row; there are M = ceil(N / block) blocks, of which the last may be short.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.calc.precision import NF4_BLOCK, NF4_BLOCK_2

OFFSET = 0.9677083  # the outermost probability: the mean of 1 - 1/32 and 1 - 1/30, half a step of 16 and of 15
STEPS = 2**16  # on [-1, 1], to which a number is rounded before its 8-bit level is looked up
SMALLEST = 1e-38  # a scale to divide by, at the least


@dataclass(frozen=True)
class Scales:
    """M scales in 8 bits, in blocks of 256 (double quantization): level[code] · scale of the block + offset."""

    codes: Tensor  # (M,) uint8
    scales: Tensor  # (ceil(M / 256),) fp32
    offset: Tensor  # () fp32, the scales' mean


@dataclass(frozen=True)
class Quantized:
    """A weight in 4 bits: level[code] · scale of the block."""

    codes: Tensor  # (N,) uint8 from 0 to 15, not packed
    scales: Tensor | Scales  # (M,) fp32
    block: int
    shape: torch.Size
    dtype: torch.dtype


def levels() -> Tensor:
    """(16,) fp32, ascending: 0, 7 quantiles of N(0, 1) below and 8 above at equal steps, divided by the largest.

    Each step is rounded to fp32, as it was when the published table was made: from exact ones, last bits differ.
    """
    both = torch.cat([-_quantiles(7), torch.zeros(1), _quantiles(8)]).sort().values
    return both / both.max()


def _quantiles(count: int) -> Tensor:
    """(count,) fp32: at probabilities from OFFSET down to one step above 1/2."""
    found: Tensor = torch.special.ndtri(torch.linspace(OFFSET, 0.5, count + 1)[:-1].double())
    return found.float()


def dynamic_levels() -> Tensor:
    """(256,) fp32, ascending: a sign, a decimal exponent e from -6 to 0, and 2^(e + 6) fractions; 0 and 1 besides.

    The more digits the exponent takes, the fewer are left for the fraction (Dettmers et al. 2022, §1.3 and §2: the
    dynamic tree). The fractions are the middles of equal intervals of [0.1, 1]; -1 is missing.
    """
    found = [torch.tensor([0.0, 1.0])]
    for exponent in range(-6, 1):
        edges = torch.linspace(0.1, 1, 2 ** (exponent + 6) + 1)
        middles = 10.0**exponent * ((edges[:-1] + edges[1:]) / 2)
        found += [middles, -middles]
    return torch.cat(found).sort().values


def quantize(weight: Tensor, block: int = NF4_BLOCK, double: bool = False) -> Quantized:
    """Each weight's nearest level, once its block is divided by its largest magnitude.

    A whole block is multiplied by that magnitude's reciprocal, a short last one is divided by it: last bits of the
    quotient differ, and with them, rarely, a code.
    """
    flat = weight.detach().reshape(-1).float()
    blocks = _in_blocks(flat, block)  # (M, block)
    scales = blocks.abs().amax(1)  # (M,)
    scaled = blocks * (1 / scales.clamp(min=SMALLEST))[:, None]
    if flat.numel() % block:
        scales[-1] = scales[-1].clamp(min=SMALLEST)
        scaled[-1] = blocks[-1] / scales[-1]
    codes = nearest(scaled.clamp(-1, 1), levels()).reshape(-1)[: flat.numel()]
    return Quantized(codes, quantize_scales(scales) if double else scales, block, weight.shape, weight.dtype)


def dequantize(weight: Quantized) -> Tensor:
    """The weight, of its shape and dtype: products in fp32, rounded once."""
    scales = weight.scales if isinstance(weight.scales, Tensor) else dequantize_scales(weight.scales)
    return _scaled(_at(levels(), weight.codes), scales, weight.block).reshape(weight.shape).to(weight.dtype)


def quantize_scales(scales: Tensor) -> Scales:
    """M scales less their mean, in 8 bits."""
    offset = scales.mean()
    return Scales(*dynamic(scales - offset), offset)


def dynamic(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (M,) in `dynamic_levels`, uint8, of M numbers, and the largest magnitude of each block of 256.

    The level is the nearest to the nearest of STEPS steps on [-1, 1]. No step is 0, nor near enough for the map's
    smallest levels: what is 0 gets 2.1e-5. A block that is 0 throughout gets code 0, and stays 0.
    """
    blocks = _in_blocks(x, NF4_BLOCK_2)
    largest = blocks.abs().amax(1)
    scaled = (blocks * (1 / largest)[:, None]).nan_to_num(nan=-1).clamp(-1, 1)  # 0 · (1 / 0) is no number
    step = ((scaled + 1) * 0.5).double() * (STEPS - 1) + 0.5  # exact, then rounded once, as a fused product and sum is
    grid = torch.arange(STEPS, device=x.device) * 2.0 / (STEPS - 1) - 1
    codes = nearest(grid, dynamic_levels())[step.float().int()]
    return codes.reshape(-1)[: x.numel()], largest


def dequantize_scales(scales: Scales) -> Tensor:
    """(M,) fp32."""
    return _scaled(_at(dynamic_levels(), scales.codes), scales.scales, NF4_BLOCK_2) + scales.offset


def nearest(x: Tensor, levels: Tensor) -> Tensor:
    """Index of the level that is nearest to each number, uint8; of two as near, the lower."""
    return torch.bucketize(x, ((levels[:-1] + levels[1:]) / 2).to(x.device), out_int32=True).to(torch.uint8)


def packed(codes: Tensor) -> Tensor:
    """(ceil(N / 2),) bytes, the first of two codes in the upper four bits; an odd one is followed by the code of 0."""
    pairs = F.pad(codes, (0, codes.numel() % 2), value=int(nearest(torch.zeros(1), levels()))).view(-1, 2)
    return pairs[:, 0] << 4 | pairs[:, 1]


def unpacked(data: Tensor, count: int) -> Tensor:
    """The `count` codes that were packed."""
    return torch.stack([data >> 4, data & 15], 1).reshape(-1)[:count]


def _in_blocks(flat: Tensor, block: int) -> Tensor:
    """(M, block), zeros at the end."""
    return F.pad(flat, (0, -flat.numel() % block)).view(-1, block)


def _at(levels: Tensor, codes: Tensor) -> Tensor:
    """The codes' levels; `index_select` takes a fifth of the time of `levels[codes]`."""
    return levels.to(codes.device).index_select(0, codes.int())


def _scaled(found: Tensor, scales: Tensor, block: int) -> Tensor:
    """Each level times its block's scale."""
    return (_in_blocks(found, block) * scales[:, None]).reshape(-1)[: found.numel()]
