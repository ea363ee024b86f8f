"""An adapter as a GGUF file for llama.cpp's --lora."""

from collections import Counter
from collections.abc import Mapping
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
    for name, (target, layout) in _targets(updates, model).items():
        update = updates[name]
        b = layout.rows(update.b.float()) * (update.scale * update.rank / alpha)  # (O, R)
        a = update.a.float()  # (R, I)
        # the embedding's A is stored as (V, R): llama.cpp looks up a token's row
        tensors[f"{target}.lora_a"] = a.T if target == EMBEDDING else a
        tensors[f"{target}.lora_b"] = b
    facts = {
        **metadata,
        "general.architecture": family_of(model.describe()).architecture,
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
    ratios = {}
    for name, (target, layout) in _targets(updates, model).items():
        a, b = stored[f"{target}.lora_a"], stored[f"{target}.lora_b"]
        if target == EMBEDDING:
            a = a.T
        written = LowRank(a, layout.undo(b), alpha / b.shape[1])
        norm = updates[name].squared_norm()
        ratios[name] = inner_product(written, updates[name]) / norm if norm else None
    return ratios


def _targets(updates: Updates, model: CausalLM) -> dict[str, tuple[str, Layout]]:
    """Full name of a module → its tensor in llama.cpp, and its layout without transposition."""
    config = model.describe()
    family = family_of(config)
    name_of = tensor_names(family.architecture, model.shape.layers)
    targets = {}
    for name in updates:
        if name.rpartition(".")[2] in family.without_lora:
            raise UserError(
                f"llama.cpp adds no update to {name}. Merge the adapter with --format gguf."
            )
        layout = family.layout(config, f"{name}.weight")
        targets[name] = name_of(f"{name}.weight"), layout._replace(transposed=False)
    return targets
