"""Precisions of weights: every row of the document's §10.1, with the bytes of scales and zero points."""

import re
from dataclasses import dataclass, replace
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
    what: str

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


def _unquantized(name: str, bits: float, width: int, what: str) -> Precision:
    return Precision(name, bits, width, 0, width, what)


def _quantized(name: str, bits: float, scales: float, what: str, packed: float | None = None) -> Precision:
    return Precision(name, bits, (packed or bits) / 8 + scales, scales, 2, what)


GROUP = 128  # weights per scale, the usual group size of GPTQ and AWQ checkpoints
NF4_BLOCK, NF4_BLOCK_2 = 64, 256  # QLoRA's blocks (Dettmers et al. 2023, §3)


def group_overhead(bits: int, group: int) -> float:
    """Bytes per weight for the scale (16 bit) and zero point (`bits`) of a group of weights."""
    return (2 + bits / 8) / group


PRECISIONS: dict[str, Precision] = {
    p.name: p
    for p in (
        _unquantized("fp32", 32, 4, "reference"),
        _unquantized("tf32", 32, 4, "fp32 storage, 19-bit products on Ampere and later"),
        _unquantized("fp16", 16, 2, "half precision"),
        _unquantized("bf16", 16, 2, "half precision with fp32's range"),
        _quantized("fp8", 8, 0, "E4M3, one scale per tensor"),
        _quantized("int8", 8, 4 / 4096, "LLM.int8(): one fp32 scale per row (4,096 weights assumed)"),
        _quantized("nf4", 4, 4 / NF4_BLOCK, f"one fp32 scale per {NF4_BLOCK} weights"),
        _quantized(
            "nf4-dq",
            4,
            1 / NF4_BLOCK + 4 / (NF4_BLOCK * NF4_BLOCK_2),
            "NF4, its scales quantized to 8 bit (double quantization)",
        ),
        _quantized("gptq", 4, group_overhead(4, GROUP), f"INT4, scale and zero point per {GROUP} weights"),
        _quantized("awq", 4, group_overhead(4, GROUP), f"INT4, scale and zero point per {GROUP} weights"),
        _quantized("3bit", 3, group_overhead(3, GROUP), f"scale and zero point per {GROUP} weights"),
        _quantized("2bit", 2, group_overhead(2, GROUP), f"scale and zero point per {GROUP} weights"),
        _quantized("1.58bit", 1.58, 0, "BitNet b1.58: ternary, five weights per byte", packed=1.6),
    )
}


@cache
def precision(name: str) -> Precision:
    """The precision called `name`; `gptq-g64` has groups of 64. Raises UserError with the known names."""
    match = re.fullmatch(r"(gptq|awq|3bit|2bit)-g(\d{1,6})", name)
    if match and int(match[2]):
        preset, group = PRECISIONS[match[1]], int(match[2])
        scales = group_overhead(int(preset.bits), group)
        what = f"{preset.bits:g} bit, scale and zero point per {group} weights"
        return replace(preset, name=name, bytes=preset.bits / 8 + scales, scales=scales, what=what)
    if name not in PRECISIONS:
        raise UserError(f"precision {name!r} is not known. Known: {', '.join(PRECISIONS)}; gptq-g64 has groups of 64.")
    return PRECISIONS[name]
