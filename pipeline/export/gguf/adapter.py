"""An adapter as a GGUF file for llama.cpp's --lora."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor

from pipeline.adapters.low_rank import LowRank
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

    llama.cpp multiplies each by alpha/R with one alpha and its own rank R, so an update with
    another scale has the difference in its B. Raises UserError if llama.cpp does not compute such a
    model.
    """
    # an alpha of 0 would mean a scale of 1
    alphas = Counter(alpha for update in updates.values() if (alpha := update.scale * update.rank))
    alpha = alphas.most_common(1)[0][0] if alphas else 1.0
    tensors: dict[str, Tensor] = {}
    for name, (target, layout) in _targets(updates, model).items():
        update = updates[name]
        b = layout.rows(update.b.float()) * (update.scale * update.rank / alpha)  # (O, R)
        # llama.cpp looks a token's row of A up, in its layout (V, R)
        tensors[f"{target}.lora_a"] = (
            update.a.float().T if target == EMBEDDING else update.a.float()
        )
        tensors[f"{target}.lora_b"] = b
    facts = {
        **metadata,
        "general.architecture": family_of(model.describe()).architecture,
        "general.type": "adapter",
        "general.file_type": file_type("f32"),
        "adapter.type": "lora",
        ALPHA: float(alpha),
    }
    output = Output(
        path, facts, [(name, tuple(tensor.shape), Type.F32) for name, tensor in tensors.items()]
    )
    try:
        output.begin()
        for name, tensor in tensors.items():
            output.write(name, tensor.contiguous().numpy())
            output.end(name)
    finally:
        output.close()


def adapter_ratios(path: Path, updates: Updates, model: CausalLM) -> dict[str, float | None]:
    """⟨Δ', Δ⟩ / ⟨Δ, Δ⟩ of each update Δ and the Δ' that llama.cpp computes from the file; None if Δ
    is 0.
    """
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
        ratios[name] = _dot(written, updates[name]) / norm if norm else None
    return ratios


def _targets(updates: Updates, model: CausalLM) -> dict[str, tuple[str, Layout]]:
    """Full name of a module → its tensor in llama.cpp, and that tensor's layout without a
    transposition.
    """
    config = model.describe()
    family = family_of(config)
    names = tensor_names(family.architecture, model.shape.layers)
    return {
        name: (
            names(f"{name}.weight"),
            family.layout(config, f"{name}.weight")._replace(transposed=False),
        )
        for name in updates
    }


def _dot(one: LowRank, other: LowRank) -> float:
    """⟨s·BA, s'·B'A'⟩, without the (O, I) products."""
    b, a = one.b.double().T @ other.b.double(), one.a.double() @ other.a.double().T  # (R, R') each
    return one.scale * other.scale * float((b * a).sum())
