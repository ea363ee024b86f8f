"""Many adapters on one base in one forward: outputs, gradients and counts of each are those that it
has alone.
"""

from collections.abc import Sequence
from zlib import crc32

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from pipeline.adapters.attach import attach, tensors
from pipeline.adapters.batched import (
    AdapterRouting,
    BatchedEmbedding,
    BatchedHead,
    BatchedLoRALinear,
    StackedParameters,
    attach_many,
    batched_layers,
    batched_lora_forward,
    lora_layers,
    only_adapter,
    trained_by,
)
from pipeline.adapters.config import AdapterSpec
from pipeline.adapters.lora import LoRALinear
from pipeline.models.minigpt import MiniGPT
from pipeline.project.params.sections import Init
from tests.helpers.checkpoints import small_minigpt, token_ids

ENDS = ("embed_tokens", "lm_head")
IDS = token_ids(20, 6, 5)  # (B, T)
Q = AdapterSpec(2, 3.0, ("q_proj",))
# whether the base's head is tied, and the adapters
GROUPS: dict[str, tuple[bool, tuple[AdapterSpec, ...]]] = {
    "ranks, scales, targets": (
        False,
        (Q, AdapterSpec(3, 1.0, ("q_proj", "fc1")), AdapterSpec(1, 4.0, ("fc1", "v_proj"))),
    ),
    "DoRA beside LoRA": (
        False,
        (Q, AdapterSpec(2, 3.0, ("q_proj",), dora=True), AdapterSpec(2, 3.0, ("v_proj",))),
    ),
    "in full": (False, (AdapterSpec(2, 3.0, ("q_proj",), saved=ENDS),) * 3),
    "in full, tied": (True, (AdapterSpec(2, 3.0, ("q_proj",), saved=ENDS),) * 3),
    "some in full": (True, (Q, AdapterSpec(2, 3.0, ("q_proj",), saved=("final_layer_norm",)), Q)),
    "rows": (True, (AdapterSpec(2, 3.0, ("q_proj",), rows={"embed_tokens": (3, 7)}), Q, Q)),
    "an embedding": (False, (AdapterSpec(2, 3.0, ("q_proj", "embed_tokens")), Q, Q)),
}
each_group = pytest.mark.parametrize("name", GROUPS)


def attached(model: MiniGPT, spec: AdapterSpec, seed: int, init: Init) -> MiniGPT:
    torch.manual_seed(seed)
    attach(model, spec, init=init)
    return model


def change(name: str, adapter: int, p: Tensor) -> None:
    """What one adapter trains is no longer what it began with."""
    p.add_(
        torch.randn(
            p.shape, generator=torch.Generator().manual_seed(crc32(f"{name} {adapter}".encode()))
        )
        / 5
    )


@torch.no_grad()
def alone(name: str, init: Init = "document") -> list[MiniGPT]:
    tied, specs = GROUPS[name]
    models = [
        attached(small_minigpt(tied, heads=2), spec, seed, init) for seed, spec in enumerate(specs)
    ]
    for n, model in enumerate(models):
        for own, p in model.named_parameters():
            if p.requires_grad:
                change(own, n, p)
    return models


@torch.no_grad()
def together(name: str, init: Init = "document") -> tuple[MiniGPT, AdapterRouting]:
    tied, specs = GROUPS[name]
    model, done = small_minigpt(tied, heads=2), set[int]()
    each = [
        lambda seed=seed, spec=spec: attached(model, spec, seed, init)
        for seed, spec in enumerate(specs)
    ]
    routing = attach_many(model, each)
    for path, layer in batched_layers(model).items():
        for key, p in layer.trained.items():
            if id(p) not in done:  # tied ones are one
                for n, shapes in enumerate(layer.shapes):
                    if key in shapes:
                        change(f"{path}.{key}", n, p[n][tuple(map(slice, shapes[key]))])
            done.add(id(p))
    return model, routing


def routed_logits(model: MiniGPT, routing: AdapterRouting, sequences: Sequence[int]) -> Tensor:
    with routing.route(tuple(count * IDS.shape[1] for count in sequences)):
        out: Tensor = model(IDS)
    return out


