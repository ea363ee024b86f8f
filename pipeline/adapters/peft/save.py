"""Save an adapter in PEFT's format."""

from pathlib import Path

from pipeline.adapters.attach import PREFIX, adapter_layers, tensors
from pipeline.adapters.config import CONFIG, WEIGHTS, AdapterSpec
from pipeline.adapters.lora import LoRALinear
from pipeline.adapters.peft.config import config_of
from pipeline.files import artifact
from pipeline.models.base import CausalLM, is_conv1d
from pipeline.models.save import save_tensors


def save_adapter(folder: Path, model: CausalLM, spec: AdapterSpec, base_name: str) -> None:
    """adapter_config.json and adapter_model.safetensors."""
    layers = dict(adapter_layers(model))
    pairs = {
        f"{PREFIX}{name}.lora_{letter}.weight": factor
        for name, layer in layers.items()
        if isinstance(layer, LoRALinear)
        for letter, factor in zip("AB", layer.pair(), strict=True)
    }
    save_tensors(folder / WEIGHTS, {**tensors(model, spec), **pairs})
    conv1d = any(is_conv1d(layer.base) for layer in layers.values())
    artifact.write_json(folder / CONFIG, config_of(stored_spec(model, spec), base_name, conv1d))


def stored_spec(model: CausalLM, spec: AdapterSpec) -> AdapterSpec:
    """The spec of the saved files for an adapter trained with `spec`: PiSSA's BA − B₀A₀ has rank 2R."""
    pissa = any(isinstance(layer, LoRALinear) and layer.subtracts_initial for _, layer in adapter_layers(model))
    return spec.doubled() if pissa else spec
