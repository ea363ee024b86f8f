"""A former name, or another tool's, is answered with the name here: keys, sections, commands,
options.
"""

from pathlib import Path

import pytest
from typer.main import get_command

from cli.main import app
from pipeline.project.params.aliases import COMMANDS, KEYS, OPTIONS, suggest
from pipeline.project.params.load import TOP_LEVEL
from pipeline.project.params.schema import hints
from pipeline.stages.registry import GRAPH
from tests.conftest import Lora
from tests.helpers.projects import new_houses, refusal


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("finetune_lora.lora_alpha=8", "unknown key finetune_lora.lora_alpha. Did you mean alpha?"),
        ("finetune_lora.r=8", "unknown key finetune_lora.r. Did you mean rank?"),
        (
            "finetune_lora.clip_norm=1",
            "unknown key finetune_lora.clip_norm. Did you mean max_grad_norm?",
        ),
        (
            "finetune_lora.accumulate=2",
            "unknown key finetune_lora.accumulate. Did you mean gradient_accumulation_steps?",
        ),
        (
            "pretrain.checkpointing=full",
            "unknown key pretrain.checkpointing. Did you mean gradient_checkpointing?",
        ),
        (
            "finetune_lora.retain=x",
            "unknown key finetune_lora.retain. Did you mean retention_data?",
        ),
        (
            "finetune_lora.retain_batch=x",
            "unknown key finetune_lora.retain_batch. Did you mean retention_batch_size?",
        ),
        ("finetune_full.per_device_train_batch_size=2", "Did you mean batch_size?"),
        ("finetune_full.lr_scheduler_type=cosine", "Did you mean schedule?"),
        ("finetune_full.num_train_epochs=2", "Did you mean epochs?"),
        ("pretrain.base=org/model", "unknown key pretrain.base. Did you mean base?"),
        ("base_model=org/model", "--set takes section.key=value"),
        ("scratch.epochs=2", "unknown key scratch. Did you mean train_from_scratch?"),
        ("lora.rank=2", "unknown key lora. Did you mean finetune_lora?"),
        ("prefix.epochs=2", "unknown key prefix. Did you mean finetune_prefix?"),
        ("finetune_lora.rang=2", "unknown key finetune_lora.rang. Did you mean rank?"),
    ],
)
def test_a_key_of_another_name_is_answered_with_ours(
    setting: str, message: str, cli: Lora, tmp_path: Path
) -> None:
    new_houses(tmp_path)
    assert message in refusal(cli("pretrain", "--set", setting, cwd=tmp_path))


def test_a_key_above_the_sections_is_answered_too(cli: Lora, tmp_path: Path) -> None:
    new_houses(tmp_path)
    text = (tmp_path / "params.yaml").read_text(encoding="utf-8")
    (tmp_path / "params.yaml").write_text(
        text.replace("base:", "model_name_or_path:", 1), encoding="utf-8"
    )
    said = refusal(cli("pretrain", cwd=tmp_path))
    assert "params.yaml: unknown key model_name_or_path. Did you mean base?" in said


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (("scratch",), "No such command 'scratch'. Did you mean 'train-from-scratch'?"),
        (("finetune", "qlora"), "No such command 'qlora'. Did you mean 'lora'?"),
        (("generate", "hi"), "No such command 'generate'. Did you mean 'prompt'?"),
        (("pretrian",), "Did you mean 'pretrain', 'train'?"),
        (
            ("export", "a", "--out", "b", "--as", "peft"),
            "No such option: --as. Did you mean --format?",
        ),
        (
            ("adapters", "combine", "a", "b", "--output", "c"),
            "No such option: --output. Did you mean --out?",
        ),
        (("calc", "--lora-r", "8"), "No such option: --lora-r. Did you mean --rank?"),
        (
            ("prompt", "hi", "--max-new-tokens", "8"),
            "No such option: --max-new-tokens. Did you mean --max-tokens?",
        ),
        (("doctor", "--lora-r", "8"), "No such option: --lora-r\n"),
    ],
)
def test_a_command_or_option_of_another_name_is_answered_with_ours(
    command: tuple[str, ...], message: str, cli: Lora, tmp_path: Path
) -> None:
    code, out, err = cli(*command, cwd=tmp_path)
    assert (code, out) == (2, "") and message in err and err.count("Did you mean") <= 1


def test_every_alias_names_something_that_there_is_and_is_itself_no_name_here() -> None:
    kinds = GRAPH.sections
    keys = {key for kind in kinds.values() for key in hints(kind)} | kinds.keys() | TOP_LEVEL.keys()
    for alias, meant in KEYS.items():
        assert meant in keys and ("." in alias or alias not in keys), alias
    root = get_command(app)
    commands, options = dict[str, object](), set[str]()

    def walk(command: object) -> None:
        options.update(name for option in getattr(command, "params", ()) for name in option.opts)
        for name, below in getattr(command, "commands", {}).items():
            commands[name] = below
            walk(below)

    walk(root)
    for alias, meant in COMMANDS.items():
        assert meant in commands and alias not in getattr(root, "commands"), alias  # noqa: B009
    for alias, meant in OPTIONS.items():
        assert meant in options, alias


def test_what_is_near_nothing_is_answered_with_nothing() -> None:
    assert suggest("xyzzy", ["rank", "alpha"], KEYS) is None
    assert suggest("lora_alpha", ["rank"], KEYS) is None, "the section has no such key"
    assert suggest("rnak", ["rank", "alpha"], KEYS) == "rank"
