"""NF4 weights dequantized by one kernel. Codes of scales and weights would take three calls."""

from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from pipeline.calc.settings import NF4_BLOCK, NF4_BLOCK_2
from pipeline.models import nf4
from pipeline.models.kernels import random_tensors
from pipeline.project.probes import holds

COUNT = 1024  # weights of a program
AGREEMENT = 2**-8  # of the largest: a rounding to bf16


def dequantizes_nf4(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernel works on `device` for weights in `dtype`."""
    return device.type == "cuda" and _works(device, dtype)


def dequantize_nf4(
    quantized: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """The weight (O, I) of the tensors that `quantize_weight` returned for NF4."""
    from pipeline.models.kernels.accelerator.triton_kernels import dequantize_nf4 as kernel

    codes, scales = quantized["codes"], quantized["scales"]
    out = torch.empty(shape, dtype=dtype, device=codes.device)
    levels, scale_levels = (
        nf4.on_device(table, codes.device) for table in (nf4.levels, nf4.dynamic_levels)
    )
    double = "offset" in quantized
    # without double quantization nobody reads them
    of_scales = [quantized[name] if double else levels for name in ("scales_of_scales", "offset")]
    tables = levels, scale_levels, *of_scales
    grid = (-(-out.numel() // COUNT),)
    kernel[grid](codes, scales, *tables, out, out.numel(), NF4_BLOCK, NF4_BLOCK_2, double, COUNT)
    return out


@cache
def _works(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether it compiles there and gives nf4.py's numbers. Tried once."""
    tried, slower = (
        f"a kernel for NF4 weights in {dtype} on {device}",
        "three calls dequantize a weight",
    )

    def agrees() -> bool:
        weight = random_tensors((96, 128))[0]
        quantized = nf4.quantize(weight, double=True)
        scales = quantized.scales
        assert isinstance(scales, nf4.Scales)
        stored = {
            "codes": nf4.pack(quantized.codes),
            "scales": scales.codes,
            "scales_of_scales": scales.scales,
            "offset": scales.offset,
        }
        there = {name: tensor.to(device) for name, tensor in stored.items()}
        actual = dequantize_nf4(there, (96, 128), dtype).cpu().float()
        expected = nf4.dequantize(quantized)
        return bool((actual - expected).abs().max() <= AGREEMENT * expected.abs().max())

    return find_spec("triton") is not None and holds(tried, slower, agrees)
