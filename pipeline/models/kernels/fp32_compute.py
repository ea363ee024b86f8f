"""A 16-bit model computing in fp32, to tell rounding from a different computation."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def compute_in_fp32(model: nn.Module) -> Iterator[None]:
    """Inside the block each part of `model` is in fp32 while it runs, and only then, so that little memory is added.

    In 16 bits, two correct computations of the same logits differ by up to a tenth of the largest.
    """
    parameters_of = {module: _parameters_read(module) for module in model.modules()}
    narrow = {p: p.dtype for parameters in parameters_of.values() for p in parameters if p.dtype.itemsize == 2}

    def before(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        for p in parameters_of[module]:
            p.data = p.data.float()
        return tuple(x.float() if isinstance(x, Tensor) and x.dtype.itemsize == 2 else x for x in inputs)

    def after(module: nn.Module, *_: object) -> None:
        for p in parameters_of[module]:
            p.data = p.data.to(narrow.get(p, p.dtype))

    changed = [module for module, parameters in parameters_of.items() if any(p in narrow for p in parameters)]
    hooks = [module.register_forward_pre_hook(before) for module in changed]
    hooks += [module.register_forward_hook(after, always_call=True) for module in changed]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _parameters_read(module: nn.Module) -> list[nn.Parameter]:
    """The parameters that its forward may read: its own, and its leaf children's, whose forward may never run."""
    parts = [module, *(child for child in module.children() if not [*child.children()])]
    return [p for part in parts for p in part.parameters(recurse=False)]
