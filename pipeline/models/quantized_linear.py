"""Frozen linears in 4 or 8 bits, with bitsandbytes where installed (QLoRA).

Dettmers et al. 2023, arXiv 2305.14314, section 3.
"""

import logging
import math
from functools import cache
from importlib import import_module
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.calc.settings import NF4_BLOCK, NF4_BLOCK_2
from pipeline.errors import UserError, install_command
from pipeline.models import nf4
from pipeline.models.base import CausalLM, LowBitLinear, is_conv1d, is_linear
from pipeline.models.kernels import native
from pipeline.models.kernels.native import LANES, Q8_BLOCK

Quantization = Literal["int8", "nf4", "nf4-dq"]  # the calculator's names
DOUBLE = "nf4-dq"


class QuantizedLinear(LowBitLinear):
    """y = Wx + b, with W (O, I) dequantized in x's precision for each use and not kept.

    LLM.int8's own products also quantize x; here int8, like NF4, only stores W, and x keeps its
    precision.
    """

    def __init__(self, linear: nn.Module, kind: Quantization, device: torch.device) -> None:
        """Quantizes W on `device`; the result stays on W's own."""
        super().__init__()
        assert isinstance(linear.weight, Tensor)
        weight = linear.weight.detach()
        weight = weight.T.contiguous() if is_conv1d(linear) else weight  # (O, I)
        self.kind, self.dtype = kind, weight.dtype
        self.bias = linear.bias  # type: ignore[assignment]
        self.out_features, self.in_features = weight.shape
        for name, tensor in quantize_weight(weight.to(device), kind).items():
            self.register_buffer(name, tensor.to(weight.device), persistent=False)

    def weight_in(self, dtype: torch.dtype) -> Tensor:
        shape = self.out_features, self.in_features
        return dequantize_weight(self._stored(), self.kind, shape, dtype)

    def _stored(self) -> dict[str, Tensor]:
        """W as `quantize_weight` returned it: buffers, or parameters where they are sharded."""
        return dict(self.named_buffers()) | dict(self.named_parameters())

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda and self.kind != "int8" and _bitsandbytes() is not None:
            return self.product_4bit(x)
        out: Tensor = _QuantizedProduct.apply(x, self)  # type: ignore[no-untyped-call]
        return out

    def product_4bit(self, x: Tensor) -> Tensor:
        """Wx + b by bitsandbytes, which multiplies few rows by W as it is stored.

        Its backward, like ours, keeps only the codes and dequantizes them again.
        """
        library: Any = import_module("bitsandbytes")
        functional, tensors = library.functional, self._stored()
        scales, offset, scales_of_scales = tensors["scales"], None, None
        if self.kind == DOUBLE:
            # without `code` it would copy its table to the device in every product
            code = nf4.on_device(functional.create_dynamic_map, x.device)
            largest, offset = tensors["scales_of_scales"], tensors["offset"]
            scales_of_scales = functional.QuantState(
                largest, code=code, blocksize=NF4_BLOCK_2, dtype=torch.float32
            )
        state = functional.QuantState(
            scales,
            torch.Size((self.out_features, self.in_features)),
            blocksize=NF4_BLOCK,
            quant_type="nf4",
            dtype=x.dtype,
            offset=offset,
            state2=scales_of_scales,
        )
        out: Tensor = library.matmul_4bit(x, tensors["codes"], state, bias=self.bias)
        return out


