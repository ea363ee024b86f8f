"""Weights in few bits, against the number formats, bitsandbytes and the mathematics that each way
claims.
"""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lab import rounding
from lab.rounding import Rounded, entropy, four_bit_codes, precisions
from torch import Tensor

from pipeline.export.into.gptq import DAMPING, inverse_root

WAYS = {one.name: one.quantize for one in precisions(group=32)}
GROUPED: dict[str, Callable[[Tensor, Tensor, int, int], Rounded]] = {
    "nearest": lambda w, _, bits, group: rounding.nearest(w, bits, group),
    "gptq": rounding.gptq,
    "awq": rounding.awq,
}


def drawn(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) / 8


def inputs(count: int, columns: int, seed: int = 0) -> Tensor:
    """Rows whose numbers go together and are not of one size, as hidden states are."""
    mixed = drawn(count, columns, seed) @ drawn(columns, columns, seed + 1)
    return (
        mixed
        * torch.logspace(-1, 1, columns)[
            torch.randperm(columns, generator=torch.Generator().manual_seed(seed))
        ]
    )


def gram_of(x: Tensor) -> Tensor:
    return x.double().T @ x.double()


def error(weight: Tensor, rounded: Tensor) -> float:
    return float((weight - rounded).norm() / weight.norm())


def test_tf32_keeps_ten_bits_of_fraction_and_rounds_ties_to_even() -> None:
    step = 2.0**-10
    ties = torch.tensor(
        [1 + step / 2, 1 + 3 * step / 2, -(1 + step / 2), 1 + step / 2 + 2**-20, 0.0]
    )
    assert rounding.tf32(ties).weight.tolist() == [1, 1 + 2 * step, -1, 1 + step, 0]
    found = rounding.tf32(drawn(50, 50)).weight
    fraction, _ = np.frexp(found.double().numpy())
    assert (np.round(fraction * 2**11) == fraction * 2**11).all()
    assert float(((found - drawn(50, 50)) / drawn(50, 50)).abs().max()) <= 2.0**-11


def test_tf32_is_fp16_where_fp16_has_the_range() -> None:
    """Both have 10 bits of fraction."""
    weight = drawn(64, 64).clamp(min=2.0**-10)
    assert torch.equal(
        rounding.tf32(weight).weight, rounding.as_dtype(weight, torch.float16).weight
    )


def test_e4m3_has_three_bits_of_fraction_below_the_largest_weight() -> None:
    weight = drawn(64, 64)
    found = rounding.fp8(weight).weight
    assert found.abs().max() == pytest.approx(float(weight.abs().max()))
    off = ((found - weight) / weight).abs()[weight.abs() > weight.abs().max() / 2**14]
    assert off.max() <= 2.0**-4 * (1 + 1e-5)


def test_int8_is_bitsandbytes_but_for_its_halves() -> None:
    bnb = pytest.importorskip("bitsandbytes.functional")
    weight = drawn(40, 64).half().float()
    codes, scales, _ = bnb.int8_vectorwise_quant(weight.half())
    theirs = bnb.int8_vectorwise_dequant(codes, scales).float()
    step = weight.abs().amax(1, keepdim=True) / 127
    assert ((rounding.int8(weight).weight - theirs).abs() <= step * 1.01).all()
    assert (rounding.int8(weight).weight - weight).abs().max() <= step.max() / 2 * 1.001


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 70),
    group=st.integers(1, 80),
    seed=st.integers(0, 99),
)
def test_even_steps_reach_from_least_to_greatest_and_no_weight_is_off_by_more_than_one(
    bits: int, rows: int, columns: int, group: int, seed: int
) -> None:
    weight = drawn(rows, columns, seed)
    found = rounding.nearest(weight, bits, group).weight
    for start in range(0, columns, min(group, columns)):
        part, left = (t[:, start : start + group] for t in (weight, found))
        width = part.amax(1).clamp(min=0) - part.amin(1).clamp(max=0)
        assert (
            (left - part).abs() <= width[:, None] / (2**bits - 1) * 1.001 + 2.0 ** (bits - 24)
        ).all()  # of fp16's scale
        for one in left:
            assert len(set(one.tolist())) <= 2**bits


def test_zero_is_kept_by_every_way() -> None:
    weight = torch.zeros(8, 32)
    weight[0, 0] = 1.0
    gram = gram_of(inputs(40, 32))
    for name, way in WAYS.items():
        found = way(torch.zeros(8, 32), gram)
        assert not found.weight.any(), name
        assert torch.isfinite(way(weight, gram).weight).all(), name


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("seed", range(5))
def test_gptq_is_no_worse_than_round_to_nearest_in_the_error_of_outputs(
    bits: int, seed: int
) -> None:
    weight, x = drawn(48, 64, seed), inputs(200, 64, seed)
    gram = gram_of(x)
    plain, better = rounding.nearest(weight, bits, 32), rounding.gptq(weight, gram, bits, 32)
    off = [float((x @ (weight - one.weight).T).norm()) for one in (plain, better)]
    assert off[1] <= off[0]
    assert rounding.output_error(weight, better.weight, gram) == pytest.approx(
        off[1] ** 2, rel=1e-3
    )
    assert better.bits == plain.bits


def test_gptq_of_inputs_that_have_nothing_in_common_is_round_to_nearest() -> None:
    """With G a multiple of 1, no weight can make up for another's error."""
    weight = drawn(20, 64)
    found = rounding.gptq(weight, 3 * torch.eye(64).double(), 3, 32)
    assert torch.equal(found.weight, rounding.nearest(weight, 3, 32).weight)


