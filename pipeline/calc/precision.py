"""Precisions of weights: every row of the document's §10.1, with the bytes of scales and zero points."""

import re
from dataclasses import dataclass
from functools import cache

from pipeline.errors import UserError


@dataclass(frozen=True)
class Precision:
    """`bytes` per weight, of which `scales` are for scales and zero points; activations have `compute` bytes.

    A 16- or 32-bit precision applies to every tensor, a quantized one only to the linears of the blocks; the rest
    (embeddings, head, norms, biases) has `rest` bytes.
    """

    name: str
    bits: float  # without scales, as in the document's table
    bytes: float
    scales: float
    compute: int

    @property
    def quantized(self) -> bool:
        return self.bits < 16

    @property
    def rest(self) -> int:
        """Bytes of a parameter that is not quantized."""
        return self.compute

    def weights(self, quantizable: int, total: int) -> int:
        """Bytes of a model with `total` parameters, `quantizable` of them in linears of its blocks."""
        return round(quantizable * self.bytes) + (total - quantizable) * self.rest


GROUP = 128  # weights per scale, the usual group size of GPTQ and AWQ checkpoints
NF4_BLOCK, NF4_BLOCK_2 = 64, 256  # QLoRA's blocks (Dettmers et al. 2023, §3)


def _quantized(name: str, bits: float, scales: float, packed: float | None = None) -> Precision:
    """Weights of `bits`, stored in `packed`, with so many bytes of scales each."""
    return Precision(name, bits, (packed or bits) / 8 + scales, scales, 2)


def _grouped(name: str, bits: int, group: int = GROUP) -> Precision:
    """A scale of 16 bit and a zero point of `bits` per group of weights."""
    return _quantized(name, bits, (2 + bits / 8) / group)


PRECISIONS: dict[str, Precision] = {
    p.name: p
    for p in (
        Precision("fp32", 32, 4, 0, 4),
        Precision("tf32", 32, 4, 0, 4),  # fp32 storage, 19-bit products on Ampere and later
        Precision("fp16", 16, 2, 0, 2),
        Precision("bf16", 16, 2, 0, 2),
        _quantized("fp8", 8, 0),  # E4M3, one scale per tensor
        _quantized("int8", 8, 4 / 4096),  # LLM.int8(): one fp32 scale per row, of 4,096 weights by assumption
        _quantized("nf4", 4, 4 / NF4_BLOCK),  # one fp32 scale per block
        # double quantization: scales of 8 bit, with an fp32 scale per block of them
        _quantized("nf4-dq", 4, 1 / NF4_BLOCK + 4 / (NF4_BLOCK * NF4_BLOCK_2)),
        *(_grouped(name, bits) for name, bits in (("gptq", 4), ("awq", 4), ("3bit", 3), ("2bit", 2))),
        _quantized("1.58bit", 1.58, 0, packed=1.6),  # BitNet b1.58: ternary, five weights per byte
    )
}


@cache
def precision(name: str) -> Precision:
    """The precision called `name`; `gptq-g64` has groups of 64. Raises UserError with the known names."""
    match = re.fullmatch(r"(gptq|awq|3bit|2bit)-g(\d{1,6})", name)
    if match and int(match[2]):
        return _grouped(name, int(PRECISIONS[match[1]].bits), int(match[2]))
    if name not in PRECISIONS:
        raise UserError(f"precision {name!r} is not known. Known: {', '.join(PRECISIONS)}; gptq-g64 has groups of 64.")
    return PRECISIONS[name]
