"""Which layers of a model a `target_modules` setting or an adapter's config matches."""

from collections.abc import Sequence

from torch import nn

from pipeline.adapters.config import AdapterSpec
from pipeline.calc.target_modules import ALL_LINEAR, HEAD, chosen, matches_suffix
from pipeline.errors import UserError
from pipeline.files.patterns import full_match
from pipeline.models.linears import is_linear
from pipeline.models.quantization.quantized_linear import QuantizedLinear


def resolve(model: nn.Module, wanted: Sequence[str]) -> list[str]:
    """Full names of the linears that `wanted` matches. Raises UserError if one of its names matches nothing."""
    linears = (name for name, module in model.named_modules() if adaptable(module))
    return chosen(linears, wanted, getattr(model, "head_name", HEAD))


def targeted(model: nn.Module, spec: AdapterSpec) -> list[str]:
    """Full names of the layers that get LoRA in PEFT: linears, and the embedding if it is named.

    Raises UserError if there are none, or if a name matches nothing.
    """
    embedding = getattr(model, "embedding_name", "")
    layers = [name for name, module in model.named_modules() if adaptable(module) or name == embedding]
    if isinstance(spec.targets, str) and spec.targets != ALL_LINEAR:
        matches = [name for name in layers if full_match(spec.targets, name, "target_modules")]
    else:
        wanted = (spec.targets,) if isinstance(spec.targets, str) else spec.targets
        if not any(matches_suffix(embedding, want) for want in wanted):  # groups such as all-linear leave it out
            layers = [name for name in layers if name != embedding]
        matches = chosen(layers, wanted, getattr(model, "head_name", HEAD))
    names = [name for name in matches if not spec.excludes(name)]
    if not names:
        raise UserError(
            f"target_modules: {spec.targets!r} matches no layer that is not excluded. "
            "Check exclude_modules and layers_to_transform."
        )
    return names


def adaptable(module: nn.Module) -> bool:
    """Whether LoRA can wrap it: a linear, quantized or not."""
    return is_linear(module) or isinstance(module, QuantizedLinear)
