"""Adapters, both ways, against PEFT; and all that must be refused."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pipeline.adapters.peft import load_adapter
from pipeline.inference.engine import load
from tests.helpers.checkpoints import edit_adapter_config, token_ids
from tests.helpers.errors import user_error
from tests.helpers.projects import BRIEF, cut_off, make, new_project
from tests.helpers.side_by_side import theirs

IDS = token_ids(99, 6, 12)


@torch.no_grad()
def assert_same_logits(base: Path, adapter: Path) -> None:
    ours = load(base, adapter).model
    assert (ours(IDS) - theirs(base, adapter)(input_ids=IDS).logits).abs().max() < 1e-5
    assert (ours(IDS) - load(base).model(IDS)).abs().max() > 1e-3, "the adapter changes nothing"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tied", ["true", "false"])
@pytest.mark.parametrize("embeddings", ["all", "new_rows", "none"])
def test_peft_opens_every_kind_of_adapter_with_our_logits(
    tmp_path: Path, embeddings: str, tied: str
) -> None:
    root = new_project(tmp_path / "p")
    overrides = [
        *BRIEF,
        f"pretrain.tie_embeddings={tied}",
        f"finetune_lora.train_embeddings={embeddings}",
        "finetune_lora.target_modules=all-linear",
        "finetune_lora.epochs=10",
        "finetune_lora.alpha=8",
    ]
    make(root, ["pretrain", "expand_vocab", "finetune_lora", "merge"], overrides)
    assert_same_logits(root / "artifacts/expanded", root / "artifacts/lora_adapter")


@pytest.mark.parametrize("kind", ["plain", "saved", "tokens"])
def test_an_adapter_that_peft_trained_loads_here(brief: Path, tmp_path: Path, kind: str) -> None:
    base = brief / "artifacts/expanded"
    kinds: dict[str, dict[str, Any]] = {
        "plain": {},
        "saved": {"modules_to_save": ["embed_tokens", "lm_head"]},
        "tokens": {"trainable_token_indices": {"embed_tokens": [80, 75], "lm_head": [80, 75]}},
    }
    config = LoraConfig(
        task_type="CAUSAL_LM", r=6, lora_alpha=12, target_modules=["q_proj", "fc2"], **kinds[kind]
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(5):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    model.save_pretrained(tmp_path / "adapter")
    assert_same_logits(base, tmp_path / "adapter")


# What must be refused. Each of these loads in PEFT, or fails there with another error than its
# cause.


def refused(base: Path, adapter: Path) -> str:
    """The reason."""
    loaded = load(base)
    return user_error(load_adapter, loaded.model, base, adapter)


def adapter_of(project: Path) -> tuple[Path, Path]:
    return project / "artifacts/expanded", project / "artifacts/lora_adapter"


def test_an_adapter_on_another_base_of_the_same_shape_is_refused(project: Path) -> None:
    base, adapter = adapter_of(project)
    make(project, ["pretrain", "expand_vocab"], [*BRIEF, "pretrain.seed=1"])
    assert "was trained on another base: the sha256 of its tensors is" in refused(base, adapter)


def test_the_tokenizer_of_another_base_is_refused(project: Path) -> None:
    base, adapter = adapter_of(project)
    path = base / "tokenizer.json"
    text = path.read_text(encoding="utf-8")
    path.write_text(
        text.replace('"tisch"', '"x"').replace('"sofa"', '"tisch"').replace('"x"', '"sofa"'),
        "utf-8",
    )
    assert "was trained on another base: the sha256 of its tokenizer is" in refused(base, adapter)


@pytest.mark.parametrize("field", ["lora_alpha", "r"])
def test_an_edited_alpha_or_rank_is_refused(project: Path, field: str) -> None:
    base, adapter = adapter_of(project)
    edit_adapter_config(adapter, **{field: 8})
    assert f"{field} was edited: it is 8, but the adapter was trained with" in refused(
        base, adapter
    )


def test_any_other_edit_is_refused(project: Path) -> None:
    base, adapter = adapter_of(project)
    edit_adapter_config(adapter, target_modules=["q_proj"])
    assert "adapter_config.json was changed after the artifact was made" in refused(base, adapter)


def foreign(adapter: Path) -> dict[str, torch.Tensor]:
    """The adapter as one from elsewhere, without a manifest, and its tensors."""
    (adapter / "manifest.json").unlink()
    return load_file(adapter / "adapter_model.safetensors")


def test_renamed_keys_are_refused(project: Path) -> None:
    base, adapter = adapter_of(project)
    renamed = {
        name.replace("decoder", "encoder"): tensor for name, tensor in foreign(adapter).items()
    }
    save_file(renamed, adapter / "adapter_model.safetensors")
    reason = refused(base, adapter)
    assert "does not fit: missing base_model.model.model.decoder" in reason
    assert "not expected base_model.model.model.encoder" in reason


def test_missing_keys_are_refused(project: Path) -> None:
    base, adapter = adapter_of(project)
    values = foreign(adapter)
    del values["base_model.model.model.decoder.layers.1.self_attn.q_proj.lora_B.weight"]
    save_file(values, adapter / "adapter_model.safetensors")
    assert (
        "missing base_model.model.model.decoder.layers.1.self_attn.q_proj.lora_B.weight"
        in refused(base, adapter)
    )


def test_extra_keys_are_refused(project: Path) -> None:
    base, adapter = adapter_of(project)
    extra = {
        f"base_model.model.model.decoder.layers.2.self_attn.q_proj.lora_{m}.weight": torch.zeros(1)
        for m in "AB"
    }
    save_file(foreign(adapter) | extra, adapter / "adapter_model.safetensors")
    assert "not expected base_model.model.model.decoder.layers.2.self_attn.q_proj" in refused(
        base, adapter
    )


def test_a_rank_that_its_tensors_do_not_have_is_refused(project: Path) -> None:
    base, adapter = adapter_of(project)
    foreign(adapter)
    edit_adapter_config(adapter, r=8)
    assert "has shape [4, 64], expected [8, 64]" in refused(base, adapter)


def test_a_truncated_file_is_refused(project: Path) -> None:
    base, adapter = adapter_of(project)
    path = adapter / "adapter_model.safetensors"
    cut_off(path)
    assert "was changed after the artifact was made" in refused(base, adapter)
    (adapter / "manifest.json").unlink()
    assert "is damaged or truncated" in refused(base, adapter)


def test_a_missing_file_is_refused(project: Path) -> None:
    base, adapter = adapter_of(project)
    (adapter / "adapter_model.safetensors").unlink()
    assert "adapter_model.safetensors is missing" in refused(base, adapter)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_initialisation_that_changes_the_base_is_refused(
    brief: Path, tmp_path: Path, init: str
) -> None:
    base = brief / "artifacts/expanded"
    config = LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], init_lora_weights=init
    )
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(
        tmp_path / "adapter"
    )
    assert f"init_lora_weights is '{init}', which also changes the base" in refused(
        base, tmp_path / "adapter"
    )


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("lora_alpha", float("nan"), "lora_alpha must be a number from 1e-09 to 1000000000.0"),
        ("lora_alpha", "8", "lora_alpha must be a number from 1e-09 to 1000000000.0"),
        ("r", True, "r must be a whole number"),
        ("target_modules", ["q_proj", 1], "target_modules must be a list of names"),
        ("target_modules", [], "target_modules must be a list of names"),
        ("target_modules", "(q_proj", "target_modules must be a regular expression (missing )"),
        (
            "target_modules",
            ".*nothing",
            "target_modules: '.*nothing' matches no layer that is not excluded",
        ),
        (
            "target_modules",
            ".*q_proj",
            "does not fit: not expected base_model.model.model.decoder.layers.0",
        ),
        ("exclude_modules", "[", "exclude_modules must be a regular expression"),
        ("layers_to_transform", ["1"], "layers_to_transform must be the numbers of blocks"),
        (
            "use_dora",
            True,
            "does not fit: missing "
            "base_model.model.model.decoder.layers.0.self_attn.k_proj.lora_magn",
        ),
        (
            "rank_pattern",
            {"q_proj": 0},
            "rank_pattern must be a whole number from 1 to 1000000, got 0",
        ),
        ("rank_pattern", {"q_proj": 2}, "has shape [4, 64], expected [2, 64]"),
        ("alpha_pattern", ["q_proj"], "alpha_pattern must be a mapping of names to numbers"),
        ("modules_to_save", ["layers.1.self_attn"], "already trains in full or row by row"),
        ("modules_to_save", ["fc9"], "modules_to_save: no module of the model is named fc9"),
        (
            "trainable_token_indices",
            {"embed_tokens": 5},
            "trainable_token_indices.embed_tokens must be a list of rows",
        ),
        (
            "trainable_token_indices",
            {"embed_tokens": [-1]},
            "embed_tokens must be a list of rows, at least one, each from 0, got [-1]",
        ),
        (
            "trainable_token_indices",
            "x",
            "trainable_token_indices must be a mapping of modules to rows, got 'x'",
        ),
        (
            "trainable_token_indices",
            {"fc1": [1]},
            "trainable_token_indices may name embed_tokens and lm_head only",
        ),
        ("layer_replication", [[0, 2]], "layer_replication is [[0, 2]]; it is not supported"),
        ("an_option_of_tomorrow", 1, "an_option_of_tomorrow is 1; it is not supported"),
    ],
)
def test_a_config_of_wrong_types_or_unknown_options_is_refused(
    project: Path, field: str, value: object, message: str
) -> None:
    base, adapter = adapter_of(project)
    foreign(adapter)
    edit_adapter_config(adapter, **{field: value})
    assert message in refused(base, adapter)


@pytest.mark.parametrize(("field", "value"), [("bias", "all"), ("lora_bias", True)])
def test_an_option_that_is_not_understood_is_refused(
    project: Path, field: str, value: object
) -> None:
    base, adapter = adapter_of(project)
    foreign(adapter)
    edit_adapter_config(adapter, **{field: value})
    assert f"{field} is {value!r}; only" in refused(base, adapter)


def test_rows_outside_the_base_are_refused(project: Path) -> None:
    base, adapter = adapter_of(project)
    foreign(adapter)
    edit_adapter_config(adapter, trainable_token_indices={"embed_tokens": [99]})
    assert "trains row 99" in refused(base, adapter)


def test_an_adapter_copied_elsewhere_still_knows_its_base(project: Path, tmp_path: Path) -> None:
    base, adapter = adapter_of(project)
    shutil.copytree(adapter, tmp_path / "copy")
    with torch.no_grad():
        assert torch.equal(load(base, tmp_path / "copy").model(IDS), load(base, adapter).model(IDS))
