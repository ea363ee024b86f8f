"""An adapter's two files: what is written there, what a model or its skeleton gets of it, and what
is refused.
"""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close

from pipeline.adapters.attach import adapter_layers, attach, read_tensors, tensors
from pipeline.adapters.config import PREFIX, AdapterSpec
from pipeline.adapters.lora import LoRALinear, weight_of
from pipeline.adapters.peft import load_adapter, save_adapter, stored_spec
from pipeline.adapters.virtual import attach_virtual_tokens, save_virtual
from pipeline.errors import UserError
from pipeline.models.minigpt import MiniGPT
from tests.helpers.checkpoints import edit_adapter_config, small_minigpt
from tests.helpers.errors import user_error
from tests.helpers.json_files import read_json
from tests.helpers.stand_in import to_stand_in

IDS = torch.tensor([[3, 7, 5, 11], [4, 4, 19, 2]])
BASE = Path("base")
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
EMBEDDING = "model.decoder.embed_tokens"


def model_of(tied: bool = False, seed: int = 0) -> MiniGPT:
    return small_minigpt(tied, seed, heads=2, max_positions=12).eval()


@torch.no_grad()
def adapter(
    folder: Path, spec: AdapterSpec, tied: bool = False, dtype: torch.dtype | None = None
) -> MiniGPT:
    """A model with an adapter of random numbers, saved in `folder`."""
    model = model_of(tied)
    attach(model, spec, dtype)
    generator = torch.Generator().manual_seed(1)
    for p in tensors(model, spec).values():
        p.add_(torch.randn(p.shape, generator=generator).to(p.dtype) / 5)
    save_adapter(folder, model, spec, "base")
    return model


def change(folder: Path, values: Mapping[str, Tensor | None]) -> None:
    changed = {**load_file(folder / WEIGHTS), **values}
    save_file({key: value for key, value in changed.items() if value is not None}, folder / WEIGHTS)


SPECS = {
    "linears": AdapterSpec(2, 3.0, ("fc1", "q_proj"), ranks={"layers.1.fc1": 3}, rslora=True),
    "DoRA": AdapterSpec(2, 3.0, ("q_proj",), dora=True),
    "an embedding": AdapterSpec(2, 3.0, ("embed_tokens", "q_proj")),
    "rows": AdapterSpec(2, 3.0, ("q_proj",), rows={"embed_tokens": (3, 19)}),
    "both ends": AdapterSpec(2, 3.0, ("q_proj",), saved=("embed_tokens", "lm_head")),
    "the head": AdapterSpec(2, 3.0, ("q_proj",), saved=("lm_head",)),
}
each_spec = pytest.mark.parametrize("name", SPECS)
each_tie = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])


@each_tie
@each_spec
@torch.no_grad()
def test_a_model_gets_what_was_saved_and_one_that_shares_its_tensors_is_left_alone(
    name: str, tied: bool, tmp_path: Path
) -> None:
    trained = adapter(tmp_path, SPECS[name], tied)
    base = model_of(tied)
    before, view = base(IDS), copy.deepcopy(base)
    for p, own in zip(view.parameters(), base.parameters(), strict=True):
        p.data = own.data
    spec = load_adapter(view, BASE, tmp_path)
    assert spec == SPECS[name]
    assert torch.equal(view(IDS), trained(IDS)) and not torch.equal(view(IDS), before)
    assert torch.equal(base(IDS), before)
    assert not any(p.requires_grad for p in view.parameters())
    save_adapter(tmp_path, view, spec, "base")
    assert torch.equal(trained(IDS), view(IDS))


@each_spec
@torch.no_grad()
def test_a_skeleton_gets_the_numbers_of_the_adapter_alone(name: str, tmp_path: Path) -> None:
    adapter(tmp_path, SPECS[name])
    skeleton = to_stand_in(model_of())
    load_adapter(skeleton, BASE, tmp_path)
    stored = load_file(tmp_path / WEIGHTS)
    found = tensors(skeleton, SPECS[name])
    assert found.keys() == stored.keys() and found
    assert all(torch.equal(found[key], value) for key, value in stored.items())
    own = {id(p) for p in found.values()}
    assert all(p.is_meta for p in skeleton.parameters() if id(p) not in own)


