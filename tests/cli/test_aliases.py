"""A former name, or another tool's: keys and sections are taken, commands and options are answered
with the name here.
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
    ("setting", "note"),
    [
        ("finetune_lora.lora_alpha=8", "finetune_lora.lora_alpha is alpha here: taken."),
        ("finetune_lora.clip_norm=1", "finetune_lora.clip_norm is max_grad_norm here: taken."),
        ("pretrain.checkpointing=full", "pretrain.checkpointing is gradient_checkpointing here"),
        ("finetune_lora.retain_batch=2", "retain_batch is retention_batch_size here: taken."),
        ("finetune_full.lr_scheduler_type=cosine", "lr_scheduler_type is schedule here: taken."),
        ("lora.rank=2", "lora is finetune_lora here: taken."),
        ("full.output_dir=x", "full.output_dir ignored: results go to artifacts/"),
        ("model_name_or_path=minigpt", "model_name_or_path is base here: taken."),
    ],
)
def test_a_key_of_another_name_is_taken_with_one_note(
    setting: str, note: str, cli: Lora, tmp_path: Path
) -> None:
    new_houses(tmp_path)
    code, out, err = cli("params", "show", "--set", setting, cwd=tmp_path)
    assert code == 0 and note in err and err.count("\n") == 1
    theirs = setting.rpartition(".")[2].partition("=")[0]
    assert theirs == "rank" or f" {theirs}: " not in out, "only our names are shown"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("finetune_lroa.epochs=2", "unknown key finetune_lroa. Did you mean finetune_lora?"),
        ("finetune_lora.rang=2", "unknown key finetune_lora.rang. Did you mean rank?"),
    ],
)
def test_a_key_that_is_near_ours_is_answered_with_it(
    setting: str, message: str, cli: Lora, tmp_path: Path
) -> None:
    new_houses(tmp_path)
    assert message in refusal(cli("pretrain", "--set", setting, cwd=tmp_path))


def test_a_key_above_the_sections_is_taken_too_and_told_once(cli: Lora, tmp_path: Path) -> None:
    new_houses(tmp_path)
    text = (tmp_path / "params.yaml").read_text(encoding="utf-8")
    (tmp_path / "params.yaml").write_text(
        text.replace("base:", "model_name_or_path:", 1), encoding="utf-8"
    )
    code, out, err = cli("params", "show", "--set", "finetune_lora.r=2", cwd=tmp_path)
    note = "model_name_or_path is base here, finetune_lora.r rank: taken.\n"
    assert (code, err) == (0, note) and "base: minigpt" in out


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
