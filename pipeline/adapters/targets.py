"""Which linears of a model a `target_modules` setting means."""

from collections.abc import Sequence

from torch import nn

from pipeline.adapters.lora import transposed
from pipeline.targets import HEAD, chosen


def resolve(model: nn.Module, wanted: Sequence[str]) -> list[str]:
    """Full names of the linears that `wanted` means. Raises UserError if any of it matches nothing."""
    linears = (name for name, module in model.named_modules() if adaptable(module))
    return chosen(linears, wanted, getattr(model, "head_name", HEAD))


def adaptable(module: nn.Module) -> bool:
    """A linear, or GPT-2's."""
    return isinstance(module, nn.Linear) or transposed(module)
