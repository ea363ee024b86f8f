"""`lora new --from`: a project with the settings of another tool's config, or one message and nothing written."""

from pathlib import Path

import pytest

from tests.conftest import Lora
from tests.helpers.projects import load, refusal

CONFIG = """\
base_model: models/toy.gguf
adapter: qlora
load_in_4bit: true
lora_r: 32
lora_alpha: 64
lora_target_linear: true
learning_rate: 2e-4
num_epochs: 2
datasets:
  - path: sets/mine.jsonl
    type: completion
flash_attention: true
wandb_project: mine
"""


@pytest.fixture
def here(tmp_path: Path) -> Path:
    for name in ("models", "sets"):
        (tmp_path / name).mkdir()
    (tmp_path / "models/toy.gguf").write_bytes(b"GGUF")
    (tmp_path / "sets/mine.jsonl").write_text('{"text": "a"}\n', encoding="utf-8")
    (tmp_path / "axolotl.yml").write_text(CONFIG, encoding="utf-8")
    return tmp_path


def test_a_project_has_the_settings_the_data_and_the_method_of_the_config(cli: Lora, here: Path) -> None:
    code, out, err = cli("new", "mine", "--from", "axolotl.yml", cwd=here)
    assert (code, err) == (0, "")
    for line in ("lora_r ", "finetune_lora.rank ", "not taken: flash_attention (", "not taken: wandb_project ("):
        assert line in out
    params = load(here / "mine/params.yaml")
    lora = params.finetune_lora
    assert (lora.rank, lora.alpha, lora.learning_rate, lora.epochs) == (32, 64, 2e-4, 2)
    assert (lora.quantization, lora.target_modules, lora.data) == ("nf4", ("all-linear",), "data/mine.jsonl")
    assert lora.schedule == "linear", "what the config does not say is as for every pretrained base"
    assert params.origin.base == "../models/toy.gguf"
    assert [name for name in params.written if name.startswith("finetune_")] == ["finetune_lora"]
    assert (here / "mine/data/mine.jsonl").read_bytes() == (here / "sets/mine.jsonl").read_bytes()
    also = ("new", "two", "--from", "axolotl.yml", "--base", "models/toy.gguf", "--methods", "full")
    assert cli(*also, cwd=here)[0] == 0
    assert {"finetune_lora", "finetune_full"} <= load(here / "two/params.yaml").written


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (CONFIG.replace("32", "-1"), (), "axolotl.yml: lora_r must be at least 1, got -1"),
        (CONFIG.replace("models/toy.gguf", "models/gone.gguf"), (), "models/gone.gguf"),
        (CONFIG.replace("base_model: models/toy.gguf", "micro_batch_size: 2"), (), "names no base model"),
        (CONFIG, ("--params", "other.yaml"), "--from and --params both say"),
        ("x: 1\n", (), "axolotl.yml is no config that is read here (PEFT, mlx-lm"),
        ("base_model: \x1b[31mred\nadapter: qlora\n", (), "is not YAML"),
    ],
)
def test_what_is_wrong_is_one_message_and_nothing_is_written(
    config: str, options: tuple[str, ...], message: str, cli: Lora, here: Path
) -> None:
    (here / "axolotl.yml").write_text(config, encoding="utf-8")
    code, _, err = cli("new", "mine", "--from", "axolotl.yml", *options, cwd=here)
    assert code == 1 and message in err and err.count("\n") == 1
    assert not (here / "mine").exists()


def test_several_data_files_become_a_list_unless_two_have_one_name(cli: Lora, here: Path) -> None:
    (here / "two.csv").write_text("text\nb\n", encoding="utf-8")
    (here / "axolotl.yml").write_text(CONFIG.replace("datasets:\n", "datasets:\n  - path: two.csv\n"), encoding="utf-8")
    assert cli("new", "mine", "--from", "axolotl.yml", cwd=here)[0] == 0
    assert load(here / "mine/params.yaml").finetune_lora.files == ("data/two.csv", "data/mine.jsonl")
    (here / "mine.jsonl").write_text('{"text": "b"}\n', encoding="utf-8")
    config = CONFIG.replace("datasets:\n", "datasets:\n  - path: mine.jsonl\n")
    (here / "axolotl.yml").write_text(config, encoding="utf-8")
    code, _, err = cli("new", "other", "--from", "axolotl.yml", cwd=here)
    assert code == 1 and "two data files of one name" in err and not (here / "other").exists()


def test_a_project_that_is_there_keeps_its_settings(cli: Lora, here: Path) -> None:
    assert cli("new", "mine", "--base", "models/toy.gguf", cwd=here)[0] == 0
    before = (here / "mine/params.yaml").read_bytes()
    code, _, err = cli("new", "mine", "--from", "axolotl.yml", cwd=here)
    assert code == 1 and "mine is a project already" in err
    assert (here / "mine/params.yaml").read_bytes() == before
    assert "No such file" in refusal(cli("new", "other", "--from", "gone.yml", cwd=here))


@pytest.mark.parametrize(("key", "reason"), [("deepspeed=x", "--devices"), ("wandb_project=x", "loss.csv")])
def test_a_setting_without_a_counterpart_is_answered_with_the_reason(
    key: str, reason: str, cli: Lora, here: Path
) -> None:
    (here / "params.yaml").write_text("finetune_lora: {}\n", encoding="utf-8")
    said = refusal(cli("finetune", "lora", "--set", f"finetune_lora.{key}", cwd=here))
    assert f"there is no key finetune_lora.{key.partition('=')[0]}: " in said and reason in said