@torch.no_grad()
def test_factors_keep_the_dtype_of_the_file(tmp_path: Path) -> None:
    trained = adapter(tmp_path, SPECS["linears"], dtype=torch.bfloat16)
    model = model_of()
    load_adapter(model, BASE, tmp_path)
    assert {layer.lora_A.dtype for _, layer in adapter_layers(model)} == {torch.bfloat16}
    assert model.dtype == torch.float32 and torch.equal(model(IDS), trained(IDS))
    half = model_of().bfloat16()
    adapter(tmp_path, SPECS["an embedding"])
    load_adapter(half, BASE, tmp_path)
    assert {
        p.dtype for _, layer in adapter_layers(half) for p in layer.adapter_parameters().values()
    } == {torch.float32}


def test_pissa_is_stored_as_a_pair_of_twice_the_rank(tmp_path: Path) -> None:
    spec, model = SPECS["linears"], model_of()
    attach(model, spec, init="pissa")
    assert stored_spec(model, spec) == spec.doubled()
    for _, layer in adapter_layers(model):
        torch.nn.init.normal_(layer.lora_B)
    save_adapter(tmp_path, model, spec, "base")
    again = model_of()
    assert load_adapter(again, BASE, tmp_path) == spec.doubled()
    assert_close(again(IDS), model(IDS), atol=1e-5, rtol=1e-4)
    assert all(
        isinstance(layer, LoRALinear) and not layer.subtracts_initial
        for _, layer in adapter_layers(again)
    )
    plain = model_of()
    attach(plain, spec)
    assert stored_spec(plain, spec) is spec


# What is refused


def test_numbers_must_be_finite_floating_point(tmp_path: Path) -> None:
    adapter(tmp_path, SPECS["linears"])
    values = read_tensors(tmp_path)
    assert values.keys() == load_file(tmp_path / WEIGHTS).keys()
    key = next(iter(values))
    for bad, message in (
        (
            torch.ones(2, 2, dtype=torch.int32),
            "must hold floating point numbers, got int32. Copy it again.",
        ),
        (
            torch.tensor([1.0, torch.inf]),
            "is not finite. Train the adapter again with a lower learning_rate.",
        ),
    ):
        change(tmp_path, {key: bad})
        said = user_error(read_tensors, tmp_path)
        assert said == f"{tmp_path / WEIGHTS}: {key} {message}"
    (tmp_path / WEIGHTS).rename(tmp_path / "adapter_model.bin")
    with pytest.raises(UserError, match="is a pickle"):
        read_tensors(tmp_path)


A0 = f"{PREFIX}model.decoder.layers.0.self_attn.q_proj.lora_A.weight"
TABLE = f"{PREFIX}{EMBEDDING}.base_layer.weight"


@pytest.mark.parametrize(
    ("name", "config", "values", "message"),
    [
        ("linears", {}, {A0: None}, f"{WEIGHTS} does not fit: missing {A0}"),
        ("linears", {}, {"more": torch.ones(1)}, f"{WEIGHTS} does not fit: not expected more"),
        ("linears", {"r": 10**6}, {}, "has shape [2, 16], expected [1000000, 16]"),
        (
            "an embedding",
            {"r": 10**6},
            {},
            "lora_embedding_A has shape [2, 20], expected [1000000, 20]",
        ),
        ("linears", {"r": 3, "rank_pattern": {}}, {}, "has shape [2, 16], expected [3, 16]"),
        (
            "rows",
            {"trainable_token_indices": [3, 20]},
            {},
            "trains row 20, but base has 20 rows. Pass the base",
        ),
        (
            "rows",
            {"trainable_token_indices": {"fc1": [3]}},
            {},
            "may name embed_tokens and lm_head only, got fc1",
        ),
        (
            "an embedding",
            {},
            {TABLE: torch.ones(20, 16)},
            f"contains its own {EMBEDDING}.weight, which differs",
        ),
        (
            "an embedding",
            {},
            {TABLE: torch.ones(21, 16)},
            f"contains its own {EMBEDDING}.weight, which differs",
        ),
        ("linears", {"peft_type": "LOHA"}, {}, "peft_type must be LORA"),
    ],
)
def test_what_does_not_fit_is_refused(
    name: str,
    config: dict[str, Any],
    values: dict[str, Tensor | None],
    message: str,
    tmp_path: Path,
) -> None:
    adapter(tmp_path, SPECS[name])
    edit_adapter_config(tmp_path, **config)
    change(tmp_path, values)
    assert message in user_error(load_adapter, model_of(), BASE, tmp_path)


