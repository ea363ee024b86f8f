"""One model by this project and by transformers and PEFT, and what both answer."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from pipeline.inference import engine
from pipeline.models.base import CausalLM
from tests.helpers.checkpoints import token_ids

IDS = (5, 9, 200, 17, 3, 64)
# (B, T) that each toy model knows
BATCH = token_ids(70, 6, 12)


def ours(base: Path, adapter: Path | None = None) -> CausalLM:
    return engine.load(base, adapter).model


def theirs(base: Path, adapter: Path | None = None) -> Any:
    model = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    return model.eval()


@torch.no_grad()
def logits(model: Any, ids: Tensor | Sequence[int] = IDS) -> Tensor:
    """(T, V) of a row of tokens, (B, T, V) of several, whoever's model it is."""
    rows = torch.as_tensor(ids)
    out = model.eval()(rows.view(-1, rows.shape[-1]))
    return getattr(out, "logits", out).float().view(*rows.shape, -1)  # type: ignore[no-any-return]


def assert_alike(one: Tensor, other: Tensor, within: float = 1e-4) -> None:
    assert (one - other).abs().max() <= within


def randomized(model: Any, alpha: float = 0.1) -> Any:
    """What is trained is no longer what it began with."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=alpha)
    return model.eval()
