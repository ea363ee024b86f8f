"""A 16-bit model computing in fp32: what was rounded is told from what is computed otherwise."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def exact(model: nn.Module) -> Iterator[None]:
    """Each part of `model` in fp32 while it runs, and no longer, so that it needs little more memory.

    In 16 bits, two right ways to compute end a tenth of the largest logit apart.
    """
    own = {module: _read(module) for module in model.modules()}
    narrow = {p: p.dtype for parameters in own.values() for p in parameters if p.dtype.itemsize == 2}

    def before(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        for p in own[module]:
            p.data = p.data.float()
        return tuple(x.float() if isinstance(x, Tensor) and x.dtype.itemsize == 2 else x for x in inputs)

    def after(module: nn.Module, *_: object) -> None:
        for p in own[module]:
            p.data = p.data.to(narrow.get(p, p.dtype))

    changed = [module for module, parameters in own.items() if any(p in narrow for p in parameters)]
    hooks = [module.register_forward_pre_hook(before) for module in changed]
    hooks += [module.register_forward_hook(after, always_call=True) for module in changed]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _read(module: nn.Module) -> list[nn.Parameter]:
    """What its forward may read: its own, and those of parts that are whole in themselves and may never be called."""
    parts = [module, *(child for child in module.children() if not [*child.children()])]
    return [p for part in parts for p in part.parameters(recurse=False)]
