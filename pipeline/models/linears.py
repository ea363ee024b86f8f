"""Linear layers: torch's, and GPT-2's Conv1D, which stores its weight transposed."""

from torch import Tensor, nn


def is_conv1d(module: nn.Module) -> bool:
    """GPT-2's linear, whose weight is (I, O)."""
    return type(module).__name__ == "Conv1D"


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or is_conv1d(module)


def outputs_first(linear: nn.Module) -> Tensor:
    """A linear's weight as (O, I)."""
    weight = linear.weight
    assert isinstance(weight, Tensor)
    return weight.detach().T.contiguous() if is_conv1d(linear) else weight.detach()
