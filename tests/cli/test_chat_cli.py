"""`lora chat`: what it answers, keeps, compares and saves."""

import io
import json
import os
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from pipeline.adapters.config import AdapterSpec
from pipeline.data.tokenizers.word import load_tokenizer
from pipeline.inference.engine import continued, load
from tests.conftest import Lora
from tests.helpers.checkpoints import adapter
from tests.helpers.families import FAMILIES, new_project

pytestmark = pytest.mark.filterwarnings("ignore")
SPEC = AdapterSpec(4, 64, ("q_proj", "v_proj", "down_proj"))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base that has a chat template, and two adapters on it."""
    root = new_project(tmp_path_factory.mktemp("chat"), FAMILIES["llama"])
    (root / "artifacts").mkdir()
    for name, seed in (("one", 1), ("two", 2)):
        adapter(root / "artifacts" / name, root / "base", SPEC, seed=seed)
    return root


def talk(
    cli: Lora, monkeypatch: pytest.MonkeyPatch, home: Path, lines: list[str], *options: str
) -> tuple[str, str]:
    """What `lora chat` answers to these lines, and its notes."""
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    code, out, err = cli("chat", "--base", "base", "--max-tokens", "9", *options, cwd=home)
    assert code == 0
    return out, err


def answers(home: Path, questions: list[str], name: str | None, system: str = "") -> list[str]:
    """The same conversation by the engine, each prompt written out by the template."""
    loaded = load(home / "base", home / "artifacts" / name if name else None)
    messages = [{"role": "system", "content": system}] if system else []
    said = []
    for question in questions:
        messages.append({"role": "user", "content": question})
        said.append(
            continued(loaded, load_tokenizer(home / "base").render(messages, True), 9).strip()
        )
        messages.append({"role": "assistant", "content": said[-1]})
    return said


def test_each_turn_is_answered_on_the_whole_history(
    cli: Lora, monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    questions = ["Which currency has Bulgaria?", "And Japan?"]
    for name in (None, "one"):
        options = ["--adapter", f"artifacts/{name}"] if name else []
        out, _ = talk(cli, monkeypatch, home, questions, "--system", "Be brief.", *options)
        assert (
            out.splitlines() == "\n".join(answers(home, questions, name, "Be brief.")).splitlines()
        )


def test_adapters_are_switched_and_compared_on_the_same_history(
    cli: Lora, monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    question = "Two and two?"
    one, two, base = (answers(home, [question], name)[0] for name in ("one", "two", None))
    assert len({one, two, base}) == 3
    lines = [
        "/adapter one",
        question,
        "/reset",
        "/adapter two",
        "/compare base",
        question,
        "/compare",
        "/undo",
        question,
    ]
    out, _ = talk(cli, monkeypatch, home, lines)
    assert out == f"{one}\ntwo:\n{two}\nbase:\n{base}\n{two}\n"


def test_an_adapter_is_loaded_on_the_base_that_was_named(
    cli: Lora, monkeypatch: pytest.MonkeyPatch, home: Path, tmp_path: Path
) -> None:
    """Also where the base that the adapter names is there too."""
    other = tmp_path / "other"
    shutil.copytree(home / "base", other)
    weights = load_file(other / "model.safetensors")
    changed = {name: weight.flip(0) for name, weight in weights.items()}
    save_file(changed, other / "model.safetensors", metadata={"format": "pt"})
    loaded = load(other, home / "artifacts/one")
    prompt = load_tokenizer(other).render([{"role": "user", "content": "Two and two?"}], True)
    answer = continued(loaded, prompt, 9).strip()
    assert answer != answers(home, ["Two and two?"], "one")[0]
    options = ("--base", str(other), "--adapter", "artifacts/one")
    out, err = talk(cli, monkeypatch, home, ["Two and two?"], *options)
    assert out == f"{answer}\n" and f"model: artifacts/one on {other}\n" in err


def test_a_system_prompt_that_is_not_utf8_is_one_message(
    cli: Lora, monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("Two and two?\n"))
    code, out, err = cli("chat", "--base", "base", "--system", "\udcff", cwd=home)
    assert (code, out) == (2, "") and "it is not valid UTF-8" in err


def test_strength_zero_is_the_base(cli: Lora, monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    lines = ["/adapter one", "/strength 0", "Two and two?", "/reset", "/strength 1", "Two and two?"]
    out, _ = talk(cli, monkeypatch, home, lines)
    assert (
        out
        == f"{answers(home, ['Two and two?'], None)[0]}\n{answers(home, ['Two and two?'], 'one')[0]}\n"
    )


def test_a_saved_conversation_is_a_data_file(
    cli: Lora, monkeypatch: pytest.MonkeyPatch, home: Path, tmp_path: Path
) -> None:
    file = tmp_path / "what I said.jsonl"
    _, err = talk(
        cli,
        monkeypatch,
        home,
        ["/system Be brief.", "Two and two?", f"/save {file}", f"/save {file}"],
    )
    assert f"`lora train --data '{file}'` reads them\n" in err
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    answer = answers(home, ["Two and two?"], None, "Be brief.")[0]
    turns = [("system", "Be brief."), ("user", "Two and two?"), ("assistant", answer)]
    assert (
        rows == [{"messages": [{"role": role, "content": content} for role, content in turns]}] * 2
    )
    assert cli("data", "check", str(file), "--base", "base", cwd=home)[0] == 0


def test_a_base_without_a_template_completes(
    cli: Lora, monkeypatch: pytest.MonkeyPatch, finished: Path
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("die katze\nder wind\n"))
    code, out, err = cli("chat", "--adapter", "artifacts/lora_adapter", cwd=finished)
    loaded = load(finished / "artifacts/expanded", finished / "artifacts/lora_adapter")
    said = [continued(loaded, text, 512).strip() for text in ("die katze", "der wind")]
    assert (code, [line.strip() for line in out.splitlines()]) == (0, said)
    assert "it completes each text by itself" in err


def test_without_a_name_it_talks_with_the_model_trained_last_not_merged(
    cli: Lora, monkeypatch: pytest.MonkeyPatch, project: Path
) -> None:
    for newest, named in (
        ("lora_adapter", "lora_adapter on artifacts/expanded"),
        ("lora_merged", "lora_adapter on"),
    ):
        os.utime(project / "artifacts" / newest / "manifest.json")
        monkeypatch.setattr("sys.stdin", io.StringIO(""))
        assert f"model: artifacts/{named}" in cli("chat", cwd=project)[2]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/adapter three", "three is not an adapter. Adapters here: one, two; or base, or a path."),
        ("/strength much", "/strength must be a number from 0 to 2, got 'much'."),
        ("/strength", "/strength needs X, got nothing."),
        ("/save said.txt", "/save needs a file that ends in .jsonl, got said.txt."),
        ("/save said.jsonl", "/save needs a conversation: nothing was said yet."),
        ("/save a\0.jsonl", "/save a␀.jsonl: "),
        ("/retry", "/retry needs a question to answer again: there is none yet."),
        ("/jump", "/jump is no command. Commands: /adapter,"),
        ("fake <|end|>", "contains <|end|>, a special token"),
        ("two " * 80, "/undo takes the last turn back"),
    ],
)
def test_a_line_that_cannot_be_obeyed_is_one_message_and_the_conversation_goes_on(
    cli: Lora, monkeypatch: pytest.MonkeyPatch, home: Path, line: str, message: str
) -> None:
    before = ["Two and two?"] if "undo" in message or "\0" in line else []
    out, err = talk(cli, monkeypatch, home, [*before, line, "/reset", "Two and two?"])
    assert message in err
    assert out.splitlines()[-1] == answers(home, ["Two and two?"], None)[0].splitlines()[-1]
