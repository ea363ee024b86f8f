"""What `engine.load` makes of a model on an accelerator, computed here on the CPU."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipeline.adapters.batched import lora_layers
from pipeline.adapters.config import AdapterSpec
from pipeline.inference import engine
from pipeline.models.base import LowBitLinear
from pipeline.models.kernels.accelerator.block import AcceleratorBlock
from pipeline.models.load import load_base
from pipeline.project.params.sections import Quantization
from tests.helpers.bases import toy_checkpoint
from tests.helpers.checkpoints import adapter

SPEC = AdapterSpec(3, 6.0, ("q_proj", "down_proj"))
IDS = torch.tensor([[5, 9, 20, 17, 3, 4]])


@pytest.fixture
def base(tmp_path: Path) -> Path:
    toy_checkpoint(tmp_path / "base", dtype=torch.bfloat16, hidden_size=64, intermediate_size=64)
    return tmp_path / "base"


def as_on(monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    """On a GPU whose fast precision this is."""
    monkeypatch.setattr(engine, "uses_cpu_kernels", lambda _: False)
    monkeypatch.setattr(engine, "fast_precision", lambda _: precision)


@torch.no_grad()
def logits(base: Path, tuned: Path, quantization: Quantization | None) -> Tensor:
    out: Tensor = engine.load(base, tuned, quantization=quantization).model(IDS)
    return out.float()


@pytest.mark.parametrize("quantization", [None, "nf4-dq"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_gpu_answers_in_its_fast_precision_by_fused_blocks(
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    precision: str,
    quantization: Quantization | None,
) -> None:
    tuned = adapter(tmp_path / "adapter", base, SPEC)
    expected = logits(base, tuned, quantization)
    as_on(monkeypatch, precision)
    model = engine.load(base, tuned, quantization=quantization).model
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    assert model.dtype == dtype
    linears = [module for module in model.modules() if isinstance(module, LowBitLinear)]
    assert {linear.dtype for linear in linears} <= {dtype}
    assert bool(linears) == (quantization is not None)
    factors = [(layer.lora_A, layer.lora_B) for _, _, layer in lora_layers(model)]
    assert len(factors) == 2 * len(model.blocks)
    assert {factor.dtype for pair in factors for factor in pair} == {dtype}
    assert all(isinstance(block, AcceleratorBlock) for block in model.blocks)
    actual = logits(base, tuned, quantization)
    assert torch.dist(actual, expected) < 0.03 * expected.norm()


def test_weights_outside_fp16s_range_stay_in_bf16(
    base: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = load_base(base).model
    with torch.no_grad():
        next(model.parameters())[0, 0] = 1e5
    model.save(base)
    as_on(monkeypatch, "fp16")
    assert engine.load(base).model.dtype == torch.bfloat16
    assert "too large for fp16" in caplog.text