class Q8Linear(LowBitLinear):
    """y = Wx + b for inference on a CPU, W (O, I) in llama.cpp's q8_0: int8, a scale for 32 weights.

    native.c multiplies the codes by x in 16 bits, with a scale for 32 of its numbers too; their
    sums are exact. Where it does not run, all of W is dequantized for each use.
    """

    codes: Tensor  # (O / 16, I / 4, 16, 4) uint8, each 128 higher
    scales: Tensor  # (O / 16, I / 32, 16)

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        self.bias, self.dtype = linear.bias, torch.bfloat16
        blocks = (
            linear.weight.detach().float().view(-1, LANES, self.in_features // Q8_BLOCK, Q8_BLOCK)
        )
        scales = (blocks.abs().amax(-1) / 127).half().float()  # as llama.cpp keeps them
        codes = (blocks / scales.clamp_min(2**-24)[..., None]).round_().clamp_(-127, 127) + 128
        by_fours = codes.to(torch.uint8).view(len(codes), LANES, -1, 4)
        self.register_buffer("codes", by_fours.transpose(1, 2).contiguous(), persistent=False)
        self.register_buffer("scales", scales.mT.contiguous(), persistent=False)

    @property
    def q8_0(self) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return self.codes, self.scales

    @staticmethod
    def takes(linear: nn.Module) -> bool:
        """Whether it is a plain linear whose sizes are multiples of 16 outputs and 32 inputs."""
        if type(linear) is not nn.Linear:
            return False
        return not (linear.out_features % LANES or linear.in_features % Q8_BLOCK)

    def weight_in(self, dtype: torch.dtype) -> Tensor:
        codes = self.codes.transpose(1, 2).float() - 128  # (O / 16, 16, I / 4, 4)
        blocks = codes.reshape(len(codes), LANES, -1, Q8_BLOCK) * self.scales.mT[..., None]
        return blocks.view(self.out_features, self.in_features).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        if not native.supports(x, lanes=Q8_BLOCK) or not x.numel():
            return F.linear(x, self.weight_in(x.dtype), self.bias)
        return native.linear_forward(x, self.out_features, self.bias, None, *self.q8_0)


class _QuantizedProduct(torch.autograd.Function):
    """autograd would keep W between forward and backward; here backward dequantizes it again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.weight_in(x.dtype), layer.bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ ctx.layer.weight_in(gradient.dtype), None


def quantize_weight(weight: Tensor, kind: Quantization) -> dict[str, Tensor]:
    """The quantized form of a weight (O, I): tensors by name, as bitsandbytes stores them.

    Raises UserError.

    Without bitsandbytes, nf4.py gives the same bytes; a step on MiniGPT then takes 1.7 × the time.
    """
    if kind == "int8":
        codes, scales, _ = _require_bitsandbytes().int8_vectorwise_quant(weight.half())
        return {"codes": codes, "scales": scales}
    functional = _bitsandbytes()
    if functional is None:
        ours = nf4.quantize(weight, NF4_BLOCK, double=kind == DOUBLE)
        codes, scales = nf4.pack(ours.codes)[:, None], ours.scales  # (N / 2, 1)
        if isinstance(scales, Tensor):
            return {"codes": codes, "scales": scales}
        double = {"scales_of_scales": scales.scales, "offset": scales.offset}
        return {"codes": codes, "scales": scales.codes, **double}
    codes, state = functional.quantize_4bit(
        weight, blocksize=NF4_BLOCK, quant_type="nf4", compress_statistics=kind == DOUBLE
    )
    stored = {"codes": codes, "scales": state.absmax}
    if kind == DOUBLE:
        stored |= {"scales_of_scales": state.state2.absmax, "offset": state.offset}
    return stored


def dequantize_weight(
    quantized: dict[str, Tensor], kind: Quantization, shape: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """The weight (O, I) of the tensors that `quantize_weight` returned."""
    codes, scales = quantized["codes"], quantized["scales"]
    if kind == "int8":
        weight: Tensor = _require_bitsandbytes().int8_vectorwise_dequant(codes, scales).to(dtype)
        return weight
    if codes.is_cuda:
        # a run on a CPU does not load it
        from pipeline.models.kernels.accelerator.weights import dequantize_nf4, dequantizes_nf4

        if dequantizes_nf4(codes.device, dtype):
            return dequantize_nf4(quantized, shape, dtype)
    count, functional = math.prod(shape), _bitsandbytes()
    if functional is None:
        unpacked = nf4.unpack(codes.view(-1), count)  # (N,)
        stored: Tensor | nf4.Scales = scales
        if kind == DOUBLE:
            stored = nf4.Scales(scales, quantized["scales_of_scales"], quantized["offset"])
        return nf4.dequantize(nf4.Quantized(unpacked, stored, NF4_BLOCK, torch.Size(shape), dtype))
    if kind == DOUBLE:
        largest = quantized["scales_of_scales"]
        code = nf4.on_device(functional.create_dynamic_map, scales.device)
        scales = functional.dequantize_blockwise(
            scales, absmax=largest, code=code, blocksize=NF4_BLOCK_2
        )
        scales = scales + quantized["offset"]
    state = functional.QuantState(
        scales, rows_of_blocks(count, NF4_BLOCK), blocksize=NF4_BLOCK, quant_type="nf4", dtype=dtype
    )
    weight = functional.dequantize_4bit(codes, state).view(shape)
    return weight  # noqa: RET504 (the library's function has no types)


def rows_of_blocks(count: int, block: int) -> torch.Size:
    """The shape to dequantize `count` numbers in: no block crosses the end of a row.

    Otherwise bitsandbytes 0.50 uses wrong blocks' scales on CPUs with AVX-512, as it counts I //
    block blocks per row.
    """
    return torch.Size((1, count) if count % block else (count // block, block))


def dequantized(weight: Tensor, kind: Quantization, transposed: bool = False) -> Tensor:
    """A weight (O, I), or (I, O) if `transposed`, after quantizing and dequantizing."""
    out_in = weight.T.contiguous() if transposed else weight
    rows, columns = out_in.shape
    result = dequantize_weight(quantize_weight(out_in, kind), kind, (rows, columns), weight.dtype)
    return result.T.contiguous() if transposed else result


def quantizable(model: CausalLM) -> list[str]:
    """Full names of the blocks' linears, which are quantized.

    Embeddings, head and norms keep their precision.
    """
    inside = {*model.blocks.modules()}
    return [
        name for name, module in model.named_modules() if module in inside and is_linear(module)
    ]


def quantize(
    model: CausalLM, kind: Quantization, dtype: torch.dtype | None, device: torch.device
) -> None:
    """Quantize the linears of `model`'s blocks in place; cast the rest to `dtype`, if one is given.

    The stored weights are quantized, not those in `dtype`, so that every use gets the same. Raises
    UserError.
    """
    if device.type == "cuda" and kind != "int8" and _bitsandbytes() is None:
        from pipeline.models.kernels.accelerator.weights import dequantizes_nf4

        if not dequantizes_nf4(device, dtype or torch.float16):  # every GPU has it
            nf4.tell_cost()
    for name in quantizable(model):
        layer = QuantizedLinear(model.get_submodule(name), kind, device)
        layer.dtype = dtype or layer.dtype
        model.set_submodule(name, layer)
    for tensor in model.state_dict(keep_vars=True).values():  # MiniGPT's table of positions too
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype or tensor.dtype)


@cache
def _bitsandbytes() -> Any:
    """bitsandbytes.functional, or None if it is not installed."""
    # it warns about an optional kernel from the hub
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        import bitsandbytes.functional
    except ImportError:
        return None
    return bitsandbytes.functional


def require_bitsandbytes(what: str, other: str = "") -> Any:
    """bitsandbytes.functional. Raises UserError where it is not installed.

    `other`: another way out, if there is one.
    """
    functional = _bitsandbytes()
    if functional is None:
        raise UserError(f"{what} needs bitsandbytes. Run `{install_command('qlora')}`{other}.")
    return functional


def _require_bitsandbytes() -> Any:
    return require_bitsandbytes(
        "quantization int8", ", or set quantization to nf4-dq, which does not need it, or to none"
    )
