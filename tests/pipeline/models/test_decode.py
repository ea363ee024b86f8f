"""Generation's one token at a time against the model's own forward."""

import copy
import gc
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from pipeline.adapters.attach import adapter_layers, attach, disable_adapter
from pipeline.adapters.config import AdapterSpec
from pipeline.adapters.lora import LoRALinear
from pipeline.adapters.mixed import MixedAdapter, MixedLayer, RowRouting
from pipeline.models.generate import generate, last_states
from pipeline.models.kernels import decode, native
from pipeline.models.kernels.decode import SHORT, fast_decoding, reads_pages
from pipeline.models.pages import PackedCache, PagePool, SequenceCache
from pipeline.models.transformers_model import TransformersModel, from_config
from tests.helpers.families import FAMILIES, OTHERS

COMMON = {  # multiples of 32, as native.c and oneDNN take them
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
SHAPED: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},  # biases of q, k, v alone
    "qwen3": {},  # norms of the heads
    "mistral": {"sliding_window": 6},
    "biased": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "alone": {"model_type": "llama", "num_key_value_heads": 4},  # a head for each group
}
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
Route = Callable[[Sequence[int], Sequence[int]], None]
needs_native = pytest.mark.skipif(native.native() is None, reason="no compiler here")


@pytest.fixture(params=["tiles", "vectors"])
def products(request: pytest.FixtureRequest) -> Iterator[str]:
    """With AMX, if this CPU has it, and without."""
    wanted = request.param == "tiles"
    library = native.native()
    if wanted and not native.uses_tiles():
        pytest.skip("this CPU has no AMX")
    if library is not None:
        library.use_tiles(int(wanted))
    yield request.param
    if library is not None:
        library.use_tiles(1)


def model_of(kind: str, **settings: Any) -> TransformersModel:
    torch.manual_seed(0)
    common = COMMON if "n_layer" not in settings else {}
    model = from_config(
        {"model_type": kind, "vocab_size": 120, "pad_token_id": 0, **common, **settings},
        torch.bfloat16,
    ).eval()
    for name, p in model.named_parameters():
        # sums that bf16 rounds alike, whatever their order
        is_norm = p.dim() == 1 and "norm" in name
        nn.init.normal_(p, float(is_norm), 0.1)
    return model


@torch.no_grad()
def together(
    model: TransformersModel,
    rows: list[list[int]],
    prompts: list[int],
    route: Route = lambda _rows, _lengths: None,
) -> list[Tensor]:
    """Hidden states (T, D) of each row after its prompt, of one token of each row at a time.

    `route` gets the rows of each forward, and how many tokens of each it reads.
    """
    pool = PagePool(16)
    sequences = [SequenceCache(pool, len(row)) for row in rows]
    states: list[list[Tensor]] = [[] for _ in rows]
    done = [0] * len(rows)
    while True:
        live = [n for n, row in enumerate(rows) if done[n] < len(row)]
        if not live:
            return [torch.stack(read).float() for read in states]
        stops = {n: done[n] + 1 if done[n] else prompts[n] for n in live}
        parts = [rows[n][done[n] : stops[n]] for n in live]
        route(live, [len(part) for part in parts])
        cache = PackedCache([sequences[n] for n in live], [len(part) for part in parts])
        for n, state in zip(live, last_states(model, cache, parts), strict=True):
            states[n].append(state.clone())
            done[n] = stops[n]
        cache.advance()


def step_by_step(model: TransformersModel, ids: list[int], prompt: int) -> Tensor:
    """Hidden states of ids from the last of `prompt` on, one at a time."""
    return together(model, [ids], [prompt])[0]


