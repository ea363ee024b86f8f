"""An adapter as a GGUF file for llama.cpp's --lora."""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor

from pipeline.adapters.low_rank import LowRank, inner_product
from pipeline.errors import UserError
from pipeline.export.gguf.families import Layout, family_of
from pipeline.export.gguf.writer import Output, file_type, tensor_names
from pipeline.models.base import CausalLM
from pipeline.weights.combine import Updates

EMBEDDING = "token_embd.weight"
ALPHA = "adapter.lora.alpha"


def write_adapter(
    path: Path, updates: Updates, model: CausalLM, metadata: Mapping[str, Any]
) -> None:
    """Write the updates of `model` in fp32.

    llama.cpp multiplies each update by alpha/R, with one alpha for all and the update's rank R. So
    B of an update with another scale holds the factor between the two. Raises UserError if
    llama.cpp does not compute such a model.
    """
    # llama.cpp takes an alpha of 0 as a scale of 1
    alphas = Counter(update.scale * update.rank for update in updates.values() if update.scale)
    alpha = alphas.most_common(1)[0][0] if alphas else 1.0
    tensors: dict[str, Tensor] = {}
    for name, target, layout in _targets(updates, model):
        update = updates[name]
        # (O, R), of experts (E, O, R)
        b = layout.rows(update.b.float()) * (update.scale * update.rank / alpha)
        a = layout.inputs(update.a.float())  # (R, I), of experts (E, R, I)
        # the embedding's A is stored as (V, R): llama.cpp looks up a token's row
        tensors[f"{target}.lora_a"] = a.T if target == EMBEDDING else a
        tensors[f"{target}.lora_b"] = b
    config = model.describe()
    facts = {
        **metadata,
        "general.architecture": family_of(config).architecture(config),
        "general.type": "adapter",
        "general.file_type": file_type("f32"),
        "adapter.type": "lora",
        ALPHA: float(alpha),
    }
    shapes = [(name, tuple(tensor.shape), Type.F32) for name, tensor in tensors.items()]
    with closing(Output(path, facts, shapes)) as output:
        output.begin()
        for name, tensor in tensors.items():
            output.write(name, tensor)


def adapter_ratios(path: Path, updates: Updates, model: CausalLM) -> dict[str, float | None]:
    """⟨Δ', Δ⟩ / ⟨Δ, Δ⟩ of each update Δ and llama.cpp's Δ' from the file; None if Δ is 0."""
    reader = gguf.GGUFReader(path)
    alpha = float(reader.fields[ALPHA].contents())
    stored = {tensor.name: torch.from_numpy(np.array(tensor.data)) for tensor in reader.tensors}
    products = dict.fromkeys(updates, 0.0)
    for name, target, layout in _targets(updates, model):
        update = updates[name]
        a, b = stored[f"{target}.lora_a"], stored[f"{target}.lora_b"]
        if target == EMBEDDING:
            a = a.T
        # of the rest of the rows, another tensor has B
        A, B = torch.zeros(update.a.shape), torch.zeros(update.b.shape)
        layout._replace(order=None).restore(a, A)
        layout._replace(columns=None).restore(b, B)
        products[name] += inner_product(LowRank(A, B, alpha / b.shape[-1]), update)
    norms = {name: update.squared_norm() for name, update in updates.items()}
    return {name: products[name] / norm if norm else None for name, norm in norms.items()}


def _targets(updates: Updates, model: CausalLM) -> Iterator[tuple[str, str, Layout]]:
    """Name of an update, its tensor in llama.cpp, and the layout without transposition.

    A tensor each if llama.cpp splits the parameter.
    """
    config = model.describe()
    family = family_of(config)
    name_of = tensor_names(family.architecture(config), model.shape.layers)
    modules = dict(model.named_modules())
    for name in updates:
        if name.endswith(family.without_lora):
            raise UserError(
                f"llama.cpp ignores an update of {name}, or adds a multiple of it. Merge the "
                "adapter with --format gguf."
            )
        parameter = f"{name}.weight" if name in modules else name
        for target, layout in family.layouts(config, parameter).items():
            yield name, name_of(target), layout._replace(transposed=False)