@pytest.mark.parametrize(
    "sequences", [(2, 2, 2), (3, 0, 3), (1, 2, 3), (0, 6, 0), (0, 1, 5)], ids=str
)
@each_group
def test_outputs_and_gradients_of_each_are_those_that_it_has_alone(
    name: str, sequences: tuple[int, ...]
) -> None:
    models, (model, routing) = alone(name), together(name)
    expected = torch.cat(
        [
            one(ids)
            for one, ids in zip(models, IDS.split_with_sizes([*sequences]), strict=True)
            if len(ids)
        ]
    )
    found = routed_logits(model, routing, sequences)
    assert_close(found, expected, atol=1e-5, rtol=1e-4)
    upstream = torch.linspace(-1, 1, found.numel()).view_as(found)
    torch.autograd.backward([found, expected], [upstream, upstream])
    assert batched_layers(model)
    for path, layer in batched_layers(model).items():
        for n, shapes in enumerate(layer.shapes):
            for key, shape in shapes.items():
                stacked, own = (
                    layer.trained[key].grad,
                    models[n].get_submodule(path).get_parameter(key).grad,
                )
                corner = tuple(map(slice, shape))
                if sequences[n]:
                    assert stacked is not None
                    assert_close(
                        stacked[n][corner], own, atol=1e-4, rtol=1e-3, msg=f"{path}.{key} of {n}"
                    )
                if stacked is not None:  # zeros of the padding and of who has no rows stay zeros
                    rest = stacked[n].clone()
                    if sequences[n]:
                        rest[corner] = 0
                    assert not rest.any()


@pytest.mark.parametrize("init", ["pissa", "kaiming"])
def test_however_it_begins(init: Init) -> None:
    models, (model, routing) = (
        alone("ranks, scales, targets", init),
        together("ranks, scales, targets", init),
    )
    expected = torch.cat(
        [one(ids) for one, ids in zip(models, IDS.split_with_sizes([2, 2, 2]), strict=True)]
    )
    assert_close(routed_logits(model, routing, (2, 2, 2)), expected, atol=1e-5, rtol=1e-4)


@each_group
@torch.no_grad()
def test_the_base_keeps_its_numbers_and_what_trains_is_stacked_once(name: str) -> None:
    base, (model, routing) = small_minigpt(GROUPS[name][0], heads=2), together(name)
    with routing.base():
        assert torch.equal(model(IDS), base(IDS))
    with routing.route((IDS.numel(), 0, 0)):
        assert routing.counts == (IDS.numel(), 0, 0)
        with routing.base():
            assert torch.equal(model(IDS), base(IDS))
        assert not routing.off
    assert routing.counts == (0, 0, 0)
    parts = [
        p
        for layer in batched_layers(model).values()
        for part in layer.parts
        for p in part.parameters(recurse=False)
    ]
    assert not any(p.requires_grad for p in parts)
    stacked = {id(p) for layer in batched_layers(model).values() for p in layer.trained.values()}
    assert {id(p) for p in model.parameters() if p.requires_grad} == stacked
    copies = [
        part.get_parameter(key)
        for layer in batched_layers(model).values()
        for part, own in zip(layer.parts, layer.shapes, strict=True)
        for key in own
    ]
    assert copies and not any(p.numel() for p in copies), "no second copy of what is stacked"
    for n, one in enumerate(alone(name)):
        assert trained_by(model, n) == sum(p.numel() for p in one.parameters() if p.requires_grad)


