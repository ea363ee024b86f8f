"""NF4, the 4-bit NormalFloat, with double quantization, in plain torch (QLoRA).

Dettmers et al. 2023, arXiv 2305.14314, section 3 and appendix E.

A block of weights is its scale, the largest magnitude, times levels at equally spaced quantiles of
a normal distribution. Codes, scales and weights equal those of bitsandbytes 0.50 on an x86 CPU to
the last bit; comments say where that needs an odd step. W (O, I) has N = O·I numbers in M = ceil(N
/ block) blocks; the last may be short.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.calc.settings import NF4_BLOCK, NF4_BLOCK_2
from pipeline.errors import install_command
from pipeline.project.probes import record

# the outermost probability: the mean of 1 - 1/32 and 1 - 1/30, half a step of 16 and of 15
OFFSET = 0.9677083
# grid points on [-1, 1] to which a number is rounded before its 8-bit level is looked up
STEPS = 2**16
SMALLEST = 1e-38  # the smallest scale to divide by


@dataclass(frozen=True)
class Scales:
    """M scales in 8 bits (double quantization): level[code] · block's scale + offset."""

    codes: Tensor  # (M,) uint8
    scales: Tensor  # (ceil(M / 256),) fp32
    offset: Tensor  # () fp32, the scales' mean


@dataclass(frozen=True)
class Quantized:
    """A weight in 4 bits: level[code] · block's scale."""

    codes: Tensor  # (N,) uint8 from 0 to 15, unpacked
    scales: Tensor | Scales  # (M,) fp32
    block: int
    shape: torch.Size
    dtype: torch.dtype


def levels() -> Tensor:
    """(16,) fp32, ascending: 0 and quantiles of N(0, 1), divided by the largest.

    There are 7 quantiles below 0 and 8 above, at equal steps of the probability. Each step is
    rounded to fp32, as in the published table: exact steps change last bits.
    """
    both = torch.cat([-_quantiles(7), torch.zeros(1), _quantiles(8)]).sort().values
    return both / both.max()


_tables: dict[tuple[Callable[[], Tensor], torch.device], Tensor] = {}


def on_device(table: Callable[[], Tensor], device: torch.device) -> Tensor:
    """A table of this file on `device`, copied there once: a GPU would wait for each copy."""
    key = (table, device)
    if key not in _tables:
        there = table().to(device)
        if type(there) is not Tensor:  # a fake tensor is of no use outside its mode
            return there
        _tables[key] = there
    return _tables[key]


def _quantiles(count: int) -> Tensor:
    """(count,) fp32: at probabilities from OFFSET down to one step above 1/2."""
    quantiles: Tensor = torch.special.ndtri(torch.linspace(OFFSET, 0.5, count + 1)[:-1].double())
    return quantiles.float()


def dynamic_levels(signed: bool = True) -> Tensor:
    """(256,) fp32, ascending: 0, 1 and ± fraction · 10^e for e from -6 to 0.

    There are 2^(e + 6) fractions for each e. Without `signed` there are twice as many, and none of
    the numbers is below 0.

    A smaller exponent leaves fewer bits for the fraction (the dynamic tree of Dettmers et al. 2022,
    sections 1.3 and 2). The fractions are the midpoints of equal intervals of [0.1, 1]; there is no
    -1.
    """
    parts = [torch.tensor([0.0, 1.0])]
    for exponent in range(-6, 1):
        edges = torch.linspace(0.1, 1, 2 ** (exponent + 6 + (not signed)) + 1)
        midpoints = 10.0**exponent * ((edges[:-1] + edges[1:]) / 2)
        parts += [midpoints, -midpoints] if signed else [midpoints]
    return torch.cat(parts).sort().values


def quantize(weight: Tensor, block: int = NF4_BLOCK, double: bool = False) -> Quantized:
    """Divide each block by its largest magnitude and round each weight to the nearest level.

    Full blocks are multiplied by the reciprocal, a short last block is divided, as in bitsandbytes:
    the last bits of the quotient differ, and rarely a code.
    """
    flat = weight.detach().reshape(-1).float()
    blocks = _in_blocks(flat, block)  # (M, block)
    scales = blocks.abs().amax(1)  # (M,)
    scaled = blocks * (1 / scales.clamp(min=SMALLEST))[:, None]
    if flat.numel() % block:
        scales[-1] = scales[-1].clamp(min=SMALLEST)
        scaled[-1] = blocks[-1] / scales[-1]
    codes = nearest(scaled.clamp(-1, 1), levels()).reshape(-1)[: flat.numel()]
    stored = quantize_scales(scales) if double else scales
    return Quantized(codes, stored, block, weight.shape, weight.dtype)


