"""Whether what is taken apart is together again the model that transformers runs, in any
precision.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from pipeline.adapters.attach import attach, resolve
from pipeline.adapters.config import AdapterSpec
from pipeline.errors import UserError
from pipeline.models.base import compute_in_fp32
from pipeline.models.kernels import packed_attention, plain_attention
from pipeline.models.load import load_base, skeleton
from pipeline.models.transformers_model import TransformersModel, refuse_unlike
from tests.helpers.bases import toy_checkpoint
from tests.helpers.families import FAMILIES
from tests.helpers.real import toy

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def rough(name: str, dtype: torch.dtype) -> TransformersModel:
    """Weights so large that two right ways to compute in 16 bits end far apart."""
    return toy(name, dtype, std=0.6).eval()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_is_taken_whatever_its_precision_and_stays_as_it_is(
    name: str, dtype: torch.dtype
) -> None:
    model = rough(name, dtype)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    refuse_unlike(model, "toy")
    after = model.state_dict()
    assert all(
        after[key].dtype == tensor.dtype and torch.equal(after[key], tensor)
        for key, tensor in before.items()
    )
    assert model(torch.arange(5)[None]).dtype == dtype, "and computes as before"


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_exactly_means_as_a_copy_in_fp32(name: str, adapted: bool) -> None:
    model = rough(name, torch.bfloat16)
    if adapted:  # so small that its update is folded into a weight which is then never called
        attach(model, AdapterSpec(2, 4.0, tuple(resolve(model, ["attention"]))), torch.float32)
    for key, p in model.named_parameters():
        if key.endswith("lora_B"):
            nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(0))
    ids = torch.arange(20)[None]
    wide = copy.deepcopy(model).float()
    with torch.no_grad():
        with compute_in_fp32(model):
            found = model(ids)
        assert_close(found, wide(ids), rtol=1e-4, atol=1e-4)
        assert model(ids).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_that_are_made_otherwise_are_refused(dtype: torch.dtype) -> None:
    model = rough("llama", dtype)
    whole = model._model[0]
    plain: Callable[..., Any] = whole.forward

    def scaled(*arguments: Any, **options: Any) -> Any:
        out = plain(*arguments, **options)
        out.logits = out.logits * 1.01
        return out

    whole.forward = scaled
    with pytest.raises(
        UserError, match=r"toy: unsupported model LlamaForCausalLM: its logits are not its head"
    ):
        refuse_unlike(model, "toy")


def test_a_decoder_whose_config_counts_another_models_blocks_is_refused(tmp_path: Path) -> None:
    """Bart's num_hidden_layers are its encoder's."""
    toy_checkpoint(
        tmp_path,
        "bart",
        d_model=32,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        decoder_layers=1,
        num_hidden_layers=2,
    )
    for opens in (load_base, skeleton):
        with pytest.raises(UserError, match="unsupported model BartForCausalLM: it does not cons"):
            opens(tmp_path)


def test_a_generation_config_that_is_no_text_is_one_message(tmp_path: Path) -> None:
    toy_checkpoint(tmp_path)
    (tmp_path / "generation_config.json").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"cannot be opened: 'utf-8' codec can't decode byte 0xff"):
        skeleton(tmp_path)


@pytest.mark.parametrize("dtype", DTYPES)
def test_another_attention_is_refused(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model = rough("qwen3", dtype)
    seen = plain_attention.attend_row
    monkeypatch.setattr(
        packed_attention, "attend_row", lambda q, k, v, rule: seen(q * 1.02, k, v, rule)
    )
    with pytest.raises(UserError, match="its logits are not its head applied"):
        refuse_unlike(model, "toy")
