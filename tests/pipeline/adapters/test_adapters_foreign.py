"""Adapters that PEFT made: asked, imported and merged they answer as in PEFT, or are refused for
one reason.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    EvaConfig,
    IA3Config,
    LoraConfig,
    LoraGAConfig,
    get_peft_model,
    initialize_lora_eva_weights,
)
from peft.tuners.lora.loraga import preprocess_loraga
from safetensors.torch import load_file, save_file

from pipeline.inference.engine import load
from tests.conftest import Lora
from tests.helpers.bases import toy_checkpoint
from tests.helpers.checkpoints import checkpoint, edit_adapter_config, token_ids
from tests.helpers.json_files import read_json, write_json
from tests.helpers.projects import refusal
from tests.helpers.side_by_side import logits, ours, randomized, theirs

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
IDS = token_ids(74, 4, 9)
ONE, OTHER = [5, 41], [7, 9, 30]

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def tied(tmp_path: Path) -> Path:
    """A folder with a tied base."""
    checkpoint(tmp_path / "base", tie_embeddings=True)
    return tmp_path


def saved(model: Any, folder: Path) -> Any:
    """The model, saved once every number that it trains has changed."""
    randomized(model).save_pretrained(folder)
    return model


def made(root: Path, **options: Any) -> Any:
    """`theirs`: an adapter that PEFT made on `base`; returns its model."""
    config = LoraConfig(
        task_type="CAUSAL_LM", **{"r": 3, "lora_alpha": 6, "target_modules": ["q_proj"], **options}
    )
    return saved(get_peft_model(theirs(root / "base"), config), root / "theirs")


@torch.no_grad()
def assert_answers_as_in_peft(cli: Lora, root: Path) -> None:
    """Asked, imported and merged."""
    there = logits(theirs(root / "base", root / "theirs"), IDS)
    assert (there - logits(theirs(root / "base"), IDS)).abs().max() > 1e-2, (
        "the adapter changes nothing"
    )
    code, said, _ = cli("adapters", "import", "theirs", "--base", "base", "--out", "mine", cwd=root)
    assert code == 0 and "fits base" in said
    assert cli("merge", "--adapter", "mine", "--out", "merged", cwd=root)[0] == 0
    answers = {
        "asked": logits(ours(root / "base", root / "theirs"), IDS),
        "imported": logits(ours(root / "base", root / "mine"), IDS),
        "merged": logits(theirs(root / "merged"), IDS),
    }
    for name, found in answers.items():
        torch.testing.assert_close(
            found, there, atol=1e-4, rtol=1e-4, msg=f"{name}, it answers otherwise than in PEFT"
        )


def refusals(cli: Lora, root: Path) -> set[str]:
    """What each command that opens `theirs` says of it."""
    at_base = ("--base", "base")
    ways = (
        ("prompt", "w1 w2", "--adapter", "theirs", *at_base),
        ("merge", "--adapter", "theirs", "--out", "out", *at_base),
        ("adapters", "import", "theirs", "--out", "out", *at_base),
        ("export", "theirs", "--format", "vllm", "--out", "out", *at_base),
    )
    found = {refusal(cli(*way, cwd=root)) for way in ways}
    assert not (root / "out").exists()
    return found


# Rows of a tied pair


@pytest.mark.parametrize(
    "rows", [{"embed_tokens": ONE, "lm_head": ONE}, {"model.decoder.embed_tokens": ONE}]
)
def test_rows_of_a_tied_pair_are_trained_in_both_at_once(
    cli: Lora, tied: Path, rows: dict[str, list[int]]
) -> None:
    made(tied, trainable_token_indices=rows)
    assert_answers_as_in_peft(cli, tied)


@pytest.mark.parametrize("rows", [{"embed_tokens": ONE, "lm_head": OTHER}, {"lm_head": ONE}])
def test_rows_that_would_untie_a_tied_pair_are_refused(
    cli: Lora, tied: Path, rows: dict[str, list[int]]
) -> None:
    made(tied, trainable_token_indices=rows)
    (said,) = refusals(cli, tied)
    assert (
        "trainable_token_indices must name embed_tokens, or embed_tokens and lm_head with the "
        "same rows" in said
    )
    assert "or embed_tokens and lm_head with the same rows: they are tied" in said


def test_a_list_of_rows_is_the_embeddings_whatever_the_model_calls_it(
    cli: Lora, tmp_path: Path
) -> None:
    toy_checkpoint(tmp_path / "base", "gpt2")
    made(tmp_path, target_modules=["c_attn"], trainable_token_indices=ONE)
    code, said, _ = cli("adapters", "diff", "theirs", "theirs", "--json", cwd=tmp_path)
    assert code == 0
    assert json.loads(said)["values"] == [{"name": "transformer.wte", "difference": 0.0}]


# LoRA on the head of a tied pair


@pytest.mark.parametrize(
    "targets", [["q_proj", "lm_head"], ["lm_head"], ["embed_tokens", "lm_head"]]
)
def test_lora_on_a_tied_head_unties_it_where_it_is_merged(
    cli: Lora, tied: Path, targets: list[str]
) -> None:
    made(tied, target_modules=targets)
    assert_answers_as_in_peft(cli, tied)
    assert (
        cli("export", "theirs", "--format", "vllm", "--out", "out", "--base", "base", cwd=tied)[0]
        == 0
    )


def test_a_head_that_is_not_the_tied_bases_is_refused(cli: Lora, tied: Path) -> None:
    made(tied, target_modules=["q_proj", "lm_head"])
    values = load_file(tied / "theirs" / WEIGHTS)
    values["base_model.model.lm_head.base_layer.weight"] += 1
    save_file(values, tied / "theirs" / WEIGHTS)
    (said,) = refusals(cli, tied)
    assert "contains its own lm_head.weight, which differs from the base model's" in said


# Modules that train in full


@pytest.mark.parametrize(
    "saved", [["norm"], ["final_layer_norm"], ["head"], ["fc2", "norm"], ["decoder.embed_tokens"]]
)
def test_modules_to_save_are_meant_by_the_ends_of_their_names(
    cli: Lora, tied: Path, saved: list[str]
) -> None:
    made(tied, modules_to_save=saved)
    assert_answers_as_in_peft(cli, tied)


def test_a_module_that_is_saved_and_gets_lora_is_refused(cli: Lora, tied: Path) -> None:
    made(tied)
    edit_adapter_config(tied / "theirs", modules_to_save=["proj"])
    (said,) = refusals(cli, tied)
    assert "q_proj already trains in full or row by row" in said


# How A and B began


def eva(root: Path) -> Any:
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=3,
        target_modules=["q_proj", "v_proj"],
        init_lora_weights="eva",
        eva_config=EvaConfig(rho=2),
    )
    model = get_peft_model(theirs(root / "base"), config)
    initialize_lora_eva_weights(model, [{"input_ids": IDS}] * 3, show_progress_bar=False)
    return saved(model, root / "theirs")


def mica(root: Path) -> Any:
    return made(root, init_lora_weights="mica", target_modules=["q_proj", "fc1"])


def lora_ga(root: Path) -> Any:
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=3,
        target_modules=["q_proj"],
        init_lora_weights="lora_ga",
        lora_ga_config=LoraGAConfig(),
    )
    base = theirs(root / "base")
    preprocess_loraga(base, config, lambda: base(input_ids=IDS, labels=IDS).loss.backward())
    model = get_peft_model(base, config)
    model.save_pretrained(root / "first")  # what began; a conversion needs it
    return saved(model, root / "theirs")


@pytest.mark.parametrize("make", [eva, mica])
def test_an_initialisation_that_leaves_the_base_alone_is_taken(
    cli: Lora, tied: Path, make: Callable[[Path], Any]
) -> None:
    trained = logits(make(tied), IDS)
    torch.testing.assert_close(trained, logits(theirs(tied / "base", tied / "theirs"), IDS))
    assert_answers_as_in_peft(cli, tied)


def test_lora_ga_changes_the_base_and_is_taken_once_it_is_converted(cli: Lora, tied: Path) -> None:
    model = lora_ga(tied)
    (said,) = refusals(cli, tied)
    assert "init_lora_weights is 'lora_ga', which also changes the base" in said
    model.save_pretrained(tied / "theirs", path_initial_model_for_weight_conversion=tied / "first")
    assert_answers_as_in_peft(cli, tied)


# (IA)³


BLOCK = "model.decoder.layers"
VECTORS: dict[str, dict[str, Any]] = {  # IA3Config's arguments
    "names": {"target_modules": ["k_proj", "v_proj", "fc2"], "feedforward_modules": ["fc2"]},
    "outputs alone": {"target_modules": ["k_proj", "fc1"], "feedforward_modules": []},
    "a pattern": {"target_modules": r".*\.(k_proj|fc2)", "feedforward_modules": r".*fc2"},
    "a pattern and names": {
        "target_modules": r".*\.1\.(self_attn\.k_proj|fc2)",
        "feedforward_modules": ["fc2"],
    },
    "all-linear": {"target_modules": "all-linear", "feedforward_modules": ["fc2"]},
    "some blocks": {
        "target_modules": [f"{BLOCK}.0.self_attn.k_proj", f"{BLOCK}.1.fc2"],
        "feedforward_modules": [f"{BLOCK}.1.fc2"],
    },
    "names of other models, and a plain end": {
        "target_modules": ["k_proj", "fc2", "c2", "down_proj"],
        "feedforward_modules": ["c2", "down_proj"],
    },
    "without some": {
        "target_modules": ["k_proj", "fc2"],
        "feedforward_modules": ["fc2"],
        "exclude_modules": ["1.self_attn.k_proj"],
    },
    "without a pattern": {
        "target_modules": ["k_proj", "fc2"],
        "feedforward_modules": ["fc2"],
        "exclude_modules": r".*\.0\.fc2",
    },
}


def made_vectors(root: Path, **options: Any) -> Any:
    """`theirs`: vectors that PEFT made on `base`; returns its model."""
    return saved(
        get_peft_model(theirs(root / "base"), IA3Config(task_type="CAUSAL_LM", **options)),
        root / "theirs",
    )


@torch.no_grad()
def assert_vectors_answer_as_in_peft(cli: Lora, root: Path, model: Any) -> None:
    # not opened again: PEFT cannot open those of all-linear with feedforward_modules
    there = logits(model, IDS)
    assert (there - logits(theirs(root / "base"), IDS)).abs().max() > 1e-2, (
        "the vectors change nothing"
    )
    code, said, errors = cli(
        "adapters", "import", "theirs", "--base", "base", "--out", "mine", cwd=root
    )
    assert code == 0 and "fits base" in said, errors
    for folder in ("theirs", "mine"):
        torch.testing.assert_close(
            logits(ours(root / "base", root / folder), IDS), there, atol=1e-4, rtol=1e-4
        )
    code, said, _ = cli("adapters", "verify", "mine", cwd=root)
    assert code == 0 and "those it was imported with; what it was trained on is not known" in said


@pytest.mark.parametrize("options", VECTORS.values(), ids=VECTORS)
def test_vectors_of_ia3_answer_as_in_peft(cli: Lora, tied: Path, options: dict[str, Any]) -> None:
    assert_vectors_answer_as_in_peft(cli, tied, made_vectors(tied, **options))


def test_vectors_of_ia3_on_a_gpt_2_answer_as_in_peft(cli: Lora, tmp_path: Path) -> None:
    toy_checkpoint(tmp_path / "base", "gpt2")
    model = made_vectors(tmp_path, fan_in_fan_out=True)  # on the modules that PEFT chooses
    assert_vectors_answer_as_in_peft(cli, tmp_path, model)


WRONG_VECTORS: dict[str, tuple[dict[str, Any], str]] = {
    "modules_to_save": (
        {"modules_to_save": ["lm_head"]},
        "modules_to_save is ['lm_head']; it is not supported with",
    ),
    "an unknown option": ({"use_dora": True}, "use_dora is True; it is not supported so far"),
    "a bad pattern": ({"target_modules": "("}, "target_modules must be a regular expression"),
    "no list": ({"feedforward_modules": {"fc2": 1}}, "feedforward_modules must be a list of names"),
    "no targets": ({"target_modules": None}, "target_modules must be a list of names"),
    "vectors of another side": (
        {"feedforward_modules": []},
        "has shape [1, 256], expected [64, 1]",
    ),
    "a pattern that matches nothing": ({"target_modules": ".*w_proj"}, "matches no layer"),
}


@pytest.mark.parametrize("name", WRONG_VECTORS)
def test_vectors_that_do_not_fit_their_config_are_one_message(
    cli: Lora, tied: Path, name: str
) -> None:
    change, message = WRONG_VECTORS[name]
    made_vectors(tied, **VECTORS["names"])
    edit_adapter_config(tied / "theirs", **change)
    ways = (
        ("import", "theirs", "--base", "base", "--out", "out"),
        ("verify", "theirs", "--base", "base"),
    )
    (said,) = {refusal(cli("adapters", *way, cwd=tied)) for way in ways}
    assert message in said and not (tied / "out").exists()


# What is refused says why


@pytest.mark.parametrize("kind", ["P_TUNING", "TRAINABLE_TOKENS", "LOHA", ["LORA"], 5])
def test_another_method_is_refused_with_those_that_are_supported(
    cli: Lora, tied: Path, kind: object
) -> None:
    made(tied)
    edit_adapter_config(tied / "theirs", peft_type=kind)
    (said,) = refusals(cli, tied)
    assert f"peft_type must be LORA, IA3, PREFIX_TUNING or PROMPT_TUNING, got {kind!r}" in said


def test_a_pickle_is_read_by_the_import_alone_which_the_others_name(cli: Lora, tied: Path) -> None:
    there = logits(made(tied), IDS)
    path = tied / "theirs" / WEIGHTS
    torch.save(load_file(path), tied / "theirs/adapter_model.bin")
    path.unlink()
    ways = (
        ("prompt", "w1 w2", "--adapter", "theirs", "--base", "base"),
        ("merge", "--adapter", "theirs", "--out", "out", "--base", "base"),
        ("export", "theirs", "--format", "vllm", "--out", "out", "--base", "base"),
        ("export", "theirs", "--format", "peft", "--out", "out"),
    )
    (said,) = {refusal(cli(*way, cwd=tied)) for way in ways}
    assert "adapter_model.bin is a pickle, which can run code and is never read" in said
    assert "`lora adapters import theirs --base BASE --out OUT`" in said
    assert cli("adapters", "import", "theirs", "--base", "base", "--out", "mine", cwd=tied)[0] == 0
    torch.testing.assert_close(
        load(tied / "base", tied / "mine").model(IDS), there, atol=1e-4, rtol=1e-4
    )


NUMBERS: dict[str, tuple[dict[str, Any], str]] = {
    "rank": ({"r": 10**6}, "has shape [3, 64], expected [1000000, 64]"),
    "rank of many digits": ({"r": 10**400}, "r must be a whole number from 1 to 1000000"),
    "rank by pattern": (
        {"rank_pattern": {"q_proj": 10**6}},
        "has shape [3, 64], expected [1000000, 64]",
    ),
    "targets that it has not": ({"r": 10**6, "target_modules": ["fc1"]}, "does not fit: "),
    "alpha": (
        {"lora_alpha": 1e300},
        "lora_alpha must be a number from 1e-09 to 1000000000.0, got 1e+300",
    ),
    "tiny alpha": (
        {"lora_alpha": 1e-300},
        "lora_alpha must be a number from 1e-09 to 1000000000.0, got 1e-300",
    ),
    "alpha of many digits": (
        {"lora_alpha": 10**400},
        "lora_alpha must be a number from 1e-09 to 1000000000.0",
    ),
    "alpha by pattern": (
        {"alpha_pattern": {"q_proj": 10**400}},
        "alpha_pattern must be a number from",
    ),
    "blocks": ({"layers_to_transform": [10**30]}, "matches no layer that is not excluded"),
    "rows": (
        {"trainable_token_indices": {"embed_tokens": [10**30]}},
        "trains row 1000000000000000000000000000000",
    ),
    "virtual tokens": (
        {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 10**400},
        "num_virtual_tokens",
    ),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_out_of_all_bounds_is_one_message(cli: Lora, tied: Path, name: str) -> None:
    made(tied)
    values, message = NUMBERS[name]
    config = read_json(tied / "theirs" / CONFIG)
    if "peft_type" in values:
        config = {"task_type": "CAUSAL_LM"}
    write_json(tied / "theirs" / CONFIG, {**config, **values})
    for said in refusals(cli, tied) if "peft_type" not in values else [verified(cli, tied)]:
        assert message in said and len(said) < 700


def verified(cli: Lora, root: Path) -> str:
    return refusal(cli("adapters", "verify", "theirs", "--base", "base", cwd=root))
