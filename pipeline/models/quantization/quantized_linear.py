"""Frozen linears in 4 or 8 bits through bitsandbytes (QLoRA, Dettmers et al. 2023, §3; the document's §10.1)."""

import logging
import math
from functools import cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.calc.precision import NF4_BLOCK, NF4_BLOCK_2
from pipeline.errors import UserError
from pipeline.models.base import CausalLM
from pipeline.models.linears import is_linear, outputs_first
from pipeline.models.quantization import nf4

Quantization = Literal["int8", "nf4", "nf4-dq"]  # as the calculator calls them
DOUBLE = "nf4-dq"


class QuantizedLinear(nn.Module):
    """y = Wx + b. W (O, I) is kept in few bits and made anew, in x's precision, whenever it is used: no copy stays.

    LLM.int8's own products quantize x as well; here int8, like NF4, is a way to keep W, and x stays as it is.
    """

    def __init__(self, linear: nn.Module, kind: Quantization, device: torch.device) -> None:
        """W is quantized on `device`, and kept where it was."""
        super().__init__()
        weight = outputs_first(linear)
        self.kind, self.dtype = kind, weight.dtype
        self.bias: nn.Parameter | None = linear.bias  # type: ignore[assignment]
        self.out_features, self.in_features = weight.shape
        for name, tensor in packed(weight.to(device), kind).items():
            self.register_buffer(name, tensor.to(weight.device), persistent=False)

    @property
    def weight(self) -> Tensor:
        """(O, I), in the precision that the rest of the model has."""
        return self.weight_in(self.dtype)

    def weight_in(self, dtype: torch.dtype) -> Tensor:
        return unpacked(dict(self.named_buffers()), self.kind, (self.out_features, self.in_features), dtype)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = _Product.apply(x, self)  # type: ignore[no-untyped-call]
        return out


class _Product(torch.autograd.Function):
    """autograd would keep W between forward and backward; here backward makes it again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.weight_in(x.dtype), layer.bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ ctx.layer.weight_in(gradient.dtype), None


def packed(weight: Tensor, kind: Quantization) -> dict[str, Tensor]:
    """What is kept of a weight (O, I), by name. Raises UserError.

    Without bitsandbytes, nf4.py makes the same bytes, and a step on MiniGPT takes 1.7 × the time.
    """
    if kind == "int8":
        codes, scales, _ = _needed().int8_vectorwise_quant(weight.half())
        return {"codes": codes, "scales": scales}
    functional = _bitsandbytes()
    if functional is None:
        return _kept(nf4.quantize(weight, NF4_BLOCK, double=kind == DOUBLE))
    codes, state = functional.quantize_4bit(
        weight, blocksize=NF4_BLOCK, quant_type="nf4", compress_statistics=kind == DOUBLE
    )
    if kind != DOUBLE:
        return {"codes": codes, "scales": state.absmax}
    return {"codes": codes, "scales": state.absmax, "scales_of_scales": state.state2.absmax, "offset": state.offset}


def unpacked(kept: dict[str, Tensor], kind: Quantization, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The weight (O, I) that `kept` stands for."""
    scales: Tensor = kept["scales"]
    if kind == "int8":
        weight: Tensor = _needed().int8_vectorwise_dequant(kept["codes"], scales).to(dtype)
        return weight
    functional = _bitsandbytes()
    if functional is None:
        return nf4.dequantize(_quantized(kept, shape, dtype))
    if kind == DOUBLE:
        absmax = kept["scales_of_scales"]
        scales = functional.dequantize_blockwise(scales, absmax=absmax, blocksize=NF4_BLOCK_2) + kept["offset"]
    state = functional.QuantState(scales, _by_block(shape), blocksize=NF4_BLOCK, quant_type="nf4", dtype=dtype)
    weight = functional.dequantize_4bit(kept["codes"], state).view(shape)
    return weight  # noqa: RET504 (it gives a type to what the library gives none)


def _by_block(shape: tuple[int, int]) -> tuple[int, ...]:
    """A shape for as many weights in which no block goes over the end of a row.

    Where one does, bitsandbytes 0.50 takes other blocks' scales on CPUs with AVX-512: it counts I // block a row.
    """
    count = math.prod(shape)
    return (count,) if count % NF4_BLOCK else (count // NF4_BLOCK, NF4_BLOCK)


def _kept(weight: nf4.Quantized) -> dict[str, Tensor]:
    """As bitsandbytes names and lays it out."""
    codes = nf4.packed(weight.codes)[:, None]
    if isinstance(weight.scales, Tensor):
        return {"codes": codes, "scales": weight.scales}
    double = weight.scales
    return {"codes": codes, "scales": double.codes, "scales_of_scales": double.scales, "offset": double.offset}


def _quantized(kept: dict[str, Tensor], shape: tuple[int, int], dtype: torch.dtype) -> nf4.Quantized:
    """The other way round."""
    codes, scales = nf4.unpacked(kept["codes"].view(-1), math.prod(shape)), kept["scales"]
    double = nf4.Scales(scales, kept["scales_of_scales"], kept["offset"]) if "offset" in kept else scales
    return nf4.Quantized(codes, double, NF4_BLOCK, torch.Size(shape), dtype)


def dequantized(weight: Tensor, kind: Quantization, turned: bool = False) -> Tensor:
    """A weight (O, I), or (I, O) where it is `turned`, after a way to few bits and back."""
    upright = weight.T.contiguous() if turned else weight
    rows, columns = upright.shape
    found = unpacked(packed(upright, kind), kind, (rows, columns), weight.dtype)
    return found.T.contiguous() if turned else found


def quantizable(model: CausalLM) -> list[str]:
    """Full names of the linears that are kept in few bits: those of the blocks. Embeddings, head and norms stay."""
    inside = {id(module) for module in model.blocks.modules()}
    return [name for name, module in model.named_modules() if id(module) in inside and is_linear(module)]


def quantize(model: CausalLM, kind: Quantization, dtype: torch.dtype | None, device: torch.device) -> None:
    """Keep the linears of `model`'s blocks in few bits, in place; the rest in `dtype`, or as it is.

    What is quantized is the weights as they are stored, whatever `dtype` is: every use has the same. Raises UserError.
    """
    for name in quantizable(model):
        layer = QuantizedLinear(model.get_submodule(name), kind, device)
        layer.dtype = dtype or layer.dtype
        model.set_submodule(name, layer)
    for tensor in model.state_dict(keep_vars=True).values():  # all that is stored: MiniGPT's table of positions too
        tensor.data = tensor.data.to(dtype or tensor.dtype)


@cache
def _bitsandbytes() -> Any:
    """Its functions, or None where it is not installed."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of a kernel from the hub that is not needed
    try:
        import bitsandbytes.functional
    except ImportError:
        return None
    return bitsandbytes.functional


def _needed() -> Any:
    functional = _bitsandbytes()
    if functional is None:
        raise UserError(
            "A base in 8 bits needs bitsandbytes. Install it with `pip install 'lora-workbench[qlora]'`, or set "
            "quantization to nf4-dq, which goes without, or to none."
        )
    return functional
