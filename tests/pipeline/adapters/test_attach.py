"""Attaching an adapter: which layers, what trains, PEFT's keys, and an adapter at any strength."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from pipeline.adapters.attach import (
    AdapterScale,
    adapter_layers,
    attach,
    disable_adapter,
    saves_embedding_or_head,
    short_targets,
    targeted,
    tensors,
)
from pipeline.adapters.config import PREFIX, AdapterSpec
from pipeline.adapters.lora import (
    DoRALinear,
    EmbeddingRows,
    HeadRows,
    LoRAEmbedding,
    LoRALinear,
    weight_of,
)
from pipeline.errors import UserError
from pipeline.files.patterns import one_budget
from pipeline.models.minigpt import MiniGPT
from pipeline.models.quantized_linear import quantize
from tests.helpers.checkpoints import small_minigpt

IDS = torch.tensor([[3, 7, 5, 11], [4, 4, 19, 2]])
EMBEDDING, HEAD = "model.decoder.embed_tokens", "lm_head"
BLOCK = "model.decoder.layers.1"


def spec_of(*targets: str, **options: Any) -> AdapterSpec:
    return AdapterSpec(2, 6.0, targets, **options)


def trainable_names(model: MiniGPT) -> set[str]:
    return {name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}


@torch.no_grad()
def changed(model: MiniGPT, spec: AdapterSpec) -> MiniGPT:
    """The model with an adapter, each number of which has been trained."""
    attach(model, spec)
    generator = torch.Generator().manual_seed(1)
    for p in tensors(model, spec).values():
        p.add_(torch.randn(p.shape, generator=generator) / 5)
    return model.eval()


# Which layers


def test_a_string_is_a_pattern_or_all_linear_and_the_embedding_is_meant_by_its_name_alone() -> None:
    model = small_minigpt()
    everything = targeted(model, spec_of("all-linear"))
    assert (
        targeted(model, AdapterSpec(2, 6.0, "all-linear")) == everything and len(everything) == 12
    )
    assert targeted(model, AdapterSpec(2, 6.0, r".*1.*fc\d")) == [f"{BLOCK}.fc1", f"{BLOCK}.fc2"]
    assert targeted(model, AdapterSpec(2, 6.0, r".*embed_tokens")) == [EMBEDDING]
    assert targeted(model, spec_of("embed_tokens", "layers.1.fc1")) == [EMBEDDING, f"{BLOCK}.fc1"]
    assert targeted(model, spec_of("fc1", excluded=("layers.0.fc1",))) == [f"{BLOCK}.fc1"]


def test_a_quantized_linear_is_one_too() -> None:
    plain, model = small_minigpt(), small_minigpt()
    quantize(model, "int8", None, torch.device("cpu"))
    assert targeted(model, spec_of("all-linear")) == targeted(plain, spec_of("all-linear"))


def test_what_leaves_no_layer_is_refused_unless_there_are_experts() -> None:
    with pytest.raises(
        UserError, match=r"\('fc1',\) matches no layer that is not excluded. Check exclude_modules"
    ):
        targeted(small_minigpt(), spec_of("fc1", excluded=("fc1",)))
    assert (
        targeted(
            small_minigpt(), spec_of("fc1", excluded=("fc1",), parameters=("experts.down_proj",))
        )
        == []
    )


def test_the_first_module_that_would_train_twice_is_named_in_the_order_of_names() -> None:
    with pytest.raises(UserError, match=rf"^target_modules: {BLOCK}.fc1 already trains in full"):
        attach(small_minigpt(), spec_of("fc2", "fc1", saved=("layers.1",)))
    with pytest.raises(UserError, match=r"embed_tokens already trains in full"):
        attach(small_minigpt(), spec_of("embed_tokens", rows={"embed_tokens": (3,)}))
    attach(
        small_minigpt(), spec_of("lm_head", rows={"embed_tokens": (3,)})
    )  # not tied: another matrix
    for more in ({"rows": {"embed_tokens": (3,)}}, {"saved": ("embed_tokens",)}):
        with pytest.raises(UserError, match=r"lm_head already trains in full"):
            attach(small_minigpt(tied=True), spec_of("lm_head", **more))


def test_a_pattern_of_targets_that_has_no_time_left_is_named_by_its_key() -> None:
    with one_budget([0.0]), pytest.raises(UserError, match=r"^target_modules: matching '.\*fc1'"):
        attach(small_minigpt(), AdapterSpec(2, 6.0, ".*fc1"))


def test_short_names_are_those_that_mean_the_same_modules() -> None:
    model = small_minigpt()
    both, one = [f"model.decoder.layers.{n}.fc1" for n in (0, 1)], [f"{BLOCK}.fc1"]
    assert short_targets(model, both) == ("fc1",)
    assert short_targets(model, one) == tuple(one)
    every = targeted(model, spec_of("attention"))
    assert short_targets(model, every) == ("k_proj", "out_proj", "q_proj", "v_proj")
    assert short_targets(model, [*reversed(both)]) == (both[1], both[0])


# What trains


@pytest.mark.parametrize("tied", [False, True])
def test_only_what_the_adapter_names_trains(tied: bool) -> None:
    for spec, own in (
        (spec_of("layers.1.fc1"), set[str]()),
        (spec_of("layers.1.fc1", saved=("final_layer_norm",)), None),
        (spec_of("layers.1.fc1", rows={"embed_tokens": (3,)}), {EMBEDDING}),
    ):
        model = small_minigpt(tied)
        attach(model, spec)
        found = trainable_names(model)
        assert {f"{BLOCK}.fc1.lora_A", f"{BLOCK}.fc1.lora_B"} <= found
        rest = {name for name in found if "lora" not in name}
        if own is None:
            assert rest and all("final_layer_norm." in name for name in rest)
        else:
            assert {name.removesuffix(".rows") for name in rest} == own | (
                {HEAD} if tied and own else set()
            )
        assert not any(name.endswith("base.weight") for name in found)


def test_factors_have_the_dtype_that_is_asked_for_and_the_ranks_and_scales_of_the_spec() -> None:
    for dtype, expected in ((None, torch.float32), (torch.bfloat16, torch.bfloat16)):
        model = small_minigpt()
        attach(
            model, spec_of("fc1", "embed_tokens", ranks={"layers.0.fc1": 3}, dropout=0.25), dtype
        )
        layers = dict(adapter_layers(model))
        assert [*layers] == [EMBEDDING, "model.decoder.layers.0.fc1", f"{BLOCK}.fc1"]
        assert {layer.lora_A.dtype for layer in layers.values()} == {
            layer.lora_B.dtype for layer in layers.values()
        }
        assert layers[EMBEDDING].lora_B.dtype == expected == layers[f"{BLOCK}.fc1"].lora_A.dtype
        assert [(layer.lora_A.shape[0], layer.scale) for layer in layers.values()] == [
            (2, 3.0),
            (3, 2.0),
            (2, 3.0),
        ]
        assert [layer.dropout for layer in layers.values() if isinstance(layer, LoRALinear)] == [
            0.25
        ] * 2


def test_dora_has_its_dropout_and_beginning_too() -> None:
    model = small_minigpt()
    attach(model, spec_of("fc1", dora=True, dropout=0.5), init="pissa")
    for _, layer in adapter_layers(model):
        assert isinstance(layer, DoRALinear) and layer.dropout == 0.5 and layer.subtracts_initial
    with pytest.raises(
        UserError,
        match=r"DoRA is for linears; model.decoder.embed_tokens is an embedding. Remove it",
    ):
        attach(small_minigpt(), spec_of("embed_tokens", dora=True))


@pytest.mark.parametrize(
    ("saved", "apart"),
    [(("embed_tokens",), True), (("lm_head",), True), (("embed_tokens", "lm_head"), False)],
)
def test_a_tied_pair_of_which_one_trains_is_untied(saved: tuple[str, ...], apart: bool) -> None:
    model, spec = small_minigpt(tied=True), spec_of("fc1", saved=saved)
    before = weight_of(model.head).detach().clone()
    attach(model, spec)
    embedding, head = weight_of(model.get_submodule(EMBEDDING)), weight_of(model.head)
    assert (embedding is not head) is apart is saves_embedding_or_head(model, spec)
    assert torch.equal(embedding, before) and torch.equal(head, before)
    assert (embedding.requires_grad, head.requires_grad) == (
        "embed_tokens" in saved,
        "lm_head" in saved,
    )
    assert {*tensors(model, spec)} >= {
        f"{PREFIX}{name}.weight" for name in (EMBEDDING, HEAD) if name.endswith(saved)
    }


def test_a_module_to_save_that_is_none_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"modules_to_save: no module of the model is named fc9. Use the end of a"
    ):
        attach(small_minigpt(), spec_of("fc1", saved=("final_layer_norm", "fc9")))


# Rows


def test_rows_start_as_the_bases_and_a_tied_pair_has_one_set_of_them() -> None:
    model, rows = small_minigpt(tied=True), {"embed_tokens": (3, 7)}
    before = model.embeddings(IDS).detach(), model(IDS).detach()
    attach(model, spec_of("fc1", rows=rows))
    table, head = model.get_submodule(EMBEDDING), model.get_submodule(HEAD)
    assert (
        isinstance(table, EmbeddingRows) and isinstance(head, HeadRows) and table.rows is head.rows
    )
    assert torch.equal(table.rows, weight_of(table.base)[[3, 7]])
    assert torch.equal(model.embeddings(IDS), before[0])
    assert_close(model(IDS), before[1])
    found = tensors(model, spec_of("fc1", rows=rows))
    assert [key for key in found if "token_adapter" in key] == [
        f"{PREFIX}{EMBEDDING}.token_adapter.trainable_tokens_delta"
    ]


def test_an_untied_pair_has_rows_of_its_own_each() -> None:
    model, spec = small_minigpt(), spec_of("fc1", rows={"embed_tokens": (3, 7), "lm_head": (5,)})
    attach(model, spec)
    table, head = model.get_submodule(EMBEDDING), model.get_submodule(HEAD)
    assert isinstance(table, EmbeddingRows) and isinstance(head, HeadRows)
    assert (table.rows.shape, head.rows.shape) == ((2, 16), (1, 16))
    assert torch.equal(head.rows, weight_of(head.base)[[5]])
    keys = {f"{PREFIX}{name}.token_adapter.trainable_tokens_delta" for name in (EMBEDDING, HEAD)}
    assert {key for key in tensors(model, spec) if "token_adapter" in key} == keys
    only = small_minigpt()
    attach(only, spec_of("fc1", rows={"lm_head": (5,)}))
    assert isinstance(only.get_submodule(EMBEDDING), nn.Embedding)


def test_tensors_have_pefts_keys_with_every_parameter_of_a_module_that_is_saved() -> None:
    model, spec = (
        small_minigpt(),
        spec_of("layers.1.fc1", "embed_tokens", saved=("decoder.final_layer_norm",)),
    )
    attach(model, spec)
    linear, table, norm = (
        f"{PREFIX}{name}" for name in (f"{BLOCK}.fc1", EMBEDDING, "model.decoder.final_layer_norm")
    )
    assert {*tensors(model, spec)} == {
        *(f"{linear}.lora_{end}.weight" for end in "AB"),
        *(f"{table}.lora_embedding_{end}" for end in "AB"),
        *(f"{norm}.{name}" for name in ("weight", "bias")),
    }


# At any strength


@torch.no_grad()
def weights_at(base: MiniGPT, tuned: MiniGPT, s: float) -> MiniGPT:
    """A plain model with W + s·(W′ − W) for all that the adapter changed."""
    plain = copy.deepcopy(base)
    for name, module in tuned.named_modules():
        if isinstance(module, LoRALinear):
            plain.get_parameter(f"{name}.weight").add_(
                s * module.scale * module.lora_B @ module.lora_A
            )
        elif isinstance(module, LoRAEmbedding):
            plain.get_parameter(f"{name}.weight").add_(
                s * module.scale * (module.lora_B @ module.lora_A).T
            )
        elif isinstance(module, EmbeddingRows | HeadRows):
            ids = module.ids if isinstance(module, HeadRows) else (module.slot >= 0).nonzero()[:, 0]
            order = range(len(ids)) if isinstance(module, HeadRows) else module.slot[ids]
            weight = plain.get_parameter(f"{name}.weight")
            weight[ids] = torch.lerp(weight[ids], module.rows[order], s)
        elif "norm" in name:
            for key, p in module.named_parameters():
                own = plain.get_parameter(f"{name}.{key}")
                own.copy_(torch.lerp(own, p, s))
    return plain.eval()


KINDS = {
    "linears and the embedding": spec_of("fc1", "embed_tokens"),
    "rows": spec_of("fc1", rows={"embed_tokens": (7, 3), "lm_head": (5,)}),
    "in full": spec_of("fc1", saved=("final_layer_norm",)),
}


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_at_a_strength_every_weight_moves_that_far_from_the_base_and_no_tensor_is_written_to(
    kind: str,
) -> None:
    base, spec = small_minigpt().eval(), KINDS[kind]
    tuned = changed(small_minigpt(), spec)
    own = {key: p.data for key, p in tensors(tuned, spec).items()}
    copies = {key: value.clone() for key, value in own.items()}
    expected = {s: weights_at(base, tuned, s)(IDS) for s in (0.0, 0.5, 2.0)}
    whole, strength = tuned(IDS), AdapterScale(tuned, base, spec)
    for s, logits in expected.items():
        strength.set(s)
        assert_close(tuned(IDS), logits, atol=1e-5, rtol=1e-5)
    assert_close(expected[0.0], base(IDS))
    strength.set(1)
    assert torch.equal(tuned(IDS), whole)
    assert all(torch.equal(own[key], value) for key, value in copies.items())
    assert all(
        p.data is own[key] or p.data.data_ptr() == own[key].data_ptr()
        for key, p in tensors(tuned, spec).items()
    )


@torch.no_grad()
def test_doras_change_of_each_output_is_scaled_and_beyond_one_too() -> None:
    base = nn.Linear(6, 5)
    layer = DoRALinear(base, 2, 1.0)
    layer.lora_B.normal_()
    x = torch.randn(3, 6)
    whole = layer(x)
    for s in (0.0, 0.25, 2.0):
        layer.strength = s
        assert_close(layer(x), base(x) + s * (whole - base(x)))


@torch.no_grad()
def test_disabled_it_is_the_base_even_where_the_block_fails() -> None:
    spec = KINDS["rows"]
    base, tuned = small_minigpt().eval(), changed(small_minigpt(), spec)
    whole: Tensor = tuned(IDS)
    with pytest.raises(KeyError), disable_adapter(tuned):
        assert torch.equal(tuned(IDS), base(IDS))
        raise KeyError
    assert torch.equal(tuned(IDS), whole) and not torch.equal(whole, base(IDS))