def test_gptqs_update_of_the_rest_is_the_best_there_is() -> None:
    """With one column rounded and all others free, what is left is least squares' solution."""
    weight, x = drawn(1, 12), inputs(60, 12).double()
    gram = gram_of(x)
    upper = inverse_root(gram)
    q = float(weight[0, 0]) + 0.1
    moved = weight[0].double() - (float(weight[0, 0]) - q) / upper[0, 0] * upper[0]
    damped = gram + gram.diagonal().mean() * DAMPING * torch.eye(12).double()
    # minimise (v − w)ᵀG(v − w) with v₀ = q
    free = (
        torch.linalg.solve(damped[1:, 1:], damped[1:, 0] * (float(weight[0, 0]) - q))
        + weight[0, 1:].double()
    )
    torch.testing.assert_close(moved[1:], free)
    assert float(moved[0]) == pytest.approx(q)


@pytest.mark.parametrize("seed", range(5))
def test_awq_is_no_worse_than_round_to_nearest_for_exponent_0_is_tried(seed: int) -> None:
    weight, gram = drawn(48, 64, seed), gram_of(inputs(200, 64, seed))
    plain, found = rounding.nearest(weight, 3, 32), rounding.awq(weight, gram, 3, 32)
    assert rounding.output_error(weight, found.weight, gram) <= rounding.output_error(
        weight, plain.weight, gram
    )


def test_awq_protects_the_weights_of_inputs_that_are_large() -> None:
    """As its paper's figure 2: a few inputs carry the output, and their weights are rounded more
    finely.
    """
    weight, x = drawn(48, 64), drawn(200, 64, 3)
    x[:, :3] *= 30
    plain, found = (
        rounding.nearest(weight, 3, 32).weight,
        rounding.awq(weight, gram_of(x), 3, 32).weight,
    )
    assert rounding.output_error(weight, found, gram_of(x)) < 0.5 * rounding.output_error(
        weight, plain, gram_of(x)
    )
    assert error(weight[:, :3], found[:, :3]) < error(weight[:, :3], plain[:, :3])


def test_ternary_has_three_values_of_the_mean_magnitude() -> None:
    weight = drawn(64, 64)
    found, bits = rounding.ternary(weight)
    scale = float(weight.abs().mean())
    assert sorted(set(found.flatten().tolist())) == pytest.approx([-scale, 0, scale])
    assert bits == pytest.approx(math.log2(3), abs=0.01)
    assert ((found == 0) == (weight.abs() < scale / 2)).all()


@pytest.mark.parametrize("how", GROUPED)
def test_fewer_bits_and_larger_groups_err_more(how: str) -> None:
    weight, gram = drawn(64, 128), gram_of(inputs(300, 128))
    way = GROUPED[how]

    def off(bits: int, group: int) -> float:
        return rounding.output_error(weight, way(weight, gram, bits, group).weight, gram)

    assert off(4, 32) < off(3, 32) < off(2, 32)
    assert off(3, 16) < off(3, 128)
    assert way(weight, gram, 3, 16).bits == 3 + 19 / 16 > way(weight, gram, 3, 128).bits


def test_nf4_is_the_nearest_level_of_its_block_with_its_scales_bits() -> None:
    weight = drawn(64, 64)
    plain, double = rounding.normal_float(weight), rounding.normal_float(weight, double=True)
    assert (plain.bits, round(double.bits, 3)) == (4.5, 4.127)
    assert all(len(set(block.tolist())) <= 16 for block in plain.weight)
    assert error(weight, plain.weight) == pytest.approx(error(weight, double.weight), rel=0.02)


def test_the_order_of_errors_is_that_of_the_documents_table() -> None:
    """32 > 16 > 8 > 4 > 3 > 2 > ternary bits, of weights that are normal."""
    weight, gram = drawn(128, 128), gram_of(torch.randn(300, 128))
    plain = [
        "FP32",
        "FP16",
        "BF16",
        "INT8",
        "FP8 E4M3",
        "NF4",
        "3-bit nearest",
        "2-bit nearest",
        "ternary",
    ]
    errors = [error(weight, WAYS[name](weight, gram).weight) for name in plain]
    assert errors[0] == 0 and errors == sorted(errors)


def test_entropy_is_the_logarithm_of_levels_that_are_used_equally_often() -> None:
    assert entropy(torch.arange(16).repeat(5)) == pytest.approx(4)
    assert entropy(torch.zeros(9)) == 0
    assert entropy(torch.tensor([3, 3, 7, 9])) == pytest.approx(1.5)


def test_four_bit_codes_are_those_of_what_is_left_of_a_weight() -> None:
    """Counted from the levels themselves: what was rounded, by its block's scale."""
    weight = drawn(128, 128)
    levels = {
        "NF4": rounding.normal_float(weight).weight.view(-1, 64)
        / weight.view(-1, 64).abs().amax(1, keepdim=True),
        "INT4 nearest": rounding.nearest(weight, 4, 32).weight.view(-1, 32),
    }
    low, high = weight.view(-1, 32).aminmax(dim=1, keepdim=True)
    step = ((high - low) / 15).half().float()
    levels["INT4 nearest"] = (levels["INT4 nearest"] / step).round() + (-low / step).round()
    for name, codes in four_bit_codes(weight, 32).items():
        shares = np.unique(levels[name].numpy().round(4), return_counts=True)[1] / weight.numel()
        assert len(shares) == 16
        assert entropy(codes) == pytest.approx(-(shares * np.log2(shares)).sum())
