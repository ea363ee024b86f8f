"""`lora new --from`: a project with the settings of another tool's config, or one message and
nothing written.
"""

from pathlib import Path

import pytest

from tests.conftest import Lora
from tests.helpers.bases import toy_checkpoint
from tests.helpers.projects import load, refusal

CONFIG = """\
base_model: models/toy
adapter: qlora
load_in_4bit: true
lora_r: 32
lora_alpha: 64
lora_target_linear: true
learning_rate: 3e-4
num_epochs: 2
micro_batch_size: 2
sequence_len: 64
datasets:
  - path: sets/mine.jsonl
    type: completion
flash_attention: true
wandb_project: mine
"""
TEXTS = "".join(
    f'{{"text": "The capital is Sofia, and {n} and {n} are {2 * n}."}}\n' for n in range(12)
)


@pytest.fixture
def here(tmp_path: Path) -> Path:
    toy_checkpoint(tmp_path / "models/toy")
    (tmp_path / "sets").mkdir()
    (tmp_path / "sets/mine.jsonl").write_text(TEXTS, encoding="utf-8")
    (tmp_path / "axolotl.yml").write_text(CONFIG, encoding="utf-8")
    return tmp_path


@pytest.mark.slow
def test_a_project_has_the_settings_the_data_and_the_method_of_the_config(
    cli: Lora, here: Path
) -> None:
    code, out, err = cli("new", "mine", "--from", "axolotl.yml", cwd=here)
    assert code == 0, err
    for line in (
        "lora_r ",
        "finetune_lora.rank ",
        "not taken: flash_attention (",
        "not taken: wandb_project (",
    ):
        assert line in out
    params = load(here / "mine/params.yaml")
    lora = params.finetune_lora
    assert (lora.rank, lora.alpha, lora.learning_rate, lora.epochs) == (32, 64, 3e-4, 2)
    assert (lora.batch_size, lora.max_length) == (2, 64)
    assert (lora.quantization, lora.target_modules, lora.data) == (
        "nf4",
        ("all-linear",),
        "../sets/mine.jsonl",
    )
    assert lora.schedule == "linear", "what the config does not say is chosen"
    assert params.origin.base == "../models/toy"
    assert [name for name in params.written if name.startswith("finetune_")] == ["finetune_lora"]


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (CONFIG.replace("32", "-1"), (), "axolotl.yml: lora_r must be at least 1, got -1"),
        (CONFIG.replace("models/toy", "models/gone"), (), "models/gone"),
        (
            CONFIG.replace("base_model: models/toy", "gradient_checkpointing: true"),
            (),
            "names no base model",
        ),
        (CONFIG.replace("sets/mine", "sets/gone"), (), "names no data file that is here"),
        (CONFIG, ("--params", "other.yaml"), "--from and --params both say"),
        ("x: 1\n", (), "axolotl.yml is no config that is read here (PEFT, mlx-lm"),
        ("base_model: \x1b[31mred\nadapter: qlora\n", (), "is not valid YAML"),
    ],
)
def test_what_is_wrong_is_one_message_and_nothing_is_written(
    config: str, options: tuple[str, ...], message: str, cli: Lora, here: Path
) -> None:
    (here / "axolotl.yml").write_text(config, encoding="utf-8")
    code, _, err = cli("new", "mine", "--from", "axolotl.yml", *options, cwd=here)
    said = err.splitlines()
    assert (
        code == 1
        and message in said[-1]
        and len([line for line in said if line.startswith("error: ")]) == 1
    )
    assert not (here / "mine/params.yaml").exists()


@pytest.mark.slow
def test_several_data_files_become_a_list(cli: Lora, here: Path) -> None:
    (here / "two.csv").write_text("text\nThe euro is the currency.\n", encoding="utf-8")
    (here / "axolotl.yml").write_text(
        CONFIG.replace("datasets:\n", "datasets:\n  - path: two.csv\n"), encoding="utf-8"
    )
    code, _, err = cli("new", "mine", "--from", "axolotl.yml", cwd=here)
    assert code == 0, err
    assert load(here / "mine/params.yaml").finetune_lora.files == (
        "../two.csv",
        "../sets/mine.jsonl",
    )


@pytest.mark.slow
def test_a_project_that_is_there_keeps_its_settings(cli: Lora, here: Path) -> None:
    assert cli("new", "mine", "--base", "models/toy", "--data", "sets/mine.jsonl", cwd=here)[0] == 0
    before = (here / "mine/params.yaml").read_bytes()
    code, _, err = cli("new", "mine", "--from", "axolotl.yml", cwd=here)
    assert code == 1 and "mine is a project already" in err
    assert (here / "mine/params.yaml").read_bytes() == before
    assert "No such file" in refusal(cli("new", "other", "--from", "gone.yml", cwd=here))


@pytest.mark.parametrize(
    ("key", "reason"), [("template=x", "chat template"), ("max_samples=9", "data files")]
)
def test_a_setting_without_a_counterpart_is_answered_with_the_reason(
    key: str, reason: str, cli: Lora, here: Path
) -> None:
    (here / "params.yaml").write_text("finetune_lora: {}\n", encoding="utf-8")
    said = refusal(cli("finetune", "lora", "--set", f"finetune_lora.{key}", cwd=here))
    assert f"there is no key finetune_lora.{key.partition('=')[0]}: " in said and reason in said
