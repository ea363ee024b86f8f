"""Products of a mixture's experts, all at once, for which the host reads nothing.

`F.grouped_mm` has a kernel for bf16 on Hopper and datacenter Blackwell alone. Elsewhere it reads on
every call how many rows each expert has, and waits for the device to know. There, a Triton kernel
takes its place, which needs no memory besides its result. What it saves was not measured: no GPU
has been at hand (docs/decisions/0025).
"""

from contextlib import nullcontext
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.models.kernels import random_tensors
from pipeline.project.probes import holds

AGREEMENT = 0.02  # relative
# Sizes of the tile that a program computes at once: outputs, and rows if an expert has as many on
# average.
TILE = 64
# Terms of a sum that it loads at once, by the bytes of a number: 48 KiB of shared memory in three
# stages.
INNER = {2: 64, 4: 32}


def has_kernel_of_torch(x: Tensor) -> bool:
    """Whether `F.grouped_mm` of such rows reads nothing."""
    if x.dtype != torch.bfloat16 or not hasattr(F, "grouped_mm"):
        return False
    if x.is_cuda and torch.version.hip is None:
        return torch.cuda.get_device_capability(x.device)[0] in (9, 10)
    return x.is_meta


def runs_grouped_product(x: Tensor) -> bool:
    """Whether `grouped_product` has a kernel for such rows."""
    if has_kernel_of_torch(x) or x.is_meta:
        return True
    is_recent = x.is_cuda and torch.cuda.get_device_capability(x.device) >= (8, 0)
    return is_recent and find_spec("triton") is not None and _works(x.device, x.dtype)


def grouped_product(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """(n, O): each row of x (n, I) times its expert's Wₑᵀ, of W (E, O, I).

    The rows stand by expert: those of expert e end before row `ends[e]`.
    """
    if has_kernel_of_torch(x):
        out: Tensor = F.grouped_mm(x, weight.mT, offs=ends)
        return out
    product: Tensor = _product(x, weight, ends)
    return product


@torch.library.custom_op("lora_workbench::grouped_product", mutates_args=())
def _product(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    E, O, I = weight.shape  # noqa: E741 (the letters of the shapes)
    out = x.new_empty(len(x), O)
    rows = TILE if len(x) >= TILE * E else 16
    columns, inner = _tile(O, TILE), _tile(I, INNER[x.element_size()])
    grid = (-(-O // columns), E)
    _launch("product", grid, x, weight, ends, out, (O, I, rows, columns, inner))
    return out


@_product.register_fake
def _(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:  # noqa: ARG001
    return x.new_empty(len(x), weight.shape[1])


@torch.library.custom_op("lora_workbench::grouped_outer_product", mutates_args=())
def _outer_product(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    """(E, O, I): of each expert's rows of `left` (n, O) and `right` (n, I), LᵀR."""
    O, I, E = left.shape[1], right.shape[1], len(ends)  # noqa: E741
    out = left.new_empty(E, O, I)
    columns, inner = _tile(O, TILE), _tile(I, TILE)
    grid = (-(-O // columns) * -(-I // inner), E)
    _launch("outer_product", grid, left, right, ends, out, (O, I, 32, columns, inner))
    return out


@_outer_product.register_fake
def _(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    return left.new_empty(len(ends), left.shape[1], right.shape[1])


def _launch(
    kernel: str,
    grid: tuple[int, int],
    first: Tensor,
    second: Tensor,
    ends: Tensor,
    out: Tensor,
    sizes: tuple[int, int, int, int, int],
) -> None:
    """Run a kernel of triton_kernels.py; `sizes`: O, I, and its ROWS, COLUMNS and INNER."""
    O, I, *tiles = sizes  # noqa: E741
    allows_tf32 = first.is_cuda and torch.backends.cuda.matmul.allow_tf32
    precision = "tf32" if allows_tf32 else "ieee"
    strides = (*first.stride(), *second.stride())
    with torch.cuda.device(first.device) if first.is_cuda else nullcontext():
        launch = getattr(kernels(), kernel)[grid]
        launch(first, second, ends, out, O, I, *strides, *tiles, precision)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:  # noqa: ARG001
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x, weight, ends = ctx.saved_tensors
    needs_x, needs_weight, _ = ctx.needs_input_grad
    return (
        _product(grad, weight.mT, ends) if needs_x else None,
        _outer_product(grad, x, ends) if needs_weight else None,
        None,
    )


_product.register_autograd(_backward, setup_context=_save)


def _tile(size: int, most: int) -> int:
    """The power of two that holds `size`, from 16, the least of a tensor core, to `most`."""
    return max(16, min(most, 1 << (size - 1).bit_length()))


@cache
def _works(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels compile there and agree with plain products. Tried once."""
    tried = f"a kernel for all experts in {dtype} on {device}"
    slower = "they are computed one by one"

    def agrees() -> bool:
        drawn = random_tensors((70, 40), (3, 24, 40))
        x, weight = (tensor.to(device, dtype) for tensor in drawn)
        ends = torch.tensor([5, 5, 70], dtype=torch.int32, device=device)
        first, last = x[:5], x[5:]  # rows of experts 0 and 2; expert 1 has none
        product = torch.cat([first @ weight[0].T, last @ weight[2].T])
        outer = torch.stack([first.T @ first, x.new_zeros(40, 40), last.T @ last])
        pairs = ((_product(x, weight, ends), product), (_outer_product(x, x, ends), outer))
        errors = [(ours - plain.float()).norm() / plain.float().norm() for ours, plain in pairs]
        return bool((torch.stack(errors) <= AGREEMENT).all())

    return holds(tried, slower, agrees)


@cache
def kernels() -> Any:
    """The Triton kernels; Triton comes with torch for GPUs."""
    from pipeline.models.experts import triton_kernels

    return triton_kernels
