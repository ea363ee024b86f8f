"""A device that rounds otherwise: results of products in bf16 move by one unit in the last place.

What moves follows from the shape of the result, as on a GPU, where another number of rows has
another kernel: the same product gives the same numbers, and a sequence gives others beside another
than alone. It shows whether what is compared is compared as it must be there. It does not show how
far a real GPU goes, nor anything of its kernels.
"""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default}
SHARE = 0.1  # of the places


class OtherRounding(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside the block products round so."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func not in PRODUCTS or out.dtype != torch.bfloat16:
            return out
        generator = torch.Generator().manual_seed(hash(tuple(out.shape)) % 2**31)
        moved = torch.rand(out.shape, generator=generator) < SHARE
        unit = torch.randint(0, 2, out.shape, generator=generator, dtype=torch.int16) * 2 - 1
        return torch.where(moved, (out.view(torch.int16) + unit).view(torch.bfloat16), out)
