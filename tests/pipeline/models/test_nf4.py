"""NF4 against bitsandbytes, to the last bit, and against the mathematics that it is made from."""

from itertools import pairwise
from statistics import NormalDist
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pipeline.models import nf4, quantized_linear
from pipeline.models.kernels.accelerator import weights
from pipeline.models.quantized_linear import (
    Quantization,
    dequantize_weight,
    quantize,
    quantize_weight,
)
from pipeline.project.probes import held
from tests.helpers.real import toy

bnb: Any = pytest.importorskip("bitsandbytes.functional")
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FILLED = (
    "normal",
    "uniform",
    "heavy tails",
    "zeros",
    "constant",
    "constant blocks",
    "mostly zero",
    "wide",
    "tiny",
)


def filled(how: str, size: int, block: int, seed: int) -> Tensor:
    """(size,) fp32."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(size, generator=generator)
    each = torch.randn(-(size // -block), generator=generator).repeat_interleave(block)[:size]
    return {
        "normal": normal / 50,
        "uniform": torch.rand(size, generator=generator) - 0.5,
        "heavy tails": (normal**5).clamp(-6e4, 6e4),
        "zeros": torch.zeros(size),
        "constant": torch.full((size,), 0.3),
        "constant blocks": each,
        "mostly zero": normal * (torch.rand(size, generator=generator) < 0.01) * (each > 0),
        "wide": normal * torch.logspace(-12, 3, size),
        "tiny": normal * torch.logspace(-42, -35, size),
    }[how]


def bits(x: Tensor) -> Tensor:
    """Equal only where every bit is, the sign of 0 too."""
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.itemsize])


def same(ours: Tensor, theirs: Tensor) -> bool:
    return ours.dtype == theirs.dtype and torch.equal(
        bits(ours.reshape(-1)), bits(theirs.reshape(-1))
    )


def theirs_of(weight: Tensor, block: int, double: bool) -> tuple[Tensor, Any]:
    codes, state = bnb.quantize_4bit(
        weight, blocksize=block, quant_type="nf4", compress_statistics=double
    )
    return codes, state


def by_theirs(codes: Tensor, state: Any) -> Tensor:
    """Not compiled, which they do for an odd number of weights, again for each."""
    with torch.compiler.set_stance("force_eager"):
        found: Tensor = bnb.dequantize_4bit(codes, state)
    return found


def test_levels_are_the_published_ones_to_the_last_bit() -> None:
    assert same(nf4.levels(), bnb.get_4bit_type("nf4", device="cpu"))
    assert same(nf4.dynamic_levels(), bnb.create_dynamic_map())


def test_levels_are_quantiles_of_a_normal_distribution_at_equal_steps() -> None:
    levels, widest = nf4.levels().tolist(), NormalDist().inv_cdf(nf4.OFFSET)
    probabilities = [NormalDist().cdf(level * widest) for level in levels]
    assert levels[0] == -1 and levels[7] == 0 and levels[15] == 1
    for side in (probabilities[:8], probabilities[7:]):
        steps = [after - before for before, after in pairwise(side)]
        assert steps == pytest.approx([(nf4.OFFSET - 0.5) / len(steps)] * len(steps), rel=1e-6)


@pytest.mark.parametrize("block", BLOCKS)
@given(
    blocks=st.integers(0, 5),
    more=st.one_of(st.just(0), st.integers(1, 300)),
    how=st.sampled_from(FILLED),
    dtype=st.sampled_from(DTYPES),
    double=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_every_code_scale_and_weight_is_bitsandbytes(
    block: int, blocks: int, more: int, how: str, dtype: torch.dtype, double: bool, seed: int
) -> None:
    weight = filled(how, max(1, blocks * block + more), block, seed).to(dtype)
    ours = nf4.quantize(weight, block, double)
    codes, state = theirs_of(weight, block, double)
    assert same(nf4.pack(ours.codes), codes)
    assert torch.equal(nf4.unpack(codes.view(-1), weight.numel()), ours.codes)
    if isinstance(ours.scales, nf4.Scales):
        assert same(ours.scales.codes, state.absmax)
        assert same(ours.scales.scales, state.state2.absmax)
        assert same(ours.scales.offset, state.offset)
    else:
        assert same(ours.scales, state.absmax)
    there, here = by_theirs(codes, state), nf4.dequantize(ours)
    # AVX-512's instruction makes 0 of what is too small to be a normal number
    if dtype == torch.bfloat16:
        there, here = (x.masked_fill(x.abs() < torch.finfo(dtype).tiny, 0) for x in (there, here))
    assert same(here, there)


def test_many_scales_are_bitsandbytes_in_more_than_one_block_of_them() -> None:
    weight = filled("wide", 64 * 1000 + 5, 64, 0)
    ours, (_, state) = (
        nf4.quantize(weight, 64, double=True).scales,
        theirs_of(weight, 64, double=True),
    )
    assert isinstance(ours, nf4.Scales) and ours.scales.shape == (4,)
    assert same(ours.codes, state.absmax) and same(ours.scales, state.state2.absmax)


@given(
    st.sampled_from(FILLED[:-1]),
    st.integers(1, 1000),
    st.sampled_from(BLOCKS),
    st.integers(0, 2**31),
)
def test_no_weight_moves_further_than_half_the_widest_gap(
    how: str, size: int, block: int, seed: int
) -> None:
    """But in blocks below 1e-38, which are divided by that."""
    weight = filled(how, size, block, seed)
    found = nf4.quantize(weight, block)
    assert isinstance(found.scales, Tensor)
    scales = found.scales.repeat_interleave(block)[:size]
    assert bool((scales >= weight.abs()).all())
    assert bool(
        (
            (nf4.dequantize(found) - weight).abs()
            <= nf4.levels().diff().max() / 2 * scales * (1 + 1e-6)
        ).all()
    )


def test_on_a_midpoint_the_lower_level_is_taken() -> None:
    levels = nf4.levels()
    middles = (levels[:-1] + levels[1:]) / 2
    weight = torch.cat(
        [torch.ones(1), middles, torch.nextafter(middles, torch.ones(15)), torch.zeros(1)]
    )
    codes = nf4.quantize(weight, 32).codes
    assert codes.tolist() == [15, *range(15), *range(1, 16), 7]
    assert same(nf4.pack(codes), theirs_of(weight, 32, double=False)[0])


def test_a_whole_block_is_multiplied_by_a_reciprocal_and_a_short_one_divided() -> None:
    """Numbers for which that decides the code, in a whole block of 32 and in a short one of 31."""
    levels = nf4.levels()
    scales = torch.rand(2000, generator=torch.Generator().manual_seed(0)) + 0.5
    x = (levels[3:4] + levels[4:5]) / 2 * scales
    product, quotient = nf4.nearest(x * (1 / scales), levels), nf4.nearest(x / scales, levels)
    (differs,) = torch.nonzero(product != quotient, as_tuple=True)
    assert len(differs) > 10
    for at in differs.tolist():
        for size, wanted in ((32, product[at]), (31, quotient[at])):
            weight = torch.zeros(size)
            weight[0], weight[1] = scales[at], x[at]
            found = nf4.quantize(weight, 32).codes
            assert found[1] == wanted
            assert same(nf4.pack(found), theirs_of(weight, 32, double=False)[0])


def test_zeros_have_the_level_0_and_a_scale_of_0_or_in_a_short_block_the_smallest() -> None:
    found = nf4.quantize(torch.zeros(100), 64)
    assert isinstance(found.scales, Tensor)
    assert set(found.codes.tolist()) == {7} and nf4.levels()[7] == 0
    assert found.scales.tolist() == [0, pytest.approx(1e-38)]
    assert nf4.dequantize(found).abs().max() == 0


def test_two_codes_are_a_byte_the_first_above() -> None:
    assert nf4.pack(torch.tensor([1, 2, 15], dtype=torch.uint8)).tolist() == [0x12, 0xF7]


def test_equal_scales_are_their_mean() -> None:
    scales = nf4.quantize_scales(torch.full((300,), 0.25))
    assert scales.scales.tolist() == [0, 0]
    assert nf4.dequantize_scales(scales).tolist() == [0.25] * 300


def test_8_bit_codes_are_bitsandbytes_at_every_edge_between_two_steps() -> None:
    """It looks them up in 65,536 steps on [-1, 1]."""
    edges = (
        (torch.arange(1, nf4.STEPS, dtype=torch.float64) - 0.5) / (nf4.STEPS - 1) * 2 - 1
    ).float()
    up, down = torch.ones(len(edges)), -torch.ones(len(edges))
    near = torch.stack([torch.nextafter(edges, down), edges, torch.nextafter(edges, up)]).view(
        -1, 255
    )
    x = F.pad(near, (0, 1), value=1.0).reshape(-1)  # each block's largest is 1
    codes, largest = nf4.quantize_dynamic(x)
    theirs, state = bnb.quantize_blockwise(x, blocksize=256)
    assert same(codes, theirs) and same(largest, state.absmax)
    assert len(set(codes.tolist())) > 200


def test_a_scale_equal_to_the_mean_gets_a_level_beside_0() -> None:
    """No step is 0."""
    codes, _ = nf4.quantize_dynamic(torch.tensor([-1.0, 0.0, 1.0]))
    assert 0 < nf4.dynamic_levels()[int(codes[1])] < 2.2e-5


@pytest.mark.parametrize(
    "shape", [(64, 32), (64, 48), (160, 96), (96, 80), (7, 12), (33, 64), (5, 7)]
)
@pytest.mark.parametrize("kind", ["nf4", "nf4-dq"])
def test_a_weight_whose_rows_are_no_whole_blocks_is_kept_as_well(
    kind: Quantization, shape: tuple[int, int]
) -> None:
    """bitsandbytes 0.50 on AVX-512, given such a shape, takes other blocks' scales; rows of 32 all
    take the first.

    The rows differ a hundredfold in size, and that would be off by as much.
    """
    weight = (
        torch.randn(shape, generator=torch.Generator().manual_seed(0))
        * torch.logspace(-2, 0, shape[0])[:, None]
    )
    with torch.compiler.set_stance("force_eager"):
        found = dequantize_weight(quantize_weight(weight, kind), kind, shape, torch.float32)
    assert same(found, nf4.dequantize(nf4.quantize(weight, 64, kind == "nf4-dq")))
    assert (found - weight).norm() < 0.15 * weight.norm()


@pytest.mark.parametrize(
    ("device", "kind", "library", "told"),
    [
        ("cuda", "nf4", None, True),
        ("cuda", "nf4-dq", None, True),
        ("cuda", "nf4-dq", object(), False),
        ("cuda", "int8", None, False),
        ("cpu", "nf4-dq", None, False),
    ],
)
def test_what_nf4_costs_on_a_gpu_without_bitsandbytes_is_said(
    monkeypatch: pytest.MonkeyPatch, device: str, kind: Quantization, library: object, told: bool
) -> None:
    monkeypatch.setattr(quantized_linear, "_bitsandbytes", lambda: library)
    monkeypatch.setattr(quantized_linear, "quantizable", lambda _: [])
    monkeypatch.setattr(weights, "dequantizes_nf4", lambda *_: False)
    with held() as found:
        quantize(toy("llama"), kind, None, torch.device(device))
    assert [(each.tried, "lora-workbench[qlora]" in each.slower) for each in found] == [
        ("bitsandbytes, for NF4", True)
    ] * told
