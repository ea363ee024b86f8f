"""Checkpoints and adapters as files: merged, and with other numbers."""

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.adapters.config import AdapterSpec
from pipeline.weights.merge import write
from pipeline.weights.merge_check import update_ratios, written_matrices
from pipeline.weights.merge_plan import plan_merge
from tests.helpers.checkpoints import adapter


def random_matrix(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def load_weights(folder: Path) -> dict[str, Any]:
    return {
        name: value
        for file in folder.glob("*.safetensors")
        for name, value in load_file(file).items()
    }


def merged_through_files(base: Path, adapter: Path, out: Path) -> dict[str, Any]:
    out.mkdir()
    plan = plan_merge(base, adapter)
    assert list(write(plan, out))
    for ratio in update_ratios(plan, written_matrices(out)).values():
        assert ratio.value is None or abs(ratio.value - 1) <= 1e-3 + ratio.rounding
    return load_weights(out)


def tuned_from(
    base: Path, out: Path, rank: int, linears: bool = True, vectors: bool = False
) -> Path:
    """A copy of a checkpoint whose matrices got an update of that rank; vectors, where asked, got
    another.
    """
    shutil.copytree(base, out)
    for file in out.glob("*.safetensors"):
        weights = load_file(file)
        for seed, (name, weight) in enumerate(sorted(weights.items())):
            is_end = "embed_tokens" in name or "lm_head" in name or "wte" in name
            if (
                weight.ndim == 2
                and (linears or is_end)
                and "positions" not in name
                and "wpe" not in name
            ):
                step = (
                    random_matrix(weight.shape[0], rank, seed)
                    @ random_matrix(rank, weight.shape[1], seed + 99)
                    / 20
                )
                weights[name] = (weight.float() + step).to(weight.dtype)
            elif weight.ndim == 1 and vectors:
                weights[name] = (
                    weight + random_matrix(1, len(weight), seed)[0].to(weight.dtype) / 20
                )
        save_file(weights, file, metadata={"format": "pt"})
    return out


def strong(folder: Path, base: Path, spec: AdapterSpec) -> Path:
    """An adapter whose updates are as large as the weights."""
    made = adapter(folder, base, spec)
    file = made / "adapter_model.safetensors"
    weights = {
        key: tensor * (4 if ".lora_" in key else 1) for key, tensor in load_file(file).items()
    }
    save_file(weights, file, metadata={"format": "pt"})
    return made
