"""A kind of adapter that the package does not know, in one file: here learned vectors that scale
keys and values.
"""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipeline.adapters.attach import disable_adapter
from pipeline.adapters.config import OTHER_KINDS, PREFIX
from pipeline.adapters.lora import AdapterLayer
from pipeline.adapters.peft import load_adapter
from pipeline.errors import UserError
from pipeline.models.base import CausalLM
from pipeline.models.load import load_base
from pipeline.project.params.sections import Training
from pipeline.stages.methods.lora import FinetuneLora
from pipeline.training.batches import Batches
from pipeline.training.retention import RetentionLoss
from tests.helpers.json_files import write_json
from tests.helpers.real import listed, toy, trained, windows_of

NAMES = ("k_proj", "v_proj")
LENGTHS = (6, 6, 4, 9)


class ScaledLinear(AdapterLayer):
    """y = l · (Wx + b) with a trained vector l (O,), 1 at first."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base)
        self.vector = nn.Parameter(base.weight.new_ones(base.out_features))

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        return {".ia3_l": self.vector}

    def adapted(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x) * self.vector
        return out


def attach_vectors(model: CausalLM) -> None:
    model.requires_grad_(False)
    for name, module in list(model.named_modules()):
        if name.endswith(NAMES) and isinstance(module, nn.Linear):
            model.set_submodule(name, ScaledLinear(module))


def layers(model: CausalLM) -> dict[str, AdapterLayer]:
    return {
        name: module for name, module in model.named_modules() if isinstance(module, AdapterLayer)
    }


def load_vectors(model: CausalLM, _base_folder: Path, folder: Path) -> str:
    attach_vectors(model)
    values = load_file(folder / "adapter_model.safetensors")
    for name, layer in layers(model).items():
        for key, parameter in layer.adapter_parameters().items():
            parameter.data = values[f"{PREFIX}{name}{key}"]
    return "SCALED"


def test_the_loop_trains_it_and_disabling_gives_the_base_back() -> None:
    model, base = toy("llama", std=0.1), toy("llama", std=0.1)
    attach_vectors(model)
    ids = torch.arange(3, 12)[None]
    assert torch.equal(model(ids), base(ids))
    settings = FinetuneLora(epochs=6, learning_rate=5e-2, retention_weight=0.1, retention_data="t")
    retain = RetentionLoss(model, listed(windows_of((5, 7), seed=4)), settings)
    records, _ = trained(model, Batches(listed(windows_of(LENGTHS)), 2, 0), settings, retain=retain)
    assert records[-1].loss < records[0].loss
    assert (
        records[0].divergence == pytest.approx(0, abs=1e-6)
        and records[-1].divergence != records[0].divergence
    )
    assert not torch.equal(model(ids), base(ids))
    with disable_adapter(model):
        assert torch.equal(model(ids), base(ids))


def test_its_folder_is_loaded_by_the_loader_of_its_type(
    brief: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    expanded, folder = brief / "artifacts/expanded", tmp_path / "ia3"
    model, ids = load_base(expanded).model, torch.arange(3, 9)[None]
    attach_vectors(model)
    trained(
        model, Batches(listed(windows_of((4, 4, 4))), 2, 0), Training(epochs=2, learning_rate=0.1)
    )
    folder.mkdir()
    write_json(folder / "adapter_config.json", {"peft_type": "SCALED", "target_modules": [*NAMES]})
    values = {
        f"{PREFIX}{name}{key}": parameter.detach()
        for name, layer in layers(model).items()
        for key, parameter in layer.adapter_parameters().items()
    }
    save_file(values, folder / "adapter_model.safetensors")
    with pytest.raises(
        UserError, match=r"peft_type must be LORA, .*or PROMPT_TUNING, got 'SCALED'"
    ):
        load_adapter(load_base(expanded).model, expanded, folder)
    monkeypatch.setitem(OTHER_KINDS, "SCALED", "scaled")
    monkeypatch.setitem(sys.modules, "scaled", SimpleNamespace(load=load_vectors))
    again = load_base(expanded).model
    assert load_adapter(again, expanded, folder) == "SCALED"
    assert torch.equal(again(ids), model.eval()(ids))
