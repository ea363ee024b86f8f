"""Rows of several adapters in one layer are computed as each adapter computes them alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from pipeline.adapters.lora import AdapterLayer, DoRALinear, LoRALinear
from pipeline.adapters.mixed import STACKED_ROWS, MixedAdapter, MixedLayer, RowRouting

KINDS = (LoRALinear, LoRALinear, DoRALinear, LoRALinear)


@pytest.fixture(scope="module")
def base() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(8, 6).requires_grad_(False)


@pytest.fixture(scope="module")
def parts(base: nn.Linear) -> list[AdapterLayer]:
    """Of other ranks and scales each."""
    made = [kind(base, rank, 0.5 * rank) for rank, kind in enumerate(KINDS, 1)]
    for part in made:
        nn.init.normal_(part.lora_B.requires_grad_(False))
        nn.init.normal_(part.lora_A.requires_grad_(False))
    return [*made]


counts = st.integers(1, 4) | st.just(STACKED_ROWS)
shares = st.lists(st.tuples(st.integers(-1, len(KINDS)), counts), min_size=1, max_size=6, unique_by=lambda s: s[0])


@settings(deadline=None)
@given(st.lists(shares, min_size=1, max_size=4), st.integers(0, 99))
@torch.no_grad()
def test_every_row_is_that_of_its_own_adapter_however_the_routing_changes(
    base: nn.Linear, parts: list[AdapterLayer], routings: list[list[tuple[int, int]]], seed: int
) -> None:
    """-1 is no adapter, the last one has no such layer."""
    routing, adapters = RowRouting(), [*(MixedAdapter({"q": part}) for part in parts), MixedAdapter({})]
    layer, numbers = MixedLayer(base, "q", routing), torch.Generator().manual_seed(seed)
    for share in routings:
        owners, rows = zip(*share, strict=True)
        routing.route([None if n < 0 else adapters[n] for n in owners], rows)
        x = torch.randn(1, sum(rows), 8, generator=numbers)
        expected = [
            parts[n](part) if 0 <= n < len(parts) else base(part)
            for n, part in zip(owners, x.split_with_sizes([*rows], 1), strict=True)
        ]
        assert_close(layer(x), torch.cat(expected, 1), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_row_is_finite_though_the_product_with_another_adapter_overflows(base: nn.Linear) -> None:
    one, other = LoRALinear(base, 2, 1.0), LoRALinear(base, 2, 1.0)
    nn.init.normal_(one.lora_B)
    nn.init.constant_(other.lora_A, 1e38)
    routing = RowRouting()
    routing.route([MixedAdapter({"q": one}), MixedAdapter({"q": other})], [1, 1])
    x = torch.tensor([[10.0], [1e-3]]).expand(2, 8)
    assert (x[:1] @ other.lora_A.T).isinf().all()
    assert_close(MixedLayer(base, "q", routing)(x), torch.cat([one(x[:1]), other(x[1:])]))


@torch.no_grad()
def test_a_strength_scales_the_update_of_its_rows_and_stays_when_the_layers_scale_is_set(base: nn.Linear) -> None:
    part = LoRALinear(base, 2, 1.5)
    nn.init.normal_(part.lora_B)
    half, full, routing = MixedAdapter({"q": part}, 0.5), MixedAdapter({"q": part}), RowRouting()
    x = torch.randn(2, 8)
    update: Tensor = part(x) - base(x)
    part.scale = 7.0  # as AdapterScale sets it for somebody else
    routing.route([half, full], [1, 1])
    assert_close(
        MixedLayer(base, "q", routing)(x), base(x) + update * torch.tensor([[0.5], [1.0]]), atol=1e-5, rtol=1e-4
    )
