"""Quantized merges: what bitsandbytes, gguf and llama.cpp make of the files, and what is measured."""

from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor
from transformers import AutoModelForCausalLM

from pipeline.adapters.config import AdapterSpec
from pipeline.export.into import describe
from pipeline.export.into.codes import CODINGS, codes_of, rounded_for_inputs, values_of, with_codes
from pipeline.export.into.gptq import input_grams, linear_widths, round_for_inputs
from pipeline.export.into.update import Stored, survival
from pipeline.inference.engine import load
from tests.conftest import Lora
from tests.helpers.checkpoints import adapter
from tests.helpers.families import FAMILIES, WIDE, Family, new_project
from tests.helpers.json_files import read_json, write_json
from tests.helpers.side_by_side import logits, ours
from tests.pipeline.stages.test_families import IDS

pytestmark = pytest.mark.filterwarnings("ignore")
IN_Q4_K = {**WIDE, "hidden_size": 256, "intermediate_size": 512, "head_dim": 64}


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def in_blocks(weight: Tensor, kind: Type) -> Tensor:
    """What the gguf package makes of a matrix; of a type that it cannot write, random blocks."""
    if kind in (Type.Q8_0, Type.Q5_0):
        return torch.from_numpy(gguf.quants.quantize(weight.numpy(), kind).view(np.uint8))
    count, size = gguf.GGML_QUANT_SIZES[kind]
    random = torch.Generator().manual_seed(1)
    shape = len(weight), weight.shape[1] // count, size
    blocks = torch.randint(0, 256, shape, dtype=torch.uint8, generator=random)
    scale = torch.tensor([0.01], dtype=torch.float16).view(torch.uint8)
    places = {Type.Q4_K: (0, 2), Type.Q6_K: (208,)}[kind]
    for place in places:
        blocks[..., place : place + 2] = scale
    return blocks.flatten(1)


@pytest.mark.parametrize("kind", CODINGS)
def test_other_codes_change_nothing_else_and_a_step_is_the_same_everywhere(kind: Type) -> None:
    data = in_blocks(drawn(6, 512), kind)
    codes = codes_of(data, kind)
    assert torch.equal(with_codes(data, kind, codes), data)
    zero, one, most = (values_of(with_codes(data, kind, codes * 0 + n), kind) for n in (1, 2, 15))
    torch.testing.assert_close(zero + 14 * (one - zero), most, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(zero + (one - zero) * (codes.float() - 1), values_of(data, kind))


@pytest.mark.parametrize("kind", CODINGS)
def test_gptq_loses_less_of_the_outputs_than_llama_cpps_codes(kind: Type) -> None:
    weight, x = drawn(24, 256), drawn(400, 40) @ drawn(40, 256, seed=1) + 0.1 * drawn(400, 256)
    data = in_blocks(weight, kind)
    rounded = rounded_for_inputs(data, kind, weight, x.T @ x)
    nearest = rounded_for_inputs(data, kind, weight, torch.eye(256))
    errors = [((values_of(d, kind) - weight) @ x.T).norm() for d in (rounded, nearest)]
    assert errors[0] < 0.7 * errors[1]