def test_a_file_without_any_factor_is_refused_by_the_first_that_is_missing(tmp_path: Path) -> None:
    adapter(tmp_path, SPECS["linears"])
    save_file({"norm.weight": torch.ones(3)}, tmp_path / WEIGHTS)
    with pytest.raises(UserError, match=f"{WEIGHTS} does not fit: missing {A0}"):
        load_adapter(model_of(), BASE, tmp_path)


@torch.no_grad()
def test_a_copy_of_the_bases_embedding_is_taken_if_it_is_one(tmp_path: Path) -> None:
    trained = adapter(tmp_path, SPECS["an embedding"])
    change(
        tmp_path,
        {
            TABLE: weight_of(model_of().get_submodule(EMBEDDING)).detach(),
            f"{PREFIX}no.base_layer.weight": torch.ones(1),
        },
    )
    model = model_of()
    load_adapter(model, BASE, tmp_path)
    assert torch.equal(model(IDS), trained(IDS))
    skeleton = to_stand_in(model_of())
    load_adapter(skeleton, BASE, tmp_path)  # which has no numbers to compare with
    change(tmp_path, {TABLE: torch.ones(21, 16)})
    with pytest.raises(UserError, match="which differs from the base model's"):
        load_adapter(to_stand_in(model_of()), BASE, tmp_path)


@pytest.mark.parametrize("name", ["the head", "an embedding"])
def test_peft_would_keep_a_pair_tied_that_this_project_unties(name: str, tmp_path: Path) -> None:
    adapter(tmp_path, SPECS[name], tied=True)
    edit_adapter_config(tmp_path, ensure_weight_tying=True)
    with pytest.raises(
        UserError, match=r"ensure_weight_tying is not supported with LoRA on embed_tokens, nor"
    ):
        load_adapter(model_of(tied=True), BASE, tmp_path)
    load_adapter(
        model_of(), BASE, adapter_at(tmp_path / "untied", SPECS[name], ensure_weight_tying=True)
    )
    both = adapter_at(tmp_path / "both", SPECS["both ends"], tied=True, ensure_weight_tying=True)
    load_adapter(model_of(tied=True), BASE, both)


def adapter_at(folder: Path, spec: AdapterSpec, tied: bool = False, **values: Any) -> Path:
    folder.mkdir()
    adapter(folder, spec, tied)
    edit_adapter_config(folder, **values)
    return folder


@torch.no_grad()
def test_a_tied_pair_stays_one_matrix_unless_both_were_trained_to_different_ones(
    tmp_path: Path,
) -> None:
    adapter(tmp_path, SPECS["both ends"], tied=True)
    model = model_of(tied=True)
    load_adapter(model, BASE, tmp_path)
    assert weight_of(model.head) is weight_of(model.get_submodule(EMBEDDING))
    change(tmp_path, {f"{PREFIX}lm_head.weight": torch.ones(20, 16)})
    model = model_of(tied=True)
    load_adapter(model, BASE, tmp_path)
    assert (
        bool((weight_of(model.head) == 1).all())
        and not (weight_of(model.get_submodule(EMBEDDING)) == 1).all()
    )


