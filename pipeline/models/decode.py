"""Linears whose weights lie as one token's product wants them.

Generation multiplies each weight by a single row. As they are stored, a CPU reads weights for that at less than half
of the rate that its memory has.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PackedLinear(nn.Module):
    """y = Wx + b, W a copy in oneDNN's blocked layout. For inference: it has no gradient."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        self.weight, self.bias = linear.weight, linear.bias
        self.made_of = linear.weight.data_ptr(), linear.weight._version
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), 1)

    @property
    def current(self) -> bool:
        """Whether the weight is still the one that was packed."""
        return self.made_of == (self.weight.data_ptr(), self.weight._version)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        return out


_packed: WeakKeyDictionary[nn.Linear, PackedLinear] = WeakKeyDictionary()


@contextmanager
def packed_linears(model: nn.Module) -> Iterator[int]:
    """`model` with its bf16 linears on the CPU packed, and how many: none where torch cannot.

    A second copy of W, which is kept for the next time: it lives as long as the linear.
    """
    swapped: list[tuple[nn.Module, str, nn.Linear]] = []
    try:
        if _available():
            for parent, name, linear in list(_linears(model)):
                swapped.append((parent, name, linear))
                setattr(parent, name, _packed_of(linear))
        yield len(swapped)
    finally:
        for parent, name, linear in swapped:
            setattr(parent, name, linear)


def _linears(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    for parent in model.modules():
        for name, child in parent.named_children():
            if type(child) is nn.Linear and child.weight.dtype == torch.bfloat16 and child.weight.is_cpu:
                yield parent, name, child


def _packed_of(linear: nn.Linear) -> PackedLinear:
    known = _packed.get(linear)
    if known is None or known.weight is not linear.weight or not known.current:
        known = _packed[linear] = PackedLinear(linear)
    return known


@cache
def _available() -> bool:
    """Whether this build of torch packs weights and multiplies by them as by the plain ones."""
    linear = nn.Linear(32, 32, bias=False, dtype=torch.bfloat16)
    x = torch.ones(1, 32, dtype=torch.bfloat16)
    try:
        with torch.no_grad():
            return torch.allclose(PackedLinear(linear)(x), F.linear(x, linear.weight), 0.02, 0.02)
    except (AttributeError, NotImplementedError, RuntimeError):
        return False
