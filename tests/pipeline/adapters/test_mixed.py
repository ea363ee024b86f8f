"""Rows of several adapters in one layer are computed as each adapter computes them alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from pipeline.adapters.attach import attach
from pipeline.adapters.config import AdapterSpec
from pipeline.adapters.lora import AdapterLayer, DoRALinear, EmbeddingRows, LoRALinear
from pipeline.adapters.mixed import (
    STACKED_ROWS,
    MixedAdapter,
    MixedLayer,
    RowRouting,
    changed_layers,
)
from tests.helpers.checkpoints import small_minigpt

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
shares = st.lists(
    st.tuples(st.integers(-1, len(KINDS)), counts), min_size=1, max_size=6, unique_by=lambda s: s[0]
)


@settings(deadline=None)
@given(st.lists(shares, min_size=1, max_size=4), st.integers(0, 99))
@torch.no_grad()
def test_every_row_is_that_of_its_own_adapter_however_the_routing_changes(
    base: nn.Linear, parts: list[AdapterLayer], routings: list[list[tuple[int, int]]], seed: int
) -> None:
    """-1 is no adapter, the last one has no such layer."""
    routing, adapters = (
        RowRouting(),
        [*(MixedAdapter({"q": part}) for part in parts), MixedAdapter({})],
    )
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
def test_a_strength_scales_the_update_of_its_rows_and_stays_when_the_layers_scale_is_set(
    base: nn.Linear,
) -> None:
    part = LoRALinear(base, 2, 1.5)
    nn.init.normal_(part.lora_B)
    half, full, routing = MixedAdapter({"q": part}, 0.5), MixedAdapter({"q": part}), RowRouting()
    x = torch.randn(2, 8)
    update: Tensor = part(x) - base(x)
    part.scale = 7.0  # as AdapterScale sets it for somebody else
    routing.route([half, full], [1, 1])
    assert_close(
        MixedLayer(base, "q", routing)(x),
        base(x) + update * torch.tensor([[0.5], [1.0]]),
        atol=1e-5,
        rtol=1e-4,
    )


def lora(base: nn.Linear, rank: int, scale: float = 1.0) -> LoRALinear:
    layer = LoRALinear(base, rank, scale)
    nn.init.normal_(layer.lora_B.requires_grad_(False))
    nn.init.normal_(layer.lora_A.requires_grad_(False))
    return layer


@torch.no_grad()
def test_rows_of_an_embedding_and_of_16_bits_are_each_adapters_too() -> None:
    table, tokens = nn.Embedding(10, 4), torch.tensor([[1, 7, 7], [7, 2, 1]])
    own = EmbeddingRows(table, torch.tensor([7]), nn.Parameter(torch.randn(1, 4)))
    routing = RowRouting()
    routing.route([MixedAdapter({"e": own}), None], [2, 4])
    found = MixedLayer(table, "e", routing)(tokens)
    assert found.shape == (2, 3, 4)
    assert torch.equal(
        found.flatten(0, 1), torch.cat([own(tokens.flatten()[:2]), table(tokens.flatten()[2:])])
    )
    half = nn.Linear(8, 6).bfloat16()
    parts = [LoRALinear(half, rank, 0.3, torch.float32) for rank in (1, 2)]
    for part in parts:
        nn.init.normal_(part.lora_B)
    for counts in ([2, 3], [2, 40]):  # stacked, and one by one
        x, routing = torch.randn(sum(counts), 8).bfloat16(), RowRouting()
        routing.route([MixedAdapter({"q": part}) for part in parts], counts)
        out = MixedLayer(half, "q", routing)(x)
        assert out.dtype == torch.bfloat16
        expected = torch.cat(
            [part(rows) for part, rows in zip(parts, x.split_with_sizes(counts), strict=True)]
        )
        assert_close(out, expected, atol=0.02, rtol=0.02)


def test_stacks_are_made_once_for_the_adapters_that_come_and_go(
    base: nn.Linear, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stacking copies an adapter's tensors: a server whose requests come and go must not pay for it
    each time.
    """
    read = list[LoRALinear]()
    pair = LoRALinear.pair

    def counted(layer: LoRALinear) -> tuple[Tensor, Tensor]:
        read.append(layer)
        return pair(layer)

    monkeypatch.setattr(LoRALinear, "pair", counted)
    parts = [lora(base, 2) for _ in range(10)]
    adapters, routing = [MixedAdapter({"q": part}) for part in parts], RowRouting()
    layer = MixedLayer(base, "q", routing)

    def stacked_for(*numbers: int) -> list[LoRALinear]:
        read.clear()
        routing.route([adapters[n] for n in numbers], [1] * len(numbers))
        x = torch.randn(len(numbers), 8)
        updates = [
            row @ parts[n].lora_A.T @ parts[n].lora_B.T for n, row in zip(numbers, x, strict=True)
        ]
        assert_close(layer(x), base(x) + torch.stack(updates))
        return [*read]

    assert stacked_for(0, 1) == parts[:2]
    assert stacked_for(1, 0) == stacked_for(0, 1) == [], "the same ones, in any order"
    assert stacked_for(2, 3) == parts[:4]
    assert stacked_for(0, 3) == [], "those without rows stay for a while"
    assert stacked_for(4, 5, 6, 7) == parts[:8]
    assert stacked_for(8, 9) == parts[8:], "but not more than twice as many, or eight"
    routing.clear()
    assert (routing.stacked, routing.shares, routing.rows) == ([], [], 0)
    x = torch.randn(2, 8)
    assert torch.equal(layer(x), base(x))
    assert stacked_for(8, 9) == parts[8:], "it forgot them"