@pytest.mark.parametrize(
    ("rows", "fits"),
    [
        ({"embed_tokens": [3, 5], "lm_head": [3, 5]}, True),
        ({"decoder.embed_tokens": [3, 5]}, True),
        ({"embed_tokens": [3, 5], "lm_head": [5, 3]}, False),
        ({"lm_head": [3, 5]}, False),
    ],
)
def test_rows_of_a_tied_pair_are_the_same_ones(
    rows: dict[str, list[int]], fits: bool, tmp_path: Path
) -> None:
    spec = AdapterSpec(2, 3.0, ("q_proj",), rows={"embed_tokens": (3, 5)})
    adapter(tmp_path, spec, tied=True)
    edit_adapter_config(tmp_path, trainable_token_indices=rows)
    if fits:
        assert load_adapter(model_of(tied=True), BASE, tmp_path) == spec
    else:
        with pytest.raises(
            UserError, match=r"must name embed_tokens, or .* same rows: they are tied in base"
        ):
            load_adapter(model_of(tied=True), BASE, tmp_path)


# Virtual tokens

each_kind = pytest.mark.parametrize("kind", ["prefix", "prompt"])


@torch.no_grad()
def virtual(folder: Path, kind: str, dtype: torch.dtype | None = None) -> MiniGPT:
    model = model_of()
    attach_virtual_tokens(model, kind, 3, 20, 5, dtype)
    save_virtual(folder, model, "base")
    return model


@each_kind
@torch.no_grad()
def test_virtual_tokens_are_drawn_by_the_seed_frozen_when_read_and_cast_where_asked(
    kind: str, tmp_path: Path
) -> None:
    model = virtual(tmp_path, kind)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        "virtual.prompt_embeddings"
    ]
    again, other = model_of(), model_of()
    attach_virtual_tokens(again, kind, 3, 20, 5)
    attach_virtual_tokens(other, kind, 3, 20, 6)
    assert torch.equal(again(IDS), model(IDS)) and not torch.equal(other(IDS), model(IDS))
    read = model_of()
    load_adapter(read, BASE, tmp_path)
    assert torch.equal(read(IDS), model(IDS)) and not any(
        p.requires_grad for p in read.parameters()
    )
    half = virtual(tmp_path, kind, torch.bfloat16)
    assert half.virtual is not None and half.virtual.prompt_embeddings.dtype == torch.bfloat16


@each_kind
def test_a_skeleton_gets_virtual_tokens_with_their_numbers(kind: str, tmp_path: Path) -> None:
    virtual(tmp_path, kind)
    skeleton = to_stand_in(model_of())
    load_adapter(skeleton, BASE, tmp_path)
    assert skeleton.virtual is not None
    assert torch.equal(
        skeleton.virtual.prompt_embeddings, load_file(tmp_path / WEIGHTS)["prompt_embeddings"]
    )


@each_kind
def test_their_config_has_the_sizes_that_peft_computes_with(kind: str, tmp_path: Path) -> None:
    virtual(tmp_path, kind)
    config = read_json(tmp_path / CONFIG)
    sizes = {"num_virtual_tokens": 3, "token_dim": 16, "num_attention_heads": 2, "num_layers": 2}
    assert {key: config[key] for key in sizes} == sizes
    assert (
        config["peft_type"] == f"{kind.upper()}_TUNING"
        and config["base_model_name_or_path"] == "base"
    )
    assert config["task_type"] == "CAUSAL_LM" and config["inference_mode"] is True
    assert config.get("prefix_projection") is (False if kind == "prefix" else None)


@each_kind
def test_they_leave_a_position_for_a_token(kind: str, tmp_path: Path) -> None:
    attach_virtual_tokens(model_of(), kind, 11, 20, 0)
    with pytest.raises(
        UserError, match=f"finetune_{kind}.virtual_tokens must be below 12, the model's pos"
    ):
        attach_virtual_tokens(model_of(), kind, 12, 20, 0)
    virtual(tmp_path, kind)
    for n in (0, 12, "3", True):
        edit_adapter_config(tmp_path, num_virtual_tokens=n)
        with pytest.raises(UserError, match=rf"{CONFIG}: num_virtual_tokens must be"):
            load_adapter(model_of(), BASE, tmp_path)
    edit_adapter_config(tmp_path, num_virtual_tokens=4)
    with pytest.raises(UserError, match=r"prompt_embeddings has shape \[3, "):
        load_adapter(model_of(), BASE, tmp_path)
