"""Parts of transformers' models that are fused on a GPU, in plain torch here: Liger's kernels need one."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3MLP
from transformers.models.llama.modeling_llama import LlamaConfig, LlamaMLP

from pipeline.models.kernels import accelerator
from pipeline.models.kernels.accelerator import GatedProduct, fuse, fuse_gates
from pipeline.training.memory.prediction import TensorMemoryMeter
from tests.helpers.real import toy

CPU = torch.device("cpu")


class Doubled(LlamaMLP):  # type: ignore[misc]
    """With the same parts, but it computes something else."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = super().forward(x) * 2
        return out


def feed_forward(kind: Any = LlamaMLP, dtype: torch.dtype = torch.float32, act: str = "silu") -> nn.Sequential:
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=32, num_attention_heads=4, intermediate_size=512, hidden_act=act)
    config.hidden_activation = act
    return nn.Sequential(kind(config)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "act"), [(LlamaMLP, "silu"), (Gemma3MLP, "gelu_pytorch_tanh"), (LlamaMLP, "relu")])
def test_a_fused_feed_forward_has_the_same_bits_and_keeps_less(kind: Any, act: str, dtype: torch.dtype) -> None:
    results = []
    for fused in (False, True):
        mlp = feed_forward(kind, dtype, act).requires_grad_(False)
        if fused:
            assert fuse_gates(mlp, [GatedProduct.apply], CPU) == ["0"]
            assert fuse_gates(mlp, [GatedProduct.apply], CPU) == [], "once is enough"
        x = torch.randn(64, 32, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
        meter = TensorMemoryMeter()
        with meter:
            out = mlp(x)
            kept = meter.now
        (grad,) = torch.autograd.grad(out, x, torch.ones_like(out))
        results.append((out, grad, kept))
    (plain, plain_grad, more), (fused_out, fused_grad, less) = results
    assert torch.equal(plain, fused_out) and torch.equal(plain_grad, fused_grad)
    assert less <= more - (64 * 512 * dtype.itemsize if act != "relu" else 0)


def test_a_feed_forward_that_computes_something_else_is_left_alone() -> None:
    mlp = feed_forward(Doubled)
    assert fuse_gates(mlp, [GatedProduct.apply], CPU) == [] and "forward" not in vars(mlp[0])


def test_the_first_kernel_that_agrees_is_taken() -> None:
    def wrong(gate: Tensor, up: Tensor, _: Any) -> Tensor:
        return torch.nn.functional.gelu(gate) * up

    def broken(*_: Any) -> Tensor:
        raise RuntimeError("no kernel image")

    mlp = feed_forward()
    assert fuse_gates(mlp, [wrong, broken, GatedProduct.apply], CPU) == ["0"]
    assert mlp[0].product == GatedProduct.apply


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2"])
def test_a_fused_model_is_the_same_model(name: str) -> None:
    ids = torch.arange(4, 20)[None]
    plain, fused = toy(name), toy(name)
    names = fuse(fused, CPU)
    assert sum("norm" in part for part in names) >= 5 and sum(part.endswith("mlp") for part in names) == 2
    torch.testing.assert_close(fused(ids), plain(ids), rtol=1e-4, atol=1e-4)
    assert fused.state_dict().keys() == plain.state_dict().keys()


def test_without_cuda_there_is_no_liger(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("GELUMulFunction", "RMSNormFunction", "RopeFunction", "SiLUMulFunction")
    installed: dict[str, dict[str, Any]] = {
        "liger_kernel": {},
        "liger_kernel.ops": {f"Liger{name}": SimpleNamespace(apply=None) for name in names},
        "liger_kernel.transformers": {"LigerFusedLinearCrossEntropyLoss": nn.Identity},
    }
    for name, contents in installed.items():
        module: Any = SimpleNamespace(**contents)
        monkeypatch.setitem(sys.modules, name, module)
    accelerator.liger.cache_clear()
    assert accelerator.liger(CPU) is None and not accelerator.fuses_head(toy("llama"))
