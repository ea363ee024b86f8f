"""Scale all that an adapter changes."""

import torch
from torch import Tensor

from pipeline.adapters.attach import PREFIX, adapter_layers, tensors
from pipeline.adapters.config import AdapterSpec
from pipeline.adapters.dora import DoRALinear
from pipeline.adapters.lora import MAGNITUDE, ROWS
from pipeline.models.base import CausalLM

LORA = (".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B", MAGNITUDE)


class AdapterScale:
    """W + s·(W′ − W) for every W that an adapter changed in `model`; s = 1 gives the adapter's own bits.

    LoRA's update is linear in its scale; DoRA's is not, so it has a separate strength. Weights trained in full or row
    by row are interpolated from `base` for each s: no tensor is written to.
    """

    def __init__(self, model: CausalLM, base: CausalLM, spec: AdapterSpec) -> None:
        self._lora = [(layer, layer.scale) for _, layer in adapter_layers(model)]
        self._trained = [
            (parameter, _base_values(key, base, spec), parameter.data)
            for key, parameter in tensors(model, spec).items()
            if not key.endswith(LORA)
        ]

    def set(self, s: float) -> None:
        for layer, scale in self._lora:
            if isinstance(layer, DoRALinear):
                layer.strength = s
            else:
                layer.scale = s * scale
        for parameter, before, after in self._trained:
            parameter.data = after if s == 1 else torch.lerp(before, after, s)


def _base_values(key: str, base: CausalLM, spec: AdapterSpec) -> Tensor:
    """The base's values of the adapter's tensor `key`: a full weight, or some of its rows."""
    name, rows, _ = key.removeprefix(PREFIX).partition(ROWS)
    if not rows:
        return base.get_parameter(name).data
    return base.get_parameter(f"{name}.weight").data[list(spec.rows[name.rsplit(".", 1)[-1]])]