@each_group
@torch.no_grad()
def test_one_of_them_is_a_model_with_one_adapter(name: str) -> None:
    models, model = alone(name), together(name)[0]
    before = batched_layers(model)
    for n, one in enumerate(models):
        with pytest.raises(KeyError), only_adapter(model, n):
            assert_close(model(IDS), one(IDS), atol=1e-5, rtol=1e-4)
            found, own = tensors(model, GROUPS[name][1][n]), tensors(one, GROUPS[name][1][n])
            assert found.keys() == own.keys() and all(
                torch.equal(found[key], own[key]) for key in own
            )
            assert [(0, path) for path, _ in linears(one)] == [
                (k, path) for k, path, _ in lora_layers(model)
            ]
            raise KeyError
    assert batched_layers(model) == before
    found_by_number = [(n, path) for n, path, _ in lora_layers(model)]
    assert sorted(found_by_number) == sorted(
        (n, path) for n, one in enumerate(models) for path, _ in linears(one)
    )


def linears(model: MiniGPT) -> list[tuple[str, LoRALinear]]:
    return [
        (name, module) for name, module in model.named_modules() if isinstance(module, LoRALinear)
    ]


# The layers


def test_only_adapters_with_rows_are_live_and_even_means_as_many_rows_each() -> None:
    routing = AdapterRouting(3)
    stacked = torch.arange(6.0).view(3, 2)
    for counts, live, even in (
        ((2, 2, 2), [0, 1, 2], True),
        ((4, 0, 4), [0, 2], True),
        ((1, 2, 0), [0, 1], False),
    ):
        with routing.route(counts):
            assert (routing.live, routing.even) == (live, even)
            assert torch.equal(routing.select_live(stacked), stacked[live])
            assert torch.equal(routing.select_live(stacked[:, :1]), stacked[live, :1]), (
                "of every layer"
            )
    assert (routing.live, routing.even) == ([], False)


def lora(base: nn.Module, rank: int, scale: float, dropout: float = 0.0) -> LoRALinear:
    layer = LoRALinear(base, rank, scale, dropout=dropout)
    nn.init.normal_(layer.lora_B)
    nn.init.normal_(layer.lora_A)
    return layer


@pytest.fixture
def base() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(8, 6).requires_grad_(False)


def test_dropout_drops_of_each_what_its_own_layer_drops(base: nn.Linear) -> None:
    parts = [lora(base, 2, 0.5, 0.25), lora(base, 3, 2.0), lora(base, 1, 1.0, 0.5), None]
    kept = torch.tensor([1, 0, 1, 1, 0, 0, 1, 1], dtype=torch.bool)

    def keep(x: Tensor) -> Tensor:
        assert len(x), "of an adapter without rows nothing is drawn"
        return kept.expand(x.shape)

    for part in (parts[0], parts[2]):
        assert part is not None
        part.keep = keep
    routing, x = AdapterRouting(4), torch.randn(4, 4, 8)
    many = BatchedLoRALinear(base, parts, routing, StackedParameters())
    alone = [base if part is None else part for part in parts]
    for counts in ((4, 4, 4, 4), (4, 0, 8, 4), (0, 0, 0, 16)):
        with routing.route(counts):
            assert many.linear_update() is None
            shares = zip(alone, x.flatten(0, 1).split_with_sizes([*counts]), strict=True)
            expected = torch.cat([layer(rows) for layer, rows in shares if len(rows)])
            assert_close(many(x), expected.view(4, 4, 6))


@torch.no_grad()
def test_kernels_get_factors_whose_product_holds_each_adapters_scale(base: nn.Linear) -> None:
    routing, x = AdapterRouting(3), torch.randn(3, 4, 8)
    for scales in ((0.5, 0.5, 0.5), (0.5, 2.0, 1.0)):
        parts = [lora(base, rank, scale) for rank, scale in enumerate(scales, 1)]
        many = BatchedLoRALinear(base, parts, routing, StackedParameters())
        for counts, live in (((4, 4, 4), [0, 1, 2]), ((6, 0, 6), [0, 2])):
            with routing.route(counts):
                found = many.linear_update()
                assert found is not None and found.base is base
                assert (found.A.shape, found.B.shape) == ((len(live), 3, 8), (len(live), 6, 3))
                product = found.scale * found.B @ found.A
                assert_close(
                    product,
                    torch.stack([parts[n].scale * parts[n].lora_B @ parts[n].lora_A for n in live]),
                )
                shares = zip(live, x.view(len(live), -1, 8), strict=True)
                assert_close(
                    many(x).view(len(live), -1, 6),
                    torch.stack([parts[n](rows) for n, rows in shares]),
                )
        with routing.route((1, 3, 8)):
            assert many.linear_update() is None
        with routing.route((4, 4, 4)), routing.base():
            assert many.linear_update() is None and torch.equal(many(x), base(x))