def some_ids(count: int, seed: int = 1) -> list[int]:
    return torch.randint(1, 100, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def by_transformers(model: TransformersModel, ids: list[int], prompt: int) -> Tensor:
    """`step_by_step` with transformers' cache."""
    cache, parts = model.new_cache(), [ids[:prompt], *([id_] for id_ in ids[prompt:])]
    states = [model.hidden_states(torch.tensor([part]), cache=cache)[0, -1] for part in parts]
    return torch.stack(states).float()


@torch.no_grad()
def both(
    model: TransformersModel,
    read: Callable[[TransformersModel, list[int], int], Tensor] = step_by_step,
) -> tuple[Tensor, Tensor, int]:
    """With and without; how many modules were changed."""
    ids = some_ids(24)
    wanted = by_transformers(model, ids, 5)
    with fast_decoding(model) as count:
        if not count:
            pytest.skip("this build of torch packs no weights")
        found = read(model, ids, 5)
    assert not any("forward" in module.__dict__ for module in model.modules())
    return found, wanted, count


def assert_alike(found: Tensor, wanted: Tensor) -> None:
    assert (found - wanted).norm() < 0.02 * wanted.norm()


def shaped(kind: str) -> TransformersModel:
    settings = {**SHAPED[kind]}
    return model_of(settings.pop("model_type", kind), **settings)


@needs_native
@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("kind", SHAPED)
def test_blocks_for_one_token_are_the_same_blocks(kind: str) -> None:
    model = shaped(kind)
    found, wanted, count = both(model)
    assert_alike(found, wanted)
    assert count == 3 * 7 + 2
    with fast_decoding(model):
        assert reads_pages(model)


@needs_native
@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("kind", ["llama", "mistral", "alone"])
def test_a_sequence_gets_the_bits_beside_others_that_it_gets_alone(kind: str) -> None:
    """Ragged: rows and prompts differ in length, and there are more rows than a tile has."""
    model = shaped(kind)
    rows = [some_ids(8 + 3 * n, n) for n in range(19)]
    prompts = [2 + n % 7 for n in range(19)]
    with fast_decoding(model):
        beside = together(model, rows, prompts)
        before = torch.get_num_threads()
        try:
            for threads in (1, 2):
                torch.set_num_threads(threads)
                for n in (0, 5, 18):
                    alone = step_by_step(model, rows[n], prompts[n])
                    assert_close(beside[n], alone, rtol=0, atol=0)
        finally:
            torch.set_num_threads(before)


ROPE = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}
GROWING = {**ROPE, "llama_4_scaling_beta": 2.0, "original_max_position_embeddings": 8}


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("llama", {}),
        ("mistral", {"sliding_window": 6}),
        # of its layers one has the config's window
        ("qwen2", {"sliding_window": 6, "use_sliding_window": True, "max_window_layers": 2}),
        # queries that grow with their position
        (
            "ministral3",
            {"rope_parameters": GROWING, "max_position_embeddings": 32, "sliding_window": None},
        ),
    ],
)
@torch.no_grad()
def test_several_sequences_at_once_are_read_as_each_alone(
    kind: str, settings: dict[str, Any]
) -> None:
    model = model_of(kind, **settings)
    rows = [some_ids(24, seed) for seed in range(2)]
    wanted = [model.hidden_states(torch.tensor([row]))[0].float() for row in rows]
    with fast_decoding(model):
        found = together(model, rows, [1, 1])
    for read, alone in zip(found, wanted, strict=True):
        assert_alike(read, alone)


@pytest.mark.parametrize("name", [*FAMILIES, *OTHERS])
def test_every_family_reads_on_as_it_did(name: str) -> None:
    family = (FAMILIES | OTHERS)[name]
    found, wanted, _ = both(model_of(family.kind, **family.config), by_transformers)
    assert_alike(found, wanted)


