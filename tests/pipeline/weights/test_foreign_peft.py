"""PEFT folders with the quirks of the tools around it answer as in PEFT itself, or are refused with
the reason.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.conftest import Lora
from tests.helpers.bases import ROWS, toy_checkpoint
from tests.helpers.checkpoints import edit_adapter_config, edit_tensors
from tests.helpers.foreign import imported, refused
from tests.helpers.json_files import read_json
from tests.helpers.side_by_side import logits, ours, randomized, theirs

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
Weights = dict[str, Tensor]

pytestmark = pytest.mark.filterwarnings("ignore")


def made(root: Path, base: dict[str, Any] | None = None, **options: Any) -> Tensor:
    """`theirs`, an adapter that PEFT made on `base`, all of it changed; returns its logits."""
    toy_checkpoint(root / "base", **(base or {}))
    config = LoraConfig(
        task_type="CAUSAL_LM", **{"r": 3, "lora_alpha": 6, "target_modules": ["q_proj"], **options}
    )
    model = randomized(get_peft_model(theirs(root / "base"), config), 0.2)
    model.save_pretrained(root / "theirs", save_embedding_layers=False)
    return logits(model)


def renamed(folder: Path, change: Callable[[str], str]) -> None:
    edit_tensors(folder, lambda found: {change(key): value for key, value in found.items()})


def assert_taken(cli: Lora, root: Path, there: Tensor) -> str:
    said = imported(cli, root)
    assert (there - logits(theirs(root / "base"))).abs().max() > 0.05, "the adapter changes nothing"
    torch.testing.assert_close(
        logits(ours(root / "base", root / "mine")), there, atol=1e-4, rtol=1e-4
    )
    in_peft = logits(theirs(root / "base", root / "mine"))
    torch.testing.assert_close(in_peft, there, atol=1e-4, rtol=1e-4)
    return said


# Names of tensors


def named_adapter(key: str) -> str:
    return key.replace(".lora_A.", ".lora_A.default.").replace(".lora_B.", ".lora_B.default.")


NAMES: dict[str, Callable[[str], str]] = {
    "the adapter's name": named_adapter,
    "a doubled prefix": lambda key: PREFIX + key,
    "no prefix": lambda key: key.removeprefix(PREFIX),
    "DDP": lambda key: f"module.{key}",
    "torch.compile": lambda key: key.replace(PREFIX, f"{PREFIX}_orig_mod."),
    "torch.compile around it": lambda key: f"_orig_mod.{key}",
    "FSDP": lambda key: key.replace("self_attn.", "_fsdp_wrapped_module.self_attn."),
    "activation checkpointing": lambda key: key.replace(
        "self_attn.", "_checkpoint_wrapped_module.self_attn."
    ),
    "the body alone": lambda key: key.replace("model.model.layers", "model.layers"),
    "one model more": lambda key: key.replace("model.model.layers", "model.model.model.layers"),
    "all at once": lambda key: f"module.{PREFIX}{named_adapter(key)}".replace(
        "self_attn", "_orig_mod.self_attn"
    ),
}


@pytest.mark.parametrize("name", NAMES)
def test_names_that_wrappers_leave_are_read(cli: Lora, name: str, tmp_path: Path) -> None:
    there = made(tmp_path)
    renamed(tmp_path / "theirs", NAMES[name])
    assert_taken(cli, tmp_path, there)


@pytest.mark.parametrize("spelling", [".weight", ".default", ".default.weight"])
def test_every_spelling_of_doras_magnitude_is_read(
    cli: Lora, spelling: str, tmp_path: Path
) -> None:
    there = made(tmp_path, use_dora=True)
    name = ".lora_magnitude_vector"
    renamed(tmp_path / "theirs", lambda key: key + spelling if key.endswith(name) else key)
    assert_taken(cli, tmp_path, there)


def test_a_state_dict_of_modules_to_save_is_read_without_the_bases_own(
    cli: Lora, tmp_path: Path
) -> None:
    there = made(tmp_path, modules_to_save=["lm_head"])
    head = f"{PREFIX}lm_head"

    def raw(found: Weights) -> Weights:
        value = found.pop(f"{head}.weight")
        return found | {
            f"{head}.modules_to_save.default.weight": value,
            f"{head}.original_module.weight": torch.zeros(3),
        }

    edit_tensors(tmp_path / "theirs", raw)
    assert_taken(cli, tmp_path, there)


# Files


def test_a_pickle_of_peft_is_read(cli: Lora, tmp_path: Path) -> None:
    there = made(tmp_path, modules_to_save=["lm_head"])
    torch.save(load_file(tmp_path / "theirs" / WEIGHTS), tmp_path / "theirs" / PICKLE)
    (tmp_path / "theirs" / WEIGHTS).unlink()
    assert_taken(cli, tmp_path, there)


def test_beside_safetensors_a_pickle_is_not_opened(cli: Lora, tmp_path: Path) -> None:
    there = made(tmp_path)
    for name in (PICKLE, "training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (tmp_path / "theirs" / name).write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    (tmp_path / "theirs/trainer_state.json").write_text("{}", encoding="utf-8")
    assert_taken(cli, tmp_path, there)
    assert not {path.name for path in (tmp_path / "mine").iterdir()} & {
        PICKLE,
        "optimizer.pt",
        "trainer_state.json",
    }


# Configs


UNSLOTH = (
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?(?:q_proj|v_proj).*?)"
    r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)\.(?:(?:q_proj|v_proj)))"
)


def test_unsloths_pattern_of_targets_means_the_same_layers(cli: Lora, tmp_path: Path) -> None:
    there = made(tmp_path, target_modules=UNSLOTH)
    assert len(load_file(tmp_path / "theirs" / WEIGHTS)) == 8
    edit_adapter_config(
        tmp_path / "theirs",
        auto_mapping={"base_model_class": "LlamaForCausalLM", "unsloth_fixed": True},
    )
    assert_taken(cli, tmp_path, there)


def test_targets_of_other_architectures_are_left_out(cli: Lora, tmp_path: Path) -> None:
    there = made(tmp_path, target_modules=["q_proj", "c_attn", "query_key_value", "w1"])
    assert_taken(cli, tmp_path, there)


def test_no_default_of_pefts_options_is_in_the_way(cli: Lora, tmp_path: Path) -> None:
    there = made(tmp_path)
    defaults = {
        field.name: getattr(LoraConfig(), field.name) for field in dataclasses.fields(LoraConfig)
    }
    plain = {
        key: value
        for key, value in defaults.items()
        if isinstance(value, None | bool | int | float | str)
    }
    own = read_json(tmp_path / "theirs" / CONFIG)
    edit_adapter_config(
        tmp_path / "theirs", **{**plain, **own, "an_option_of_a_newer_peft": None, "another": {}}
    )
    assert_taken(cli, tmp_path, there)


@pytest.mark.parametrize("init", ["Gaussian", "gaussian", "orthogonal", "MiCA"])
def test_an_initialization_that_leaves_the_base_is_taken_in_any_case(
    cli: Lora, init: str, tmp_path: Path
) -> None:
    there = made(tmp_path, r=4, init_lora_weights=init.lower())
    edit_adapter_config(tmp_path / "theirs", init_lora_weights=init)
    assert imported(cli, tmp_path)
    torch.testing.assert_close(
        logits(ours(tmp_path / "base", tmp_path / "mine")), there, atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_16", "olora", "corda", "lora_ga", "OLoRA"])
def test_an_initialization_that_changes_the_base_is_refused_with_its_conversion(
    cli: Lora, init: str, tmp_path: Path
) -> None:
    made(tmp_path)
    edit_adapter_config(tmp_path / "theirs", init_lora_weights=init)
    said = refused(cli, tmp_path)
    assert f"init_lora_weights is {init!r}, which also changes the base" in said
    assert "path_initial_model_for_weight_conversion" in said


def test_loftq_which_peft_converts_to_nothing_is_refused_with_a_merge(
    cli: Lora, tmp_path: Path
) -> None:
    made(tmp_path)
    edit_adapter_config(
        tmp_path / "theirs", init_lora_weights="loftq", loftq_config={"loftq_bits": 4}
    )
    assert "Merge it in PEFT with merge_and_unload" in refused(cli, tmp_path)


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("unsloth/llama-3-8b-bnb-4bit", "unsloth/llama-3-8b"),
        ("unsloth/Qwen3-8B-unsloth-bnb-4bit", "unsloth/Qwen3-8B"),
        ("mlx-community/SmolLM-135M-4bit", "mlx-community/SmolLM-135M"),
        ("TheBloke/Mistral-7B-AWQ", "TheBloke/Mistral-7B"),
        ("org/plain-7b", None),
    ],
)
def test_a_quantized_base_is_named_with_the_one_to_use(
    cli: Lora, name: str, plain: str | None, tmp_path: Path
) -> None:
    there = made(tmp_path)
    edit_adapter_config(tmp_path / "theirs", base_model_name_or_path=name)
    said = assert_taken(cli, tmp_path, there)
    assert (f"It names {name}, a quantized model." in said) is (plain is not None)
    assert plain is None or f"Its unquantized base is likely {plain}." in said


# Embeddings that are saved whole


@pytest.mark.parametrize("tied", [False, True])
def test_an_embedding_that_is_the_bases_own_is_left_out(
    cli: Lora, tied: bool, tmp_path: Path
) -> None:
    there = made(tmp_path, {"tie_word_embeddings": tied})
    base = theirs(tmp_path / "base")
    names = {"model.embed_tokens": base.model.embed_tokens, "lm_head": base.lm_head}
    copies = {
        f"{PREFIX}{name}.weight": module.weight.detach().clone() for name, module in names.items()
    }
    edit_tensors(tmp_path / "theirs", lambda found: found | copies)
    assert_taken(cli, tmp_path, there)
    assert len(load_file(tmp_path / "mine" / WEIGHTS)) == 4


def test_an_embedding_that_was_trained_without_being_named_is_trained_in_full(
    cli: Lora, tmp_path: Path
) -> None:
    made(tmp_path)
    head = theirs(tmp_path / "base").lm_head.weight.detach().clone()
    head[5] += 1
    edit_tensors(tmp_path / "theirs", lambda found: {**found, f"{PREFIX}lm_head.weight": head})
    # PEFT takes it too
    there = logits(theirs(tmp_path / "base", tmp_path / "theirs"))
    assert_taken(cli, tmp_path, there)
    assert read_json(tmp_path / "mine" / CONFIG)["modules_to_save"] == ["lm_head"]


@pytest.mark.parametrize("named", [False, True])
def test_an_embedding_of_a_grown_tokenizer_is_refused_with_both_sizes(
    cli: Lora, named: bool, tmp_path: Path
) -> None:
    made(tmp_path)
    edit_tensors(
        tmp_path / "theirs",
        lambda found: {**found, f"{PREFIX}lm_head.weight": torch.zeros(ROWS + 8, 32)},
    )
    edit_adapter_config(tmp_path / "theirs", modules_to_save=["lm_head"] if named else None)
    said = refused(cli, tmp_path)
    assert (
        f"lm_head has {ROWS + 8} rows, and the base {ROWS}: tokens were added before training"
        in said
    )


# What would load as nothing


def without_tensors(folder: Path) -> None:
    save_file({}, folder / WEIGHTS)


def of_size_zero(folder: Path) -> None:
    edit_tensors(folder, lambda found: {key: torch.empty(0) for key in found})


def in_shards(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        (folder / name).mkdir()

    return change


def of_two(folder: Path) -> None:
    edit_tensors(
        folder,
        lambda found: {
            key.replace(f"lora_{part}", f"lora_{part}.{name}"): value.clone()
            for name in ("default", "reference")
            for key, value in found.items()
            for part in "AB"
            if f"lora_{part}" in key
        },
    )


def twice(folder: Path) -> None:
    edit_tensors(
        folder,
        lambda found: found | {f"module.{key}": value.clone() for key, value in found.items()},
    )


def with_magnitudes(folder: Path) -> None:
    key = f"{PREFIX}model.layers.0.self_attn.q_proj.lora_magnitude_vector"
    edit_tensors(folder, lambda found: {**found, key: torch.ones(32)})


def of_experts(folder: Path) -> None:
    renamed(folder, lambda key: key.replace("self_attn.q_proj", "mlp.experts.0.w1"))


NOTHING: list[tuple[Callable[[Path], None], str]] = [
    (without_tensors, "is empty: DeepSpeed ZeRO-3 saved it without its parts on other GPUs"),
    (of_size_zero, "is empty: DeepSpeed ZeRO-3 saved it without its parts on other GPUs"),
    (
        in_shards("pytorch_model_fsdp_0"),
        "FSDP saved it in shards. Merge them with `accelerate merge-weights`",
    ),
    (in_shards("global_step60"), "DeepSpeed saved it in shards"),
    (in_shards("other"), f"theirs has no {WEIGHTS}: it holds no adapter. Copy it again"),
    (of_two, "holds several adapters: default, reference"),
    (twice, "is there twice, under two names"),
    (with_magnitudes, "use_dora is not set in adapter_config.json: PEFT would leave them out"),
    (of_experts, "does not fit: missing"),
]


@pytest.mark.parametrize(("change", "reason"), NOTHING)
def test_what_would_load_as_nothing_is_refused(
    cli: Lora, change: Callable[[Path], None], reason: str, tmp_path: Path
) -> None:
    made(tmp_path)
    change(tmp_path / "theirs")
    assert reason in refused(cli, tmp_path)


def test_an_untrained_adapter_is_taken_with_a_note(cli: Lora, tmp_path: Path) -> None:
    made(tmp_path)
    edit_tensors(
        tmp_path / "theirs",
        lambda found: {k: v * 0 if "lora_B" in k else v for k, v in found.items()},
    )
    assert "It changes nothing: A or B of every layer is zero" in imported(cli, tmp_path)
