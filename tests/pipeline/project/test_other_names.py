"""Other tools' names of sections and keys are ours: in the file, in --set, in what is derived."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.project.dvc_yaml import render_dvc_yaml
from pipeline.project.params.edit import dump_inline
from pipeline.project.params.load import Params, parse
from pipeline.stages.registry import GRAPH, open_project
from tests.helpers.errors import user_error
from tests.helpers.projects import new_houses, save

OURS = "base: org/model\nfinetune_lora:\n  rank: 8\n  quantization: nf4\n  epochs: 3\n"
THEIRS = "model_name_or_path: org/model\nlora:\n  r: 8\n  load_in_4bit: true\n  num_epochs: 3.0\n"


def read(text: str, *overrides: str) -> Params:
    return parse(text, Path("params.yaml"), GRAPH.sections, overrides)


def test_a_file_in_their_words_says_what_one_in_ours_says() -> None:
    ours, theirs = read(OURS), read(THEIRS)
    assert ours == theirs and ours.note == ""
    assert theirs.tree == ours.tree and theirs.sources == ours.sources
    assert theirs.note == (
        "model_name_or_path is base here, lora finetune_lora, r rank, load_in_4bit quantization "
        "nf4, num_epochs epochs: taken."
    )


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("{lora_alpha: 32}", {"alpha": 32.0}),
        ("{per_device_train_batch_size: 2}", {"batch_size": 2}),
        ("{bf16: true, fp16: false}", {"precision": "bf16"}),
        ("{bf16: true, torch_dtype: bfloat16}", {"precision": "bf16"}),
        ("{gradient_checkpointing: true}", {"gradient_checkpointing": "full"}),
        ("{checkpointing: selective}", {"gradient_checkpointing": "selective"}),
        ("{optim: adamw_torch}", {"optimizer": "adamw"}),
        ("{optimizer: paged_adamw_8bit}", {"optimizer": "paged-adamw-8bit"}),
        ("{lr_scheduler_type: cosine}", {"schedule": "cosine"}),
        ("{use_dora: false}", {"dora": False}),
        ("{lora_target_modules: 'q_proj,v_proj'}", {"target_modules": ("q_proj", "v_proj")}),
        (
            "{load_in_4bit: true, bnb_4bit_use_double_quant: true}",
            {"quantization": "nf4-dq"},
        ),
        ("{max_steps: -1, max_train_steps: 5}", {"max_steps": 5}),
    ],
)
def test_their_values_are_ours(theirs: str, ours: dict[str, Any]) -> None:
    section = read(f"base: org/m\nfinetune_lora: {theirs}").finetune_lora
    plain = read(f"base: org/m\nfinetune_lora: {dump_inline(_plain(ours))}").finetune_lora
    assert section == plain
    assert {key: getattr(section, key) for key in ours} == ours


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {k: list(value) if isinstance(value, tuple) else value for k, value in values.items()}


@pytest.mark.parametrize(
    ("section", "name", "implied"),
    [
        ("qlora", "finetune_lora", {"quantization": "nf4"}),
        ("lora", "finetune_lora", {"quantization": "none"}),
        ("dpo", "finetune_dpo", {"loss": "dpo"}),
        ("orpo", "finetune_dpo", {"loss": "orpo"}),
        ("full", "finetune_full", {}),
    ],
)
def test_a_section_of_another_name_means_what_the_name_says(
    section: str, name: str, implied: dict[str, Any]
) -> None:
    params = read(f"base: org/m\n{section}:\n  num_epochs: 2\n")
    assert params.written == {name, "import"} and params.section(name).epochs == 2
    assert {key: getattr(params.section(name), key) for key in implied} == implied
    assert read(f"{section}:").as_written(name) == section
    for key in implied:  # what is set wins
        value = "int8" if key == "quantization" else "ipo"
        assert getattr(read(f"{section}: {{{key}: {value}}}").section(name), key) == value


@pytest.mark.parametrize(
    ("key", "why"),
    [
        ("output_dir: out", "results go to artifacts/"),
        ("push_to_hub: true", "`lora push` uploads an adapter"),
        ("report_to: wandb", "`report_to`, above the sections, names the trackers"),
        ("logging_steps: 10", "`report_to`, above the sections, names the trackers"),
        ("dataloader_num_workers: 4", "data files are read as they are"),
        ("deepspeed: ds.json", "`lora finetune METHOD --devices N`"),
        ("do_train: true", "it is always so here"),
        ("fp16: false", "it sets nothing"),
    ],
)
def test_what_changes_no_result_is_ignored_with_the_reason(key: str, why: str) -> None:
    params = read(f"finetune_lora:\n  {key}\n")
    assert params == read("finetune_lora: {}")
    assert params.note.startswith(f"finetune_lora.{key.partition(':')[0]} ignored: {why}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("finetune_lora: {template: llama3}", "there is no key finetune_lora.template: the base's"),
        ("finetune_lora: {max_samples: 9}", "there is no key finetune_lora.max_samples: the data"),
        ("finetune_lora: {scale: 20.0}", "finetune_lora.scale cannot be taken: alpha is scale × "),
        ("finetune_lora: {optim: lion}", "finetune_lora.optim cannot be taken: values here are ad"),
        ("finetune_lora: {test_size: 100}", "test_size cannot be taken: it is a number of example"),
        ("finetune_lora: {r: 0}", "finetune_lora.r must be at least 1, got 0. Edit params.yaml."),
        ("finetune_lora: {r: 8, rank: 8}", "finetune_lora.r and finetune_lora.rank are both rank"),
        ("finetune_lora: {rank: 8, r: 4}", "finetune_lora.rank and finetune_lora.r are both rank"),
        ("finetune_lora: {r: 8, lora_r: 4}", "finetune_lora.r and finetune_lora.lora_r are both r"),
        ("finetune_lora: {}\nlora: {}", "lora is finetune_lora here, which is there too"),
        ("base: a\nmodel_id: b", "base and model_id are both base. Remove one of them."),
        ("finetune_full: {r: 8}", "unknown key finetune_full.r"),
        ("training: {r: 8}", "unknown key training.r"),
        ("lora_r: 8", "lora_r stands above the sections. Put it into one, such as finetune_lora"),
        ("learning_rate: 8", "`lora new DIR --from params.yaml` makes a project"),
    ],
)
def test_what_would_change_the_result_is_one_message(text: str, message: str) -> None:
    assert message in user_error(read, text)


@pytest.mark.parametrize(
    ("text", "override", "key"),
    [
        ("finetune_lora: {}", "r=4", "finetune_lora.rank"),
        ("finetune_lora: {}\npretrain: {}", "num_train_epochs=4", "finetune_lora.epochs"),
        ("finetune_lora: {}\nfinetune_full: {}", "num_train_epochs=4", "training.epochs"),
        ("finetune_lora: {}\nfinetune_full: {}", "lora_r=4", "finetune_lora.rank"),
        ("finetune_lora: {rank: 2}", "lora.r=4", "finetune_lora.rank"),
        ("lora: {r: 2}", "finetune_lora.lora_r=4", "finetune_lora.rank"),
        ("finetune_lora: {}", "model_id=4", "base"),
        ("evaluate: {}\nfinetune_lora: {}", "top_k=4", "evaluate.top_k"),
    ],
)
def test_an_override_in_their_words_sets_the_only_key_that_it_can_mean(
    text: str, override: str, key: str
) -> None:
    if key == "base":
        override = override.replace("4", "org/m")
    params = read(text, override)
    assert dict(params.overrides) == {key: "org/m" if key == "base" else 4}
    assert params.sources[key] == "--set"


@pytest.mark.parametrize(
    ("text", "override", "message"),
    [
        ("finetune_lora: {epochs: 2}\nfinetune_full: {}", "epochs=4", "--set takes section.key=v"),
        ("finetune_lora: {}\nfinetune_dpo: {}", "r=4", "--set takes section.key=value"),
        ("finetune_lora: {}", "nothing_like_it=4", "--set takes section.key=value"),
        ("finetune_lora: {}", "r=0", "finetune_lora.r must be at least 1, got 0. Change it in --s"),
        (
            "finetune_lora: {load_in_4bit: true}",
            "finetune_lora.load_in_4bit=false",
            "finetune_lora.load_in_4bit: False sets nothing here. Set finetune_lora.quantization",
        ),
    ],
)
def test_an_override_that_can_mean_several_things_or_none_is_one_message(
    text: str, override: str, message: str
) -> None:
    assert message in user_error(read, text, override)


def test_an_edit_replaces_the_line_of_another_name(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(
        "model_id: minigpt\nlora:\n  r: 4   # small\n  load_in_4bit: true\n  train_file: a.txt\n",
        encoding="utf-8",
    )
    save(
        path,
        {
            "finetune_lora.rank": 16,
            "finetune_lora.quantization": "int8",
            "finetune_lora.data": "b.txt",
            "finetune_lora.alpha": 2.0,
            "base": "org/m",
        },
    )
    assert path.read_text(encoding="utf-8") == (
        "model_id: org/m\nlora:\n  r: 16  # small\n  quantization: int8\n  train_file: b.txt\n"
        "  alpha: 2.0\n"
    )


def test_what_a_name_implies_replaces_nothing_that_is_set() -> None:
    text = "finetune_lora: {quantization: int8}"
    assert read(text, "qlora.r=8").finetune_lora.quantization == "int8"
    params = read("qlora: {r: 8}")
    assert params.note == "qlora is finetune_lora with quantization nf4 here, r rank: taken."


def test_dvc_watches_the_names_that_the_file_has(tmp_path: Path) -> None:
    new_houses(tmp_path)
    path = tmp_path / "params.yaml"
    before = yaml.safe_load(render_dvc_yaml(open_project(path)))["stages"]["finetune_lora"]
    text = path.read_text(encoding="utf-8").replace("base: minigpt", "model_id: minigpt")
    head, _, tail = text.partition("finetune_lora:\n  data:")
    path.write_text(f"{head}lora:\n  train_file:{tail}", encoding="utf-8")
    after = yaml.safe_load(render_dvc_yaml(open_project(path)))["stages"]
    assert "finetune_lora" in before["params"] and "${finetune_lora.data}" in before["deps"]
    lora = after["finetune_lora"]
    assert "lora" in lora["params"] and "finetune_lora" not in lora["params"]
    assert lora["deps"][0] == "${lora.train_file}" and lora["outs"] == before["outs"]
    path.write_text(THEIRS, encoding="utf-8")
    imported = yaml.safe_load(render_dvc_yaml(open_project(path)))["stages"]["import"]
    assert imported["params"][0] == "model_name_or_path"