@pytest.mark.parametrize(
    "targets", [("v_proj",), ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj")]
)
def test_an_adapter_is_counted_and_one_that_comes_later_too(targets: tuple[str, ...]) -> None:
    model = model_of("llama")
    before = both(model)[0]
    attach(model, AdapterSpec(4, 8, targets))
    for _, layer in adapter_layers(model):
        nn.init.normal_(layer.lora_B, 0.3)
    found, wanted, _ = both(model)
    assert_alike(found, wanted)
    assert (found - before).norm() > 0.1 * before.norm()


def with_lora(
    model: TransformersModel, rank: int, targets: tuple[str, ...] = LINEARS, **options: Any
) -> TransformersModel:
    """A copy whose updates are as large as the products to which they are added."""
    adapted = copy.deepcopy(model)
    attach(adapted, AdapterSpec(rank, 2.0 * rank, targets), **options)
    torch.manual_seed(rank)
    for _, layer in adapter_layers(adapted):
        nn.init.normal_(layer.lora_A, std=0.1)
        nn.init.normal_(layer.lora_B, std=0.5 * rank**-0.5)
    return adapted


@torch.no_grad()
def in_fp32(model: TransformersModel, ids: list[int]) -> Tensor:
    """Hidden states (T, D) by torch, each weight, A and B with the numbers it has in bf16."""
    wide = copy.deepcopy(model).bfloat16().float()
    return wide.hidden_states(torch.tensor([ids]))[0]


@needs_native
@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rank", [1, 3, 8, 16, 64])
def test_native_updates_of_any_rank_are_those_of_torch_in_fp32(
    rank: int, dtype: torch.dtype
) -> None:
    base, ids = model_of("llama"), some_ids(12)
    model = with_lora(base, rank, dtype=dtype)
    wanted = in_fp32(model, ids)
    with fast_decoding(model):
        assert reads_pages(model)
        assert_alike(step_by_step(model, ids, 1), wanted)
    assert (in_fp32(base, ids) - wanted).norm() > 0.3 * wanted.norm()


@needs_native
@pytest.mark.usefixtures("products")
def test_rows_of_any_adapters_get_the_bits_that_they_get_alone() -> None:
    """Rows of five ranks, of a second strength, of DoRA and of no adapter."""
    base, routing = model_of("biased", **SHAPED["biased"]), RowRouting()
    ranks, targets = (64, 1, 3, 16, 8), (LINEARS, LINEARS[1:4], LINEARS, LINEARS[4:], LINEARS)
    models = [with_lora(base, *pair) for pair in zip(ranks, targets, strict=True)]
    dora = copy.deepcopy(base)
    attach(dora, AdapterSpec(4, 8, LINEARS, dora=True))
    layers = [dict(adapter_layers(model)) for model in (*models, dora)]
    adapters = [None, *map(MixedAdapter, layers), MixedAdapter(layers[0], 0.5)]
    mixed = copy.deepcopy(base)
    for name in layers[0]:
        mixed.set_submodule(name, MixedLayer(mixed.get_submodule(name), name, routing))
    owners = [0, 0, 1, 1, 1, 2, 3, 7, 4, 5, 5, 6]
    rows = [some_ids(6, n) for n in range(len(owners))]

    def route_to(owners: Sequence[int]) -> Route:
        return lambda live, lengths: routing.route([adapters[owners[n]] for n in live], lengths)

    with fast_decoding(mixed):
        assert reads_pages(mixed)
        beside = together(mixed, rows, [1] * len(rows), route_to(owners))
        before = torch.get_num_threads()
        try:
            for n, owner in enumerate(owners):
                torch.set_num_threads(1 + n % 3)
                (alone,) = together(mixed, [rows[n]], [1], route_to([owner]))
                if owner == 6:
                    assert_alike(beside[n], alone)  # DoRA's products are torch's
                else:
                    assert_close(beside[n], alone, rtol=0, atol=0)
                if owner < 6:
                    assert_alike(alone, in_fp32([base, *models][owner], rows[n]))
        finally:
            torch.set_num_threads(before)
        # the adapter of the last step is unloaded
        left = weakref.ref(next(iter(layers[-1].values())))
        routing.clear()
        adapters.clear()
        del dora, layers[-1]
        gc.collect()
        assert left() is None
    for layer in layers[0].values():
        layer.scale *= 0.5
    assert_alike(beside[owners.index(7)], in_fp32(models[0], rows[owners.index(7)]))


def _replace_factor(layer: LoRALinear) -> None:
    layer.lora_B = nn.Parameter(layer.lora_B.detach() * -0.5)


def _scale(layer: LoRALinear) -> None:
    layer.scale *= 0.5


def _write(layer: LoRALinear) -> None:
    layer.lora_A.neg_()


def _set_data(layer: LoRALinear) -> None:
    """With the columns in memory one after the other."""
    layer.lora_A.data = layer.lora_A.data.flip(0).T.contiguous().T
    layer.lora_B.data = layer.lora_B.data.T.contiguous().T


@needs_native
@pytest.mark.parametrize("change", [_scale, _write, _replace_factor, _set_data])
@torch.no_grad()
def test_an_adapter_that_changes_between_two_tokens_is_read_again(
    change: Callable[[LoRALinear], None],
) -> None:
    model, ids = with_lora(model_of("llama"), 4), some_ids(6)
    twin = copy.deepcopy(model)
    layers = [
        layer
        for part in (model, twin)
        for _, layer in adapter_layers(part)
        if isinstance(layer, LoRALinear)
    ]
    with fast_decoding(model):
        assert reads_pages(model)
        before = step_by_step(model, ids, 1)
        for _ in range(3):  # freed memory may be used again
            for layer in layers:
                change(layer)
            after = step_by_step(model, ids, 1)
            assert_alike(after, in_fp32(twin, ids))
            assert (after - before).norm() > 0.05 * before.norm()
            before = after
        with disable_adapter(model):
            disabled = step_by_step(model, ids, 1)
        assert_close(step_by_step(model, ids, 1), after, rtol=0, atol=0)
    assert_alike(disabled, step_by_step(model_of("llama"), ids, 1))


def test_weights_that_change_are_packed_anew() -> None:
    model = model_of("llama")
    both(model)
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.up_proj.weight").mul_(3)
        model.get_parameter("model.layers.0.self_attn.k_proj.weight").neg_()
    assert_alike(*both(model)[:2])


def test_a_block_that_is_put_together_otherwise_is_left_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = LlamaDecoderLayer.forward
    monkeypatch.setattr(
        LlamaDecoderLayer, "forward", lambda *given, **named: plain(*given, **named) * 0.5
    )
    found, wanted, count = both(model_of("llama"))
    assert_alike(found, wanted)
    assert count == 3 * 7 + 1


def test_two_generations_from_one_model_do_not_disturb_each_other() -> None:
    model = model_of("llama")
    alone = [list(generate(model, prompt, (), 12)) for prompt in ([3, 4, 5], [9, 8])]
    first, second = (generate(model, prompt, (), 12) for prompt in ([3, 4, 5], [9, 8]))
    together = [[next(first)], [next(second)]]
    for _ in range(6):
        together[0].append(next(first))
        together[1].append(next(second))
    together[0] += list(first)
    together[1] += list(second)
    assert together == alone
    assert not any("forward" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("bias", [True, False])
def test_packed_linears_multiply_as_the_plain_ones(bias: bool) -> None:
    model = nn.Sequential(
        nn.Linear(32, 64, bias=bias), nn.SiLU(), nn.Linear(64, 8, bias=bias)
    ).bfloat16()
    x = torch.randn(1, 3, 32, dtype=torch.bfloat16)
    with torch.no_grad():
        wanted = model(x)
        with fast_decoding(model) as count:
            if not count:
                pytest.skip("this build of torch packs no weights")
            assert count == 2
            assert_close(model(x), wanted, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("inputs", [64, SHORT, SHORT + 32, 2048])
def test_a_row_is_summed_alone_as_beside_others(
    inputs: int, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # sums that cancel: what is left of them is the rounding of their order
    half, rows = torch.randn(96, inputs // 2).bfloat16(), torch.randn(5, inputs // 2).bfloat16()
    if packed:
        monkeypatch.setattr(decode, "uses_tiles", lambda: False)
    linear = nn.Linear(inputs, 96, bias=False, dtype=torch.bfloat16)
    linear.weight.data = torch.cat([half, -half.flip(1)], 1)
    x = torch.cat([rows, rows.flip(1)], 1)
    with torch.no_grad(), fast_decoding(linear) as count:
        if not count:
            pytest.skip("this build of torch packs no weights")
        together = linear(x)
        assert together.abs().max() > 0
        assert_close(torch.cat([linear(x[n : n + 1]) for n in range(5)]), together, rtol=0, atol=0)


def test_linears_in_fp32_are_not_packed() -> None:
    with fast_decoding(nn.Sequential(nn.Linear(4, 4))) as count:
        assert count == 0
