"""Evaluation, generation, the engine for many adapters, merge and SVD on a device without numbers: see `meta_device`."""

from typing import Any

import pytest
import torch

from pipeline.adapters.attach import attach
from pipeline.adapters.config import AdapterSpec
from pipeline.adapters.low_rank import LowRank, svd, truncated
from pipeline.adapters.mixed import MixedAdapter, changed_layers
from pipeline.inference.batched_model import BatchedModel, Part
from pipeline.inference.engine import LoadedModel
from pipeline.inference.model_pool import ResidentBase, view
from pipeline.models.base import CausalLM, SequenceCache, packed_hidden_states
from pipeline.models.generate import Sampling, generate
from pipeline.models.minigpt import MiniGPT, MiniGPTConfig
from pipeline.models.virtual_tokens import PrefixTokens, PromptTokens
from tests.helpers.meta_device import META, Seen, refuse, to_meta, watched
from tests.helpers.real import ROWS, toy, with_lora

LONG = 600
PROMPT = [3 + n % 90 for n in range(LONG)]
SAMPLED = "models/generate.py:stream _to_copy"  # the logits of a token: sampled on the CPU, so that a seed means the same


def ready(model: CausalLM) -> CausalLM:
    assert model.supports_packing
    return to_meta(model).eval()


FAMILIES = ["llama", "gemma2", "gemma3", "gpt_oss", "gpt2", "minigpt"]


def model_of(name: str, dtype: torch.dtype) -> CausalLM:
    if name == "minigpt":
        return MiniGPT(MiniGPTConfig(ROWS, 0, 1, d_model=32, max_positions=800))
    settings = {"max_position_embeddings": 800} if name != "gpt2" else {"n_positions": 800}
    return toy(name, dtype, **settings)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("family", FAMILIES)
def test_generation_reads_the_logits_of_a_token_and_no_more(family: str, dtype: torch.dtype) -> None:
    model = ready(model_of(family, dtype))
    if family == "gpt_oss":
        model.config._experts_implementation = "grouped_mm"  # type: ignore[attr-defined]
    for sampling in (Sampling(), Sampling(0.7, top_k=5, top_p=0.9)):
        with watched(LONG - 1) as seen:
            assert len(list(generate(model, PROMPT, {1}, 4, sampling))) == 4
        seen.hosted.clear()  # sampling is on the host
        refuse(seen, {SAMPLED: 4})


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_generation_after_virtual_tokens(kind: str) -> None:
    model = model_of("qwen3", torch.bfloat16)
    assert model.supports_prefix
    model.set_virtual_tokens(PromptTokens(torch.randn(5, 32)) if kind == "prompt" else PrefixTokens(torch.randn(5, 128), 2, 2))
    ready(model)
    with watched(LONG - 1) as seen:
        list(generate(model, PROMPT, {1}, 3))
    seen.hosted.clear()
    refuse(seen, {SAMPLED: 3})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("family", FAMILIES)
def test_texts_to_score_are_copied_once_a_row(family: str, dtype: torch.dtype) -> None:
    model = ready(model_of(family, dtype))
    with watched(LONG - 1) as seen:
        hidden = list(packed_hidden_states(model, [PROMPT, PROMPT[:300], PROMPT[:120], PROMPT]))
    assert [len(each) for each in hidden] == [LONG, 300, 120, LONG]
    refuse(seen, {})
