"""Whether what is taken apart is together again the model that transformers runs, in any precision."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from pipeline.errors import UserError
from pipeline.models import attend
from pipeline.models.opened import Opened, refuse_unlike
from tests.families import FAMILIES
from tests.real import toy

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def rough(name: str, dtype: torch.dtype) -> Opened:
    """Weights so large that two right ways to compute in 16 bits end far apart."""
    return toy(name, dtype, std=0.6).eval()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_is_taken_whatever_its_precision_and_stays_as_it_is(name: str, dtype: torch.dtype) -> None:
    model = rough(name, dtype)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    refuse_unlike(model, "toy")
    after = model.state_dict()
    assert all(after[key].dtype == tensor.dtype and torch.equal(after[key], tensor) for key, tensor in before.items())
    assert model(torch.arange(5)[None]).dtype == dtype, "and computes as before"


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_that_are_made_otherwise_are_refused(dtype: torch.dtype) -> None:
    model = rough("llama", dtype)
    whole = model._whole[0]
    plain: Callable[..., Any] = whole.forward

    def scaled(*arguments: Any, **options: Any) -> Any:
        out = plain(*arguments, **options)
        out.logits = out.logits * 1.01
        return out

    whole.forward = scaled
    with pytest.raises(UserError, match=r"toy: LlamaForCausalLM makes its logits otherwise than this project knows"):
        refuse_unlike(model, "toy")


@pytest.mark.parametrize("dtype", DTYPES)
def test_another_attention_is_refused(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model = rough("qwen3", dtype)
    seen = attend._row
    monkeypatch.setattr(attend, "_row", lambda q, k, v, rule: seen(q * 1.02, k, v, rule))
    with pytest.raises(UserError, match="makes its logits otherwise"):
        refuse_unlike(model, "toy")