def dequantize(weight: Quantized) -> Tensor:
    """The weight in its shape and dtype: products in fp32, rounded once."""
    scales = weight.scales
    if isinstance(scales, Scales):
        scales = dequantize_scales(scales)
    numbers = _multiply_blocks(_look_up(levels, weight.codes), scales, weight.block)
    return numbers.reshape(weight.shape).to(weight.dtype)


def quantize_scales(scales: Tensor) -> Scales:
    """M scales minus their mean, in 8 bits."""
    offset = scales.mean()
    return Scales(*quantize_dynamic(scales - offset), offset)


def quantize_dynamic(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (M,) of M numbers in `dynamic_levels`, uint8, with the scale of each block.

    The scale of a block of 256 numbers is its largest magnitude. A number is rounded to one of
    STEPS grid points on [-1, 1], then to the level nearest to that. No grid point is 0 or near the
    smallest levels: 0 becomes 2.1e-5. A block of zeros gets code 0, and stays 0.
    """
    blocks = _in_blocks(x, NF4_BLOCK_2)
    largest = blocks.abs().amax(1)
    scaled = (blocks * (1 / largest)[:, None]).nan_to_num(nan=-1).clamp(-1, 1)  # 0 · (1 / 0) is NaN
    # exact, then rounded once, like a fused multiply-add
    step = ((scaled + 1) * 0.5).double() * (STEPS - 1) + 0.5
    grid = torch.arange(STEPS, device=x.device) * 2.0 / (STEPS - 1) - 1
    codes = nearest(grid, dynamic_levels())[step.float().int()]
    return codes.reshape(-1)[: x.numel()], largest


def dequantize_scales(scales: Scales) -> Tensor:
    """(M,) fp32."""
    numbers = _look_up(dynamic_levels, scales.codes)
    return _multiply_blocks(numbers, scales.scales, NF4_BLOCK_2) + scales.offset


def nearest(x: Tensor, levels: Tensor) -> Tensor:
    """Index of the level nearest to each number, uint8; the lower of two equally near."""
    middles = ((levels[:-1] + levels[1:]) / 2).to(x.device)
    return torch.bucketize(x, middles, out_int32=True).to(torch.uint8)


def pack(codes: Tensor) -> Tensor:
    """(ceil(N / 2),) bytes of two codes, the first in the upper four bits.

    An odd N is padded with the code of 0.
    """
    zero = int(nearest(torch.zeros(1), levels()))
    pairs = F.pad(codes, (0, codes.numel() % 2), value=zero).view(-1, 2)
    return pairs[:, 0] << 4 | pairs[:, 1]


def unpack(data: Tensor, count: int) -> Tensor:
    """The first `count` codes of packed bytes."""
    return torch.stack([data >> 4, data & 15], 1).reshape(-1)[:count]


def _in_blocks(flat: Tensor, block: int) -> Tensor:
    """(N,) → (M, block), padded with zeros."""
    return F.pad(flat, (0, -flat.numel() % block)).view(-1, block)


def _look_up(levels: Callable[[], Tensor], codes: Tensor) -> Tensor:
    """The codes' levels; `index_select` takes a fifth of the time of `levels[codes]`."""
    return on_device(levels, codes.device).index_select(0, codes.int())


def _multiply_blocks(numbers: Tensor, scales: Tensor, block: int) -> Tensor:
    """(N,): each number times its block's scale."""
    return (_in_blocks(numbers, block) * scales[:, None]).reshape(-1)[: numbers.numel()]


def tell_cost() -> None:
    """Record what NF4 costs on a GPU without bitsandbytes."""
    record(
        "bitsandbytes, for NF4",
        "it is not installed",
        "plain torch dequantizes each weight for every product: a step on MiniGPT takes 1.7 × the "
        f"time on a CPU, which was not measured on a GPU. Run `{install_command('qlora')}`",
    )
