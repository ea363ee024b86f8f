"""The codes of llama.cpp's quantized blocks: read, and replaced where their scales stay.

A number is offset + scale·code in each of these types. Where its code's bits lie in the block is a
table here; scale and offset are what the gguf package makes of the codes 0 and 1.
"""

from typing import NamedTuple

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor

from pipeline.export.into.gptq import round_for_inputs


class Bits(NamedTuple):
    """Some bits of the codes (n,) of a block."""

    byte: Tensor  # (n,) in which they lie
    shift: Tensor  # (n,) of them in that byte
    width: int
    place: int = 0  # of the lowest in the code


class Coding(NamedTuple):
    """How a type stores codes; no byte with bits of a code holds anything else."""

    bits: tuple[Bits, ...]
    flip: int = 0  # bits that are stored inverted, which makes two's complement ascend
    lowest: int = 0  # llama.cpp negates int8, which has no 128

    @property
    def highest(self) -> int:
        return int(2 ** sum(bits.width for bits in self.bits)) - 1


_32, _256 = torch.arange(32), torch.arange(256)  # the numbers of a block
CODINGS = {
    Type.Q8_0: Coding((Bits(2 + _32, 0 * _32, 8),), flip=0x80, lowest=1),
    Type.Q5_0: Coding((Bits(6 + _32 % 16, 4 * (_32 // 16), 4), Bits(2 + _32 // 8, _32 % 8, 1, 4))),
    Type.Q4_K: Coding((Bits(16 + 32 * (_256 // 64) + _256 % 32, 4 * (_256 // 32 % 2), 4),)),
    Type.Q6_K: Coding(
        (
            Bits(64 * (_256 // 128) + _256 % 64, 4 * (_256 // 64 % 2), 4),
            Bits(128 + 32 * (_256 // 128) + _256 % 32, 2 * (_256 // 32 % 4), 2, 4),
        )
    ),
}


def codes_of(data: Tensor, kind: Type) -> Tensor:
    """(O, I) uint8: the codes of rows of blocks, (O, bytes) uint8."""
    coding, blocks = CODINGS[kind], _blocks(data, kind)
    codes = torch.zeros_like(blocks[..., coding.bits[0].byte])
    for bits in coding.bits:
        codes |= (blocks[..., bits.byte] >> bits.shift.byte() & 2**bits.width - 1) << bits.place
    return (codes ^ coding.flip).flatten(1)


def with_codes(data: Tensor, kind: Type, codes: Tensor) -> Tensor:
    """The blocks `data` with other codes (O, I)."""
    coding, blocks = CODINGS[kind], _blocks(data, kind).clone()
    stored = codes.to(torch.uint8).view(*blocks.shape[:2], -1) ^ coding.flip
    for bits in coding.bits:
        blocks[..., bits.byte] = 0
    for bits in coding.bits:
        part = (stored >> bits.place & 2**bits.width - 1) << bits.shift.byte()
        blocks.index_add_(2, bits.byte, part)  # no two share a bit: a sum is their union
    return blocks.flatten(1)


def values_of(data: Tensor, kind: Type) -> Tensor:
    """(O, I) in fp32: what the blocks stand for."""
    return torch.from_numpy(np.array(gguf.quants.dequantize(data.numpy(), kind)))


def rounded_for_inputs(data: Tensor, kind: Type, weight: Tensor, gram: Tensor) -> Tensor:
    """The blocks `data` with the codes that GPTQ chooses for W (O, I) and G (I, I)."""
    coding = CODINGS[kind]
    zeros = torch.zeros_like(codes_of(data, kind))
    offset = values_of(with_codes(data, kind, zeros), kind)  # (O, I)
    scale = values_of(with_codes(data, kind, zeros + 1), kind) - offset
    step = torch.where(scale == 0, 1, scale)  # all codes of a block without a scale are alike

    def codes(values: Tensor, n: int | slice = slice(None)) -> Tensor:
        nearest = ((values - offset[:, n]) / step[:, n]).round_()
        return nearest.clamp_(coding.lowest, coding.highest)

    def round_column(column: Tensor, n: int) -> Tensor:
        return offset[:, n] + scale[:, n] * codes(column, n)

    rounded = round_for_inputs(weight, gram, round_column)
    return with_codes(data, kind, codes(rounded))


def _blocks(data: Tensor, kind: Type) -> Tensor:
    """(O, bytes) → (O, blocks, bytes of a block)."""
    return data.view(len(data), -1, gguf.GGML_QUANT_SIZES[kind][1])
