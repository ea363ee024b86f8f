"""Weights in q8_0: llama.cpp's numbers, products in both of native.c's ways, blocks of them."""

import copy

import gguf
import pytest
import torch
import torch.nn.functional as F
from gguf import GGMLQuantizationType
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from pipeline.models.kernels.decode import fast_decoding, reads_pages
from pipeline.models.quantized_linear import Q8Linear, quantizable
from pipeline.models.transformers_model import TransformersModel
from tests.pipeline.models.test_decode import (
    assert_alike,
    model_of,
    needs_native,
    products,
    shaped,
    some_ids,
    step_by_step,
    together,
    with_lora,
)

__all__ = ["products"]  # a fixture
BF16 = torch.bfloat16


def linear_of(outputs: int, inputs: int, bias: bool = False) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias, dtype=BF16).requires_grad_(False)


def exact(layer: Q8Linear, x: Tensor) -> Tensor:
    bias = None if layer.bias is None else layer.bias.double()
    return F.linear(x.double(), layer.weight_in(torch.float64), bias)


def test_the_weights_are_those_of_llama_cpp() -> None:
    weight = torch.randn(48, 96, generator=torch.Generator().manual_seed(5))
    weight[0, :32] = 0
    weight[1] *= 0.1
    weight[2] *= 1e3
    linear = nn.Linear(96, 48, bias=False)
    linear.weight.data = weight
    kind = GGMLQuantizationType.Q8_0
    theirs = gguf.quants.dequantize(gguf.quants.quantize(weight.numpy(), kind), kind)
    ours = Q8Linear(linear).weight_in(torch.float32)
    # they round before the scale is in fp16, we after: codes differ by one at most
    step = ours.abs().view(48, 3, 32).amax(-1, keepdim=True) / 127
    difference = (ours - torch.from_numpy(theirs)).view(48, 3, 32).abs()
    assert (difference <= 1.001 * step).all()
    assert (difference.mean() / step.mean()) < 0.05
    assert (
        (ours - weight).norm(dim=1) <= (torch.from_numpy(theirs) - weight).norm(dim=1) + 1e-9
    ).all()


@needs_native
@pytest.mark.usefixtures("products")
@settings(deadline=None, max_examples=30)
@given(
    st.integers(1, 40),
    st.integers(1, 9),
    st.integers(1, 12),
    st.booleans(),
    st.sampled_from([1e-20, 1.0, 1e20]),
)
def test_products_are_those_of_the_dequantized_weight(
    rows: int, outputs: int, inputs: int, bias: bool, size: float
) -> None:
    layer = Q8Linear(linear_of(16 * outputs, 32 * inputs, bias))
    x = (size * torch.randn(rows, 32 * inputs)).to(BF16)
    wanted = exact(layer, x)
    found = layer(x)
    assert (found.double() - wanted).norm() <= 0.006 * wanted.norm()
    alone = torch.cat([layer(x[n : n + 1]) for n in range(rows)])
    assert_close(found, alone, rtol=0, atol=0)


@needs_native
@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(number: float) -> None:
    layer, x = Q8Linear(linear_of(32, 64)), torch.randn(3, 64).to(BF16)
    for column in (0, 31, 63):
        broken = x.clone()
        broken[1, column] = number
        finite = layer(broken).isfinite().all(1)
        assert finite.tolist() == [True, False, True]


def test_other_precisions_dequantize_it() -> None:
    layer, x = Q8Linear(linear_of(32, 64)), torch.randn(2, 3, 64)
    assert_close(layer(x).double(), exact(layer, x), rtol=1e-4, atol=1e-5)
    assert layer(x[:0].to(BF16)).shape == (0, 3, 32)


def test_it_takes_plain_linears_of_whole_blocks() -> None:
    class Other(nn.Linear):
        pass

    assert Q8Linear.takes(linear_of(16, 32))
    for other in (linear_of(16, 48), linear_of(24, 32), Other(32, 16), nn.ReLU()):
        assert not Q8Linear.takes(other)


def in_q8_0(model: TransformersModel, every: int = 1) -> TransformersModel:
    """A copy in which each of the blocks' linears is in q8_0, or each second or third."""
    narrow = copy.deepcopy(model)
    for name in quantizable(model)[::every]:
        linear = narrow.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        narrow.set_submodule(name, Q8Linear(linear))
    return narrow


def in_fp32(model: TransformersModel, ids: list[int]) -> Tensor:
    """Hidden states (T, D) by torch, with the codes dequantized."""
    wide = copy.deepcopy(model)
    for name, layer in model.named_modules():
        if isinstance(layer, Q8Linear):
            linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
            linear.weight.data = layer.weight_in(torch.float32)
            if layer.bias is not None:
                linear.bias.data = layer.bias.data
            wide.set_submodule(name, linear)
    return wide.float().hidden_states(torch.tensor([ids]))[0]


@needs_native
@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "biased"])
@pytest.mark.parametrize("every", [1, 3])  # of a block's linears, all or some are in q8_0
@torch.no_grad()
def test_blocks_for_one_token_multiply_by_the_codes(kind: str, every: int) -> None:
    narrow = in_q8_0(shaped(kind), every)
    ids = some_ids(24)
    with fast_decoding(narrow):
        assert reads_pages(narrow)
        found = step_by_step(narrow, ids, 5)
    assert_alike(found, in_fp32(narrow, ids)[4:])


@needs_native
@pytest.mark.usefixtures("products")
@torch.no_grad()
def test_a_sequence_gets_the_bits_beside_others_that_it_gets_alone() -> None:
    """With LoRA, and more rows than are multiplied at once."""
    narrow = with_lora(in_q8_0(model_of("llama")), 3, dtype=BF16)
    rows = [some_ids(8 + 3 * n, n) for n in range(19)]
    prompts = [2 + n % 7 for n in range(19)]
    chosen = (0, 5, 18)
    wanted = [in_fp32(narrow, rows[n])[prompts[n] - 1 :] for n in chosen]
    before = torch.get_num_threads()
    try:
        with fast_decoding(narrow):
            beside = together(narrow, rows, prompts)
            for n, exactly in zip(chosen, wanted, strict=True):
                torch.set_num_threads(1 + n % 2)
                alone = step_by_step(narrow, rows[n], prompts[n])
                assert_close(beside[n], alone, rtol=0, atol=0)
                # with these updates bf16 itself is off by up to 0.024
                assert (alone - exactly).norm() < 0.03 * exactly.norm()
    finally:
        torch.set_num_threads(before)