def test_neighbouring_rows_of_one_adapter_are_one_share_and_the_same_route_is_read_once() -> None:
    one, other, routing = MixedAdapter({}), MixedAdapter({}), RowRouting()
    routing.route([one, one, None, other, other], [1, 2, 3, 4, 5])
    assert routing.shares == [(one, 0, 3), (other, 6, 15)]
    assert routing.rows == 15
    version = routing.version
    routing.route([one, one, None, other, other], [1, 2, 3, 4, 5])
    assert routing.version == version
    routing.route([one, one, None, other, other], [1, 2, 3, 4, 6])
    assert routing.version > version and routing.rows == 16


def test_only_updates_of_low_rank_have_a_scale(base: nn.Linear) -> None:
    layers = {"a": LoRALinear(base, 2, 1.5), "b": DoRALinear(base, 2, 1.5), "c": nn.Linear(8, 6)}
    assert MixedAdapter(layers, 0.5).scales == {"a": 0.75}
    assert MixedAdapter(layers).scales == {"a": 1.5}


def test_the_layers_that_differ_are_those_that_the_adapter_wraps_replaces_or_trains() -> None:
    base = small_minigpt()

    def changed(*targets: str, **options: object) -> set[str] | None:
        view = small_minigpt()
        for (_, p), (_, own) in zip(view.named_parameters(), base.named_parameters(), strict=True):
            p.data = own.data  # as in a server, where adapters share one base
        assert changed_layers(view, base) == {}
        attach(view, AdapterSpec(2, 2.0, targets, **options))  # type: ignore[arg-type]
        if options.get("saved"):
            for name, p in view.named_parameters():
                if p.requires_grad and "lora" not in name:
                    p.data = p.data.clone()  # what trains in full is replaced when it is loaded
        found = changed_layers(view, base)
        assert found is None or all(
            view.get_submodule(name) is layer for name, layer in found.items()
        )
        return None if found is None else {*found}

    fc1 = {f"model.decoder.layers.{n}.fc1" for n in (0, 1)}
    assert changed("fc1") == fc1
    assert changed("fc1", saved=("lm_head",)) == {*fc1, "lm_head"}
    assert changed("fc1", rows={"embed_tokens": (3,)}) == {*fc1, "model.decoder.embed_tokens"}
    assert changed("fc1", saved=("final_layer_norm",)) is None, (
        "rows of a norm are not computed apart"
    )
