"""Other tools' configs as settings: what is taken, what is not and why, and nothing that they hold
is trusted.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import UserError
from pipeline.project.foreign import FORMATS, LARGEST, Config, read_config
from pipeline.project.params.aliases import KEYS, NO_COUNTERPART, why_none
from pipeline.project.params.schema import ValueSource, check_value, hints
from pipeline.stages.registry import GRAPH
from tests.helpers.errors import user_error

AXOLOTL: dict[str, Any] = {
    **{
        "base_model": "org/model-8b",
        "model_type": "LlamaForCausalLM",
        "load_in_8bit": False,
        "load_in_4bit": True,
    },
    **{
        "adapter": "qlora",
        "lora_r": 32,
        "lora_alpha": 16,
        "lora_dropout": 0.05,
        "lora_target_linear": True,
    },
    **{
        "datasets": [
            {"path": "mine.jsonl", "type": "chat_template"},
            {"path": "org/hub-set", "type": "alpaca"},
        ]
    },
    **{
        "sequence_len": 4096,
        "sample_packing": True,
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 4,
    },
    **{
        "num_epochs": 4,
        "optimizer": "adamw_bnb_8bit",
        "lr_scheduler": "cosine",
        "learning_rate": "2e-4",
    },
    **{
        "bf16": "auto",
        "fp16": None,
        "tf32": False,
        "gradient_checkpointing": True,
        "flash_attention": True,
    },
    **{
        "warmup_ratio": 0.1,
        "val_set_size": 0.05,
        "evals_per_epoch": 4,
        "weight_decay": 0.0,
        "wandb_project": "mine",
    },
    **{
        "output_dir": "./outputs",
        "special_tokens": {"pad_token": "<|end|>"},
        "loss_watchdog_threshold": 5.0,
    },
}
LLAMA_FACTORY: dict[str, Any] = {
    **{
        "model_name_or_path": "org/model-4b",
        "trust_remote_code": True,
        "stage": "sft",
        "do_train": True,
    },
    **{
        "finetuning_type": "lora",
        "lora_rank": 8,
        "lora_target": "all",
        "dataset": "identity,demo",
        "template": "x",
    },
    **{
        "cutoff_len": 2048,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 8,
        "learning_rate": 1e-4,
    },
    **{
        "num_train_epochs": 3.0,
        "lr_scheduler_type": "cosine",
        "bf16": True,
        "quantization_bit": 4,
        "val_size": 100,
    },
    **{
        "warmup_ratio": 0.1,
        "warmup_steps": 0,
        "double_quantization": True,
        "eval_steps": 500,
        "deepspeed": "ds_z3.json",
        "resume_from_checkpoint": None,
    },
}
PREFERENCES: dict[str, dict[str, Any]] = {
    "dpo": {**LLAMA_FACTORY, "stage": "dpo", "pref_beta": 0.2, "pref_loss": "sigmoid"},
    "simpo": {**LLAMA_FACTORY, "stage": "dpo", "pref_loss": "simpo", "pref_beta": 0.2},
    "kto": {"base_model": "m", "adapter": "lora", "rl": "kto", "rl_beta": 0.2},
}
MLX: dict[str, Any] = {
    **{
        "model": "org/model",
        "train": True,
        "fine_tune_type": "dora",
        "data": "sets",
        "seed": 7,
        "num_layers": 16,
    },
    **{
        "batch_size": 4,
        "iters": 1000,
        "learning_rate": 1e-5,
        "max_seq_length": 2048,
        "grad_checkpoint": False,
    },
    "lora_parameters": {
        "keys": ["self_attn.q_proj", "self_attn.v_proj"],
        "rank": 8,
        "scale": 20.0,
        "dropout": 0.0,
    },
    "lr_schedule": {"name": "cosine_decay", "warmup": 100, "arguments": ["3e-5", 1000, 1e-7]},
}


@pytest.mark.parametrize("loss", PREFERENCES)
def test_a_config_for_preferences_gives_their_section(tmp_path: Path, loss: str) -> None:
    foreign = foreign_of(tmp_path, PREFERENCES[loss])
    assert foreign.section == "finetune_dpo"
    assert (foreign.values["finetune_dpo.loss"], foreign.values["finetune_dpo.beta"]) == (loss, 0.2)


def foreign_of(folder: Path, tree: Mapping[str, Any], name: str = "config.yml") -> Config:
    text = json.dumps(tree) if name.endswith(".json") else yaml.safe_dump(dict(tree))
    (folder / name).write_text(text, encoding="utf-8")
    return read_config(folder / name, GRAPH.sections)


def settings(foreign: Config) -> dict[str, Any]:
    return {key.removeprefix("finetune_lora."): value for key, value in foreign.values.items()}


def left(foreign: Config) -> dict[str, str]:
    return foreign.left


def test_axolotl(tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text('{"text": "a"}\n', encoding="utf-8")
    foreign = foreign_of(tmp_path, AXOLOTL)
    assert (foreign.format, foreign.base, foreign.data) == (
        "Axolotl",
        "org/model-8b",
        [str(tmp_path / "mine.jsonl")],
    )
    assert settings(foreign) == dict(
        **{
            "rank": 32,
            "alpha": 16.0,
            "target_modules": ["all-linear"],
            "quantization": "nf4",
            "max_length": 4096,
        },
        **{
            "batch_size": 2,
            "gradient_accumulation_steps": 4,
            "epochs": 4,
            "schedule": "cosine",
            "precision": "bf16",
        },
        **{
            "learning_rate": 2e-4,
            "gradient_checkpointing": "full",
            "eval_share": 0.05,
            "lora_dropout": 0.05,
        },
        **{"optimizer": "adamw-8bit", "warmup_ratio": 0.1, "weight_decay": 0.0},
    )
    why = left(foreign)
    assert {
        "datasets",
        "sample_packing",
        "flash_attention",
        "wandb_project",
        "output_dir",
        "special_tokens",
    } <= set(why)
    assert (
        "eval_share" in why["evals_per_epoch"]
        and "no such setting" in why["loss_watchdog_threshold"]
    )
    assert next(iter(foreign.left)) == "datasets"
    assert not {"load_in_8bit", "fp16", "tf32"} & set(why), "what is off is neither taken nor left"


def test_llama_factory(tmp_path: Path) -> None:
    foreign = foreign_of(tmp_path, LLAMA_FACTORY, "config.yaml")
    assert (foreign.format, foreign.base, foreign.data) == ("LLaMA-Factory", "org/model-4b", [])
    assert settings(foreign) == {
        **{
            "rank": 8,
            "alpha": 16.0,
            "target_modules": ["all-linear"],
            "quantization": "nf4-dq",
            "max_length": 2048,
        },
        **{
            "batch_size": 1,
            "gradient_accumulation_steps": 8,
            "epochs": 3,
            "schedule": "cosine",
            "precision": "bf16",
        },
        **{"learning_rate": 1e-4, "warmup_ratio": 0.1},
    }
    why = left(foreign)
    assert "number of examples" in why["val_size"] and "held out" in why["eval_steps"]
    assert "dataset_info.json" in why["dataset"] and "chat template" in why["template"]
    assert (
        "import.trust_remote_code" in why["trust_remote_code"] and "--devices" in why["deepspeed"]
    )
    assert (
        foreign_of(tmp_path, {**LLAMA_FACTORY, "finetuning_type": "freeze"}).section
        == "finetune_freeze"
    )
    assert settings(foreign_of(tmp_path, {**LLAMA_FACTORY, "lora_alpha": 5}))["alpha"] == 5
    assert left(
        foreign_of(tmp_path, {**AXOLOTL, "datasets": [{"path": "n" * 900}, {"path": "a\0b"}]})
    )["datasets"]


def test_mlx_lm(tmp_path: Path) -> None:
    (tmp_path / "sets").mkdir()
    (tmp_path / "sets/train.jsonl").write_text('{"text": "a"}\n', encoding="utf-8")
    foreign = foreign_of(tmp_path, MLX, "config.yaml")
    assert (foreign.format, foreign.base) == ("mlx-lm", "org/model")
    assert foreign.data == [str(tmp_path / "sets/train.jsonl")]
    assert settings(foreign) == dict(
        **{
            "rank": 8,
            "alpha": 160.0,
            "target_modules": ["self_attn.q_proj", "self_attn.v_proj"],
            "dora": True,
            "layers_to_transform": ["last 16"],
        },
        **{
            "batch_size": 4,
            "learning_rate": 3e-5,
            "schedule": "cosine",
            "warmup_steps": 100,
            "seed": 7,
        },
        **{
            "max_length": 2048,
            "gradient_checkpointing": "none",
            "max_steps": 1000,
            "lora_dropout": 0.0,
        },
    )
    assert foreign.taken and "num_layers" not in left(foreign)
    without = foreign_of(
        tmp_path, {key: value for key, value in MLX.items() if key != "lr_schedule"}
    )
    assert (
        settings(without)["schedule"] == "constant" and settings(without)["learning_rate"] == 1e-5
    )


def test_peft_as_it_writes_its_config(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        **{
            "r": 16,
            "lora_alpha": 32,
            "target_modules": ["q_proj"],
            "base_model_name_or_path": "org/model",
        },
        **{
            "use_rslora": True,
            "modules_to_save": ["lm_head"],
            "rank_pattern": {"q_proj": 4},
            "lora_dropout": 0.1,
            "layers_to_transform": [0, 2],
            "exclude_modules": ["0.self_attn.q_proj"],
        },
        task_type="CAUSAL_LM",
    )
    config.save_pretrained(tmp_path)
    foreign = read_config(tmp_path / "adapter_config.json", GRAPH.sections)
    assert (foreign.format, foreign.base) == ("PEFT", "org/model")
    assert settings(foreign) == dict(
        **{
            "rank": 16,
            "alpha": 32.0,
            "target_modules": ["q_proj"],
            "rank_pattern": {"q_proj": 4},
            "rslora": True,
            "layers_to_transform": ["0", "2"],
            "exclude_modules": ["0.self_attn.q_proj"],
        },
        **{"init_lora_weights": "kaiming", "modules_to_save": ["lm_head"], "lora_dropout": 0.1},
    )
    assert not foreign.left, "a plain LoRA has a counterpart in all"
    peft.PrefixTuningConfig(num_virtual_tokens=7).save_pretrained(tmp_path)
    prefix = read_config(tmp_path / "adapter_config.json", GRAPH.sections)
    assert prefix.values == {"finetune_prefix.virtual_tokens": 7}
    everything = foreign_of(
        tmp_path,
        {"peft_type": "LORA", "target_modules": "model.*(q|v)_proj$"},
        "adapter_config.json",
    )
    assert "regular expression" in left(everything)["target_modules"]


def test_transformers_as_it_writes_its_arguments_leaves_nothing_without_a_reason(
    tmp_path: Path,
) -> None:
    from transformers import TrainingArguments

    arguments = TrainingArguments(
        **{
            "output_dir": str(tmp_path),
            "learning_rate": 1e-4,
            "num_train_epochs": 2,
            "lr_scheduler_type": "cosine",
        },
        **{
            "per_device_train_batch_size": 6,
            "optim": "paged_adamw_8bit",
            "neftune_noise_alpha": 5,
            "seed": 3,
        },
        **{
            "warmup_steps": 0.1,
            "max_steps": 50,
            "weight_decay": 0.1,
            "report_to": "none",
            "use_cpu": True,
        },
    )
    (tmp_path / "training_args.json").write_text(arguments.to_json_string(), encoding="utf-8")
    foreign = read_config(tmp_path / "training_args.json", GRAPH.sections)
    assert (foreign.format, foreign.base, foreign.section) == ("transformers", "", "finetune_lora")
    assert settings(foreign) == dict(
        **{
            "learning_rate": 1e-4,
            "epochs": 2,
            "schedule": "cosine",
            "batch_size": 6,
            "seed": 3,
            "max_grad_norm": 1.0,
        },
        **{
            "gradient_accumulation_steps": 1,
            "warmup_ratio": 0.1,
            "max_steps": 50,
            "weight_decay": 0.1,
        },
        **{
            "optimizer": "paged-adamw-8bit",
            "neftune_alpha": 5.0,
            "gradient_checkpointing": "none",
            "save_steps": 500,
        },
    )
    assert foreign.left and not any("no such setting" in why for why in left(foreign).values())


@pytest.mark.parametrize(
    ("changes", "taken", "why"),
    [
        (
            {"adam_beta2": 0.95, "adam_epsilon": 1e-6},
            {"adam_beta2": 0.95, "adam_epsilon": 1e-6},
            {},
        ),
        (
            {"optim": "sgd", "adam_beta2": 0.95},
            {},
            {"adam_beta2": "optimizer sgd does not read it"},
        ),
        (
            {
                "lr_scheduler_type": "cosine_with_min_lr",
                "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
            },
            {"schedule": "cosine", "min_lr_ratio": 0.1},
            {},
        ),
        (
            {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": 2, "lr_end": 0.0}},
            {"schedule": "polynomial", "power": 2.0},
            {"lr_end": "there is no such setting here"},
        ),
        (
            {"lr_scheduler_type": "cosine_with_restarts", "lr_scheduler_kwargs": {"num_cycles": 3}},
            {"schedule": "cosine_with_restarts", "num_cycles": 3},
            {},
        ),
        (
            {"lr_scheduler_type": "constant_with_warmup", "cosine_min_lr_ratio": 0.1},
            {"schedule": "constant"},
            {"cosine_min_lr_ratio": "schedule constant does not read it"},
        ),
        ({"optim": "muon"}, {"optimizer": "muon"}, {}),
        (
            {"save_strategy": "steps", "save_steps": 50, "save_total_limit": 2},
            {"save_steps": 50, "save_total_limit": 2},
            {"save_strategy": "results go to artifacts/, each stage to its folder"},
        ),
        (
            {"save_strategy": "epoch", "save_steps": 500, "save_total_limit": 2},
            {},
            {
                "save_strategy": "results go to artifacts/, each stage to its folder",
                "save_steps": "save_strategy is not steps",
                "save_total_limit": "save_strategy is not steps",
            },
        ),
    ],
)
def test_numbers_of_optimizer_and_schedule_are_taken_where_they_are_read(
    changes: dict[str, Any], taken: dict[str, Any], why: dict[str, str], tmp_path: Path
) -> None:
    foreign = foreign_of(
        tmp_path, {"per_device_train_batch_size": 6, "num_train_epochs": 2} | changes
    )
    assert settings(foreign).items() >= taken.items()
    assert settings(foreign).keys() == {"batch_size", "epochs", *taken} | (
        {"optimizer"} if "optim" in changes else set()
    )
    assert left(foreign) == why


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (
            {**AXOLOTL, "lora_r": "many"},
            "lora_r must be a whole number, at least 1, below 2147483648, got 'many'",
        ),
        ({**AXOLOTL, "lora_r": 0}, "lora_r must be at least 1, got 0"),
        ({**AXOLOTL, "lora_alpha": [1]}, "lora_alpha must be a finite number, got [1]"),
        ({**AXOLOTL, "adapter": "other"}, "adapter must be one of lora, qlora, got 'other'"),
        ({**AXOLOTL, "adapter": ["lora"]}, "adapter must be one of lora, qlora"),
        ({**AXOLOTL, "base_model": {"a": 1}}, "base_model must be a text, got {'a': 1}"),
        (
            {**AXOLOTL, "lora_target_linear": None, "lora_target_modules": {"a": 1}},
            "lora_target_modules must be a name",
        ),
        ({**AXOLOTL, "learning_rate": "9" * 5000}, "learning_rate is too long"),
        ({"peft_type": "VERA"}, "peft_type must be one of LORA"),
        ({"finetuning_type": "lora", "lora_rank": -8}, "lora_rank must be at least 1, got -8"),
        ({"finetuning_type": "lora", "lora_rank": 10**400}, "lora_rank must be below"),
        (
            {"iters": 1, "lora_parameters": {"rank": -8, "scale": 2.0}},
            "lora_parameters.rank must be at least 1, got -8",
        ),
        (
            {"iters": 1, "lora_parameters": {"rank": 8, "scale": -2.5}},
            "lora_parameters.scale must be more than 0, got -2.5",
        ),
        (
            {"iters": 1, "lora_parameters": {"rank": 10**400, "scale": 2.5}},
            "lora_parameters.rank must be below",
        ),
        (
            {"pretrain": {}, "finetune_lora": {"rank": 2}},
            "A params file of this project is given with --params",
        ),
    ],
)
def test_a_value_that_breaks_a_rule_is_one_message_with_the_file_and_their_key(
    tree: dict[str, Any], message: str, tmp_path: Path
) -> None:
    said = user_error(foreign_of, tmp_path, tree)
    assert message.removesuffix(", at least 1, below 2147483648, got 'many'") in said
    assert "config.yml" in said and len(said) < 600


BOMB = "a: &a [x, x]\n" + "".join(
    f"{chr(98 + n)}: &{chr(98 + n)} [{', '.join(['*' + chr(97 + n)] * 9)}]\n" for n in range(20)
)


@pytest.mark.parametrize(
    ("name", "raw", "message"),
    [
        ("x.yml", f"base_model: m\n{BOMB}lora_r: *u\n".encode(), "aliases"),
        ("x.yml", b"base_model: " + b"[" * 50_000, "nested too deeply"),
        ("x.yml", b"base_model:\n" + b"- " * 40_000, "nested too deeply"),
        ("x.json", b'{"peft_type": ' + b"[" * 90_000, "is not a JSON object"),
        ("x.json", b'{"peft_type": ', "is not a JSON object"),
        (
            "x.yml",
            b"base_model: " + b"[" * 700 + b"]" * 700 + b"\nadapter: lora\n",
            "nested too deeply",
        ),
        ("x.yml", b"base_model: 1\nbase_model: 2\n", "twice"),
        ("x.yml", b"base_model: !!python/object/apply:os.system [ls]\n", "is not valid YAML"),
        ("x.yml", b"base_model: m\nseed: " + b"9" * 50_000, "is not valid YAML"),
        (
            "training_args.bin",
            b"\x80\x05\x95" + bytes(range(256)),
            "is a pickle, which is not read",
        ),
        ("x.yml", b"#" * (LARGEST + 1), "at most 100,000 characters"),
        ("x.json", b" " * (LARGEST + 1), "at most 100,000 bytes"),
        ("x.yml", b"- a\n", "must hold key: value lines"),
        ("x.yml", b"", "must hold key: value lines"),
    ],
    ids=range(14),
)
def test_a_file_made_to_hurt_is_one_message(
    name: str, raw: bytes, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(raw)
    said = user_error(read_config, tmp_path / name, GRAPH.sections)
    assert message in said and len(said) < 600


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-10, 10) | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=5,
)
WORDS = st.sampled_from(
    sorted({*KEYS, *NO_COUNTERPART, *AXOLOTL, *LLAMA_FACTORY, *MLX, "r", "use_peft"})
)


@given(st.sampled_from(list(FORMATS.values())), st.dictionaries(WORDS, VALUES, max_size=6))
def test_any_values_are_taken_as_valid_settings_or_left_or_refused(
    tool: Any, tree: dict[str, Any]
) -> None:
    marked = {sorted(tool.marks)[0]: "LORA", **tree}
    with TemporaryDirectory() as folder:
        try:
            foreign = foreign_of(Path(folder), marked, "config.json")
        except UserError:
            return
    kind = GRAPH.sections[foreign.section]
    for key, value in foreign.values.items():
        name = key.removeprefix(f"{foreign.section}.")
        check_value(hints(kind)[name], value, key, ValueSource("x"))


def test_every_reason_is_found_by_its_names_and_none_of_them_has_a_counterpart() -> None:
    assert why_none("wandb_project") == why_none("report_to") and why_none("deepspeed")
    assert why_none("lora_r") is None and not KEYS.keys() & NO_COUNTERPART.keys()
    ours = {key for kind in GRAPH.sections.values() for key in hints(kind)}
    # of import and expand_vocab, not of a section that trains; or of another meaning in other tools
    elsewhere = {"trust_remote_code", "special_tokens", "chat_template"}
    assert {key for key in (*KEYS, *ours) if why_none(key)} <= elsewhere
