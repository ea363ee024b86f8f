"""Which linears of a model a `target_modules` setting means."""

from collections.abc import Sequence

from torch import nn

from pipeline.targets import chosen


def resolve(model: nn.Module, wanted: Sequence[str]) -> list[str]:
    """Full names of the linears that `wanted` means. Raises UserError if any of it matches nothing."""
    return chosen((name for name, module in model.named_modules() if isinstance(module, nn.Linear)), wanted)
