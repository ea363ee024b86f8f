"""Which layers of a model a `target_modules` setting means, and which an adapter's config."""

from collections.abc import Sequence

from torch import nn

from pipeline.adapters.config import AdapterSpec
from pipeline.calc.target_modules import ALL_LINEAR, HEAD, matches_suffix, select_linears
from pipeline.errors import UserError
from pipeline.files.patterns import full_match
from pipeline.models.linears import is_linear
from pipeline.models.quantization.quantized_linear import QuantizedLinear


def resolve(model: nn.Module, wanted: Sequence[str]) -> list[str]:
    """Full names of the linears that `wanted` means. Raises UserError if any of it matches nothing."""
    linears = (name for name, module in model.named_modules() if adaptable(module))
    return select_linears(linears, wanted, getattr(model, "head_name", HEAD))


def targeted(model: nn.Module, spec: AdapterSpec) -> list[str]:
    """Full names of the layers to which PEFT gives LoRA by `spec`: linears, and the embedding where it is named.

    Raises UserError if there are none, or if a name matches nothing.
    """
    embedding = getattr(model, "embedding_name", "")
    layers = [name for name, module in model.named_modules() if adaptable(module) or name == embedding]
    if isinstance(spec.targets, str) and spec.targets != ALL_LINEAR:
        meant = [name for name in layers if full_match(spec.targets, name, "target_modules")]
    else:
        wanted = (spec.targets,) if isinstance(spec.targets, str) else spec.targets
        if not any(matches_suffix(embedding, want) for want in wanted):  # no group has it
            layers = [name for name in layers if name != embedding]
        meant = select_linears(layers, wanted, getattr(model, "head_name", HEAD))
    found = [name for name in meant if not spec.leaves_out(name)]
    if not found:
        raise UserError(f"target_modules: {spec.targets!r} leaves no layer to adapt.")
    return found


def adaptable(module: nn.Module) -> bool:
    """A linear, in however many bits."""
    return is_linear(module) or isinstance(module, QuantizedLinear)