def test_a_base_without_bias_or_of_another_kind_gives_the_same(base: nn.Linear) -> None:
    A, B, scales = (
        torch.randn(2, 3, 8),
        torch.randn(2, 6, 3),
        torch.tensor([0.5, 2.0]).view(2, 1, 1),
    )
    x = torch.randn(2, 4, 8)
    for other in (base, nn.Linear(8, 6, bias=False), nn.Sequential(base)):
        expected = other(x) + scales * (x @ A.mT @ B.mT)
        assert_close(batched_lora_forward(x, other, A, B, scales), expected)
    routing = AdapterRouting(2)
    many = BatchedLoRALinear(
        nn.Sequential(base), [lora(base, 1, 1.0)] * 2, routing, StackedParameters()
    )
    with routing.route((4, 4)):
        assert many.linear_update() is None


@pytest.mark.parametrize("counts", [(4, 4, 4), (6, 0, 6), (1, 3, 8)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_heads_have_their_own_weights_and_biases(
    base: nn.Linear, bias: bool, counts: tuple[int, ...]
) -> None:
    base = base if bias else nn.Linear(8, 6, bias=False)
    heads, routing = [nn.Linear(8, 6, bias) for _ in range(3)], AdapterRouting(3)
    x = torch.randn(12, 8, requires_grad=True)
    expected = torch.cat(
        [head(rows) for head, rows in zip(heads, x.split_with_sizes([*counts]), strict=True)]
    )
    many = BatchedHead(base, heads, routing, StackedParameters())
    with routing.route(counts):
        found = many(x.view(3, 4, 8)).flatten(0, 1)
    assert_close(found, expected)
    upstream = torch.randn(12, 6)
    (given,) = torch.autograd.grad(expected, x, upstream, retain_graph=True)
    torch.autograd.backward([found, expected], [upstream, upstream])
    assert_close(x.grad, 2 * given), "its own input's gradient, twice"
    for n in (n for n, count in enumerate(counts) if count):
        for key, p in many.trained.items():
            assert p.grad is not None
            assert_close(p.grad[n], heads[n].get_parameter(key).grad)


@pytest.mark.parametrize("counts", [(4, 4, 4), (6, 0, 6), (1, 3, 8)], ids=str)
def test_embeddings_have_their_own_tables(counts: tuple[int, ...]) -> None:
    base, routing = nn.Embedding(6, 8), AdapterRouting(3)
    tables, ids = (
        [nn.Embedding(6, 8) for _ in range(3)],
        torch.randint(6, (12,), generator=torch.Generator().manual_seed(1)),
    )
    many = BatchedEmbedding(base, tables, routing, StackedParameters())
    with routing.route(counts):
        found = many(ids.view(3, 4))
    assert found.shape == (3, 4, 8)
    expected = torch.cat(
        [table(own) for table, own in zip(tables, ids.split_with_sizes([*counts]), strict=True)]
    )
    assert torch.equal(found.flatten(0, 1), expected)


def test_stacked_tensors_are_padded_with_zeros_and_shared_where_the_adapters_share_them() -> None:
    stacks, wide, narrow = StackedParameters(), torch.ones(2, 3), torch.full((1, 3), 2.0)
    stacked = stacks.stack([narrow, None, wide])
    assert torch.equal(
        stacked, torch.tensor([[[2.0] * 3, [0.0] * 3], [[0.0] * 3] * 2, [[1.0] * 3] * 2])
    )
    assert (
        stacks.stack([narrow, None, wide]) is stacked
        and stacks.stack([wide, None, narrow]) is not stacked
    )
    assert stacked.requires_grad and isinstance(stacked, nn.Parameter)
