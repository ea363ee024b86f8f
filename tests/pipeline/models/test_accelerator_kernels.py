"""Parts of transformers' models that are fused on a GPU, in plain torch here: Liger's kernels need
one.
"""

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
from pipeline.models.kernels.rms_norm import RMSNorm
from pipeline.project.probes import Finding, held
from pipeline.training.memory.prediction import TensorMemoryMeter
from tests.helpers.real import toy

CPU = torch.device("cpu")


class Doubled(LlamaMLP):  # type: ignore[misc]
    """With the same parts, but it computes something else."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = super().forward(x) * 2
        return out


def feed_forward(
    kind: Any = LlamaMLP, dtype: torch.dtype = torch.float32, act: str = "silu"
) -> nn.Sequential:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, num_attention_heads=4, intermediate_size=512, hidden_act=act
    )
    config.hidden_activation = act
    return nn.Sequential(kind(config)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("kind", "act"), [(LlamaMLP, "silu"), (Gemma3MLP, "gelu_pytorch_tanh"), (LlamaMLP, "relu")]
)
def test_a_fused_feed_forward_has_the_same_bits_and_keeps_less(
    kind: Any, act: str, dtype: torch.dtype
) -> None:
    results = []
    for fused in (False, True):
        mlp = feed_forward(kind, dtype, act).requires_grad_(False)
        if fused:
            assert fuse_gates(mlp, [GatedProduct.apply], CPU) == ["0"]
            assert fuse_gates(mlp, [GatedProduct.apply], CPU) == [], "once is enough"
        x = (
            torch.randn(64, 32, generator=torch.Generator().manual_seed(1))
            .to(dtype)
            .requires_grad_()
        )
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
    with held() as found:
        assert fuse_gates(mlp, [wrong, broken, GatedProduct.apply], CPU) == ["0"]
    assert mlp[0].product == GatedProduct.apply
    # what computes something else is not for this model; what raises should have worked
    assert [(one.tried, one.said) for one in found] == [
        ("the fused product of LlamaMLP", "RuntimeError: no kernel image")
    ]


def test_what_keeps_liger_from_running_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its parts are there, and each raises what a Triton for another GPU does."""

    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no kernel image is available")

    class Norm(RMSNorm):
        forward = broken

    parts = SimpleNamespace(norm=Norm, products=[broken], rotate=broken)
    monkeypatch.setattr(accelerator, "liger", lambda _: parts)
    model = toy("llama")
    model.head.requires_grad_(False)
    with held() as found:
        fuse(model, CPU)
    assert {one.tried for one in found} == {
        "the fused LlamaRMSNorm",
        "the fused product of LlamaMLP",
        "Liger's rotary positions",
    }
    assert all(one.said == "RuntimeError: no kernel image is available" for one in found)


def test_a_liger_that_cannot_be_loaded_is_said_and_one_that_is_not_installed_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "liger_kernel"]:
        monkeypatch.delitem(sys.modules, name)
    found = dict[bool, list[Finding]]()
    for is_broken in (False, True):
        with monkeypatch.context() as patched, held() as found[is_broken]:
            patched.setattr(sys, "path", [])
            if is_broken:
                # without its functions
                patched.setitem(sys.modules, "liger_kernel", SimpleNamespace())
            accelerator.liger.cache_clear()
            assert accelerator.liger(torch.device("cuda")) is None
    accelerator.liger.cache_clear()
    assert not found[False] and [one.tried for one in found[True]] == ["Liger's kernels"]
