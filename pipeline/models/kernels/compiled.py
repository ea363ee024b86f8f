"""`torch.compile` of a model's blocks, one by one.

Equal blocks share their code, so that two of them compile, not all.

Attention is left out, where the lengths of packed sequences decide what is computed: it would be
compiled again for each batch. Sizes are symbols from the first step on, so that a batch of other
lengths, and a run that is resumed, use the same code. Modules and their names stay as they are.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch.utils.checkpoint import checkpoint

from pipeline.models.base import CausalLM
from pipeline.models.kernels import packed_attention

VARIANTS = 64  # of a block's code: with or without gradients, one row or several, packed or not


class Lengths(Sequence[int]):
    """Lengths of packed sequences that the compiler does not specialize its code on."""

    def __init__(self, values: Sequence[int]) -> None:
        self._values = tuple(values)

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        return self._values[index]


def compile_blocks(model: CausalLM) -> None:
    """Make the model's blocks compile where they are called, recomputation included."""
    torch._dynamo.config.recompile_limit = VARIANTS
    packed_attention.register(torch.compiler.disable(packed_attention.attend))  # type: ignore[no-untyped-call]
    for block in model.blocks:
        block.compile(dynamic=True)
        if block.gradient_checkpointing:
            # transformers recomputes inside the block: the compiler follows a recomputation whole
            # or not at all, and stops at the attention, so that nothing would be compiled
            block.gradient_checkpointing = False  # type: ignore[assignment]
            block._compiled_call_impl = partial(
                checkpoint, block._compiled_call_impl, use_reentrant=False
            )
    model.wrap_lengths = Lengths


def seconds_compiling() -> float:
    """Seconds that this process has spent compiling so far."""
    from torch._dynamo.utils import calculate_time_spent

    return float(calculate_time_spent().get("total_wall_time", 0.0))
