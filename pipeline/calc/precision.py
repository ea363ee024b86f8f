"""Precisions of weights: every row of the document's §10.1, with the bytes that scales and zero points add."""

import re
from dataclasses import dataclass, replace
from functools import cache

from pipeline.errors import UserError


@dataclass(frozen=True)
class Precision:
    """Bytes a quantized weight, of it `scales` for the blocks' scales; activations have `compute` bytes.

    A 16- or 32-bit precision holds every tensor; a quantized one the linears of the blocks, and the
    rest (embeddings, head, norms, biases) stays at `rest` bytes.
    """

    name: str
    bits: float  # of the code alone, the document's column
    bytes: float
    scales: float
    compute: int
    what: str

    @property
    def quantized(self) -> bool:
        return self.bits < 16

    @property
    def rest(self) -> int:
        """Bytes of a parameter that quantization leaves alone."""
        return self.compute

    def weights(self, quantizable: int, total: int) -> int:
        """Bytes of a model with `total` parameters, `quantizable` of them in linears of its blocks."""
        return round(quantizable * self.bytes) + (total - quantizable) * self.rest


def _plain(name: str, bits: float, width: int, what: str) -> Precision:
    return Precision(name, bits, width, 0, width, what)


def _coded(name: str, bits: float, scales: float, what: str, packed: float | None = None) -> Precision:
    return Precision(name, bits, (packed or bits) / 8 + scales, scales, 2, what)


GROUP = 128  # weights a scale, as GPTQ and AWQ checkpoints have it
NF4_BLOCK, NF4_BLOCK_2 = 64, 256  # QLoRA's blocks (Dettmers et al. 2023, §3)


def grouped(bits: int, group: int) -> float:
    """Bytes a weight for the scale (16 bit) and the zero point (`bits`) of each `group` weights."""
    return (2 + bits / 8) / group


PRECISIONS: dict[str, Precision] = {
    p.name: p
    for p in (
        _plain("fp32", 32, 4, "reference"),
        _plain("tf32", 32, 4, "fp32 storage, 19-bit products on Ampere and later"),
        _plain("fp16", 16, 2, "half precision"),
        _plain("bf16", 16, 2, "half precision with fp32's range"),
        _coded("fp8", 8, 0, "E4M3, one scale a tensor"),
        _coded("int8", 8, 4 / 4096, "LLM.int8(): one fp32 scale a row (4,096 weights assumed)"),
        _coded("nf4", 4, 4 / NF4_BLOCK, f"an fp32 scale each {NF4_BLOCK} weights"),
        _coded(
            "nf4-dq",
            4,
            1 / NF4_BLOCK + 4 / (NF4_BLOCK * NF4_BLOCK_2),
            "NF4, its scales quantized to 8 bit in turn (double quantization)",
        ),
        _coded("gptq", 4, grouped(4, GROUP), f"INT4, scale and zero point each {GROUP} weights"),
        _coded("awq", 4, grouped(4, GROUP), f"INT4, scale and zero point each {GROUP} weights"),
        _coded("3bit", 3, grouped(3, GROUP), f"scale and zero point each {GROUP} weights"),
        _coded("2bit", 2, grouped(2, GROUP), f"scale and zero point each {GROUP} weights"),
        _coded("1.58bit", 1.58, 0, "BitNet b1.58: ternary, five weights a byte", packed=1.6),
    )
}


@cache
def precision(name: str) -> Precision:
    """The precision called `name`; `gptq-g64` has groups of 64. Raises UserError listing those that are."""
    match = re.fullmatch(r"(gptq|awq|3bit|2bit)-g(\d{1,6})", name)
    if match and int(match[2]):
        known, group = PRECISIONS[match[1]], int(match[2])
        scales = grouped(int(known.bits), group)
        what = f"{known.bits:g} bit, scale and zero point each {group} weights"
        return replace(known, name=name, bytes=known.bits / 8 + scales, scales=scales, what=what)
    if name not in PRECISIONS:
        raise UserError(f"precision {name!r} is not known. Known: {', '.join(PRECISIONS)}; gptq-g64 has groups of 64.")
    return PRECISIONS[name]
