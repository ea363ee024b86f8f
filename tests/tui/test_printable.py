"""Untrusted text (folder names, params, model answers) never reaches the terminal as control
characters.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.tokenizers.word import WordTokenizer
from pipeline.files.text import OBEYED, printable
from pipeline.models.load import Base, load_base, save_base
from pipeline.models.minigpt import MiniGPT, MiniGPTConfig
from tests.conftest import Lora
from tests.helpers.pilot import screen_text, until
from tui.app import Workbench

# a link that is never closed, red, and text turned round
LINK = "\x1b]8;;https://example.org\x07evil\x9b31m\u202e"


def obeyed(text: str) -> set[str]:
    return {c for c in text if ord(c) in OBEYED}


@given(st.text())
def test_only_what_a_terminal_obeys_is_changed(text: str) -> None:
    shown = printable(text)
    assert not obeyed(shown) and len(shown) == len(text)
    assert all(a == b for a, b in zip(text, shown, strict=True) if ord(a) not in OBEYED)
    assert printable("a\n\tb ü 世界 🤗") == "a\n\tb ü 世界 🤗"


# the consoles take their width from the environment that they are made in
@pytest.mark.usefixtures("cli")
def test_every_way_to_the_command_lines_output_is_covered(
    capsys: pytest.CaptureFixture[str],
) -> None:
    from cli.console import print_json, stdout, table

    stdout.print(LINK, markup=False)
    stdout.print(table(("name", "value"), [(LINK, "1")]))
    print_json({"name": LINK})
    out = capsys.readouterr().out
    assert not obeyed(out) and out.count("evil") == 3
    assert json.loads(out[out.index("{") :]) == {"name": LINK}


def adapter_called(root: Path, name: str) -> Path:
    return Path(shutil.copytree(root / "artifacts/lora_adapter", root / "artifacts" / name))


def test_names_of_folders_and_files_are_shown_and_not_obeyed(cli: Lora, project: Path) -> None:
    adapter_called(project, "x\x1b[31m\x9b1m")
    code, out, _ = cli("adapters", cwd=project)
    assert code == 0 and not obeyed(out) and "x␛[31m" in out.replace("\n", "")
    for words in (
        ["pretrain", "--params", LINK.replace("/", "")],
        ["prompt", "der", "--base", "no\x1b[31m"],
        ["adapters", "card", "no\x1b[31m"],
        ["pretrain", "--set", "base=\x1b[31m"],
    ):
        code, out, err = cli(*words, cwd=project)
        assert code == 1 and not obeyed(out + err), words


def test_the_answer_of_a_model_is_shown_and_not_obeyed(
    cli: Lora, tmp_path: Path, project: Path
) -> None:
    """A model that always answers with an escape sequence."""
    words = ["w", "\x1b[31mred\x1b]8;;x\x07"]
    tokenizer = WordTokenizer.of_words(words)
    model = MiniGPT(MiniGPTConfig(len(tokenizer), tokenizer.pad_id, tokenizer.end_id))
    model.requires_grad_(False)
    for parameter in model.parameters():
        parameter.zero_()
    norm: Any = model.body.get_submodule("final_layer_norm")
    norm.bias.fill_(1)
    model.lm_head.weight[tokenizer.id_of_token(words[1])].fill_(1)
    base = tmp_path / "base"
    base.mkdir()
    save_base(base, Base(model, tokenizer))
    code, out, _ = cli("prompt", "w", "--base", str(base), cwd=tmp_path)
    assert code == 0 and not obeyed(out) and "␛[31mred" in out
    code, out, _ = cli("prompt", "w", "--base", str(base), "--json", cwd=tmp_path)
    assert not obeyed(out) and words[1] in json.loads(out)["completion"]
    shutil.rmtree(project / "artifacts/base")
    shutil.copytree(base, project / "artifacts/base")
    code, out, _ = cli("compare", "w", cwd=project)
    assert code == 0 and not obeyed(out)
    assert load_base(base).tokenizer.word(tokenizer.id_of_token(words[1]) or 0) == words[1]


@pytest.mark.slow
async def test_the_terminal_ui_draws_nothing_that_a_terminal_obeys(project: Path) -> None:
    adapter_called(project, "x\x1b[31m")
    app = Workbench(project / "params.yaml")
    async with app.run_test(size=(120, 40)) as pilot:
        await pilot.press("5")
        await until(pilot, lambda: "x[31m" in screen_text(app))
        assert not obeyed(screen_text(app))
        app.log_message(f"a message {LINK}")
        await pilot.press("f12")
        await until(pilot, lambda: "evil" in screen_text(app))
        assert not obeyed(screen_text(app))
