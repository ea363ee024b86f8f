"""Parts with fewer passes against the parts of transformers' models that they stand for."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from pipeline.models.kernels.rms_norm import RMSNorm, fuse_rms_norms


class ShiftedRMSNorm(LlamaRMSNorm):  # type: ignore[misc]
    """Named like the others, but it computes something else."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        out: Tensor = super().forward(hidden_states) + 1
        return out


def norm(kind: Any, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    module: nn.Module = kind(24, eps=1e-5).to(dtype)
    torch.manual_seed(0)
    nn.init.normal_(module.get_parameter("weight"), 0.5)
    return nn.Sequential(module)


@pytest.mark.parametrize("kind", [LlamaRMSNorm, Gemma2RMSNorm])
def test_a_norm_with_fewer_passes_is_the_same_norm(kind: Any) -> None:
    theirs, ours = norm(kind), norm(kind)
    assert fuse_rms_norms(ours) == ["0"]
    assert isinstance(ours[0], RMSNorm) and list(ours.state_dict()) == list(theirs.state_dict())
    x = torch.randn(2, 5, 24, requires_grad=True)
    outs = [model(x) for model in (ours, theirs)]
    assert_close(*outs)
    towards = torch.randn_like(outs[0])
    found, wanted = (
        torch.autograd.grad(out, [x, *model.parameters()], towards)
        for out, model in zip(outs, (ours, theirs), strict=True)
    )
    assert_close(found, wanted)


@pytest.mark.parametrize("kind", [LlamaRMSNorm, Gemma2RMSNorm])
def test_sixteen_bit_norms_differ_by_roundings_alone(kind: Any) -> None:
    theirs, ours = norm(kind, torch.bfloat16), norm(kind, torch.bfloat16)
    assert fuse_rms_norms(ours) == ["0"]
    x = torch.randn(3, 24, dtype=torch.bfloat16)
    assert_close(ours(x), theirs(x), atol=0.02, rtol=0.01)


def test_a_norm_that_computes_something_else_is_left_alone() -> None:
    model = norm(ShiftedRMSNorm)
    assert fuse_rms_norms(model) == [] and isinstance(model[0], ShiftedRMSNorm)
