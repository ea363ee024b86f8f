"""`lora data show` as a user types it."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import Lora
from tests.helpers.checkpoints import checkpoint
from tests.helpers.projects import lora
from tests.helpers.tokenizers import SMOLLM2, folder_with

LINES = [
    {"text": "The euro.\nThe lev."},
    {"prompt": "The currency of Bulgaria is the", "completion": " euro"},
    {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello!"}]},
    {"text": "Sofia"},
]


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A data file, and a subword model."""
    model = folder_with(tmp_path / "artifacts/base", SMOLLM2)
    (model / "config.json").write_text('{"max_position_embeddings": 99}', encoding="utf-8")
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, LINES)), encoding="utf-8")
    return tmp_path


def test_what_is_learned_is_marked(cli: Lora, here: Path) -> None:
    code, out, err = cli("data", "show", "d.jsonl", cwd=here)
    assert (code, err) == (0, "")
    assert "The⟦·euro│.│↵│\n" in out, "the first token has nothing before it to be learned from"
    assert "The│·currency│·of│·Bulgaria│·is│·the⟦·euro│<|im_end|>⟧" in out
    assert "assistant↵\n⟦Hello!<|im_end|>⟧↵\n" in out.replace("│", "")
    assert "d.jsonl:3" in out and "d.jsonl:4" not in out
    assert re.search(r"examples +4 ", out)


def test_numbers_are_of_the_whole_file_and_lines_fit_the_terminal(cli: Lora, here: Path) -> None:
    code, out, _ = cli("data", "show", "d.jsonl", "--max-length", "7", "--limit", "1", cwd=here)
    assert code == 0 and out.count("d.jsonl:") == 1
    assert "3 at 7 tokens" in out
    assert "1 without a label" in out
    _, out, _ = cli("data", "show", "d.jsonl", cwd=here)
    assert all(len(line) <= 100 for line in out.splitlines())


def test_json_has_every_token_and_the_statistics(cli: Lora, here: Path) -> None:
    code, out, _ = cli("data", "show", "d.jsonl", "--limit", "2", "--json", cwd=here)
    answer = json.loads(out)
    assert code == 0 and answer["base"] == "artifacts/base"
    first, second = answer["examples"]
    assert second["place"] == "d.jsonl:2" and second["labels"] == 2
    assert [t["token"] for t in second["tokens"] if t["learned"]] == [" euro", "<|im_end|>"]
    assert not first["tokens"][0]["learned"]
    result = answer["statistics"]
    assert (result["examples"], result["truncated"], result["unlabelled"]) == (4, 0, 0)
    assert result["share"] == result["labels"] / result["tokens"]


def test_without_colour_brackets_remain_and_with_it_learned_tokens_are_green(here: Path) -> None:
    plain = lora("data", "show", "d.jsonl", cwd=here, NO_COLOR="1", FORCE_COLOR="1", TERM="xterm")
    assert "⟦·euro" in plain.stdout.replace("\x1b[1m", "").replace("\x1b[0m", "") and "\x1b[1;32m" not in plain.stdout
    green = lora("data", "show", "d.jsonl", cwd=here, FORCE_COLOR="1", TERM="xterm")
    assert "\x1b[1;32m⟦·euro" in green.stdout


def test_minigpts_words_are_shown_without_transformers(tmp_path: Path) -> None:
    checkpoint(tmp_path / "artifacts").rename(tmp_path / "base")
    (tmp_path / "artifacts").mkdir()
    (tmp_path / "base").rename(tmp_path / "artifacts/expanded")
    (tmp_path / "d.txt").write_text("w1 w2\nw3 w4\n", encoding="utf-8")
    code = "import sys; from cli.main import main\ntry: main()\nfinally: print(list(sys.modules), file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", code, "data", "show", "d.txt"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert "w1⟦w2│<eos>⟧" in done.stdout
    assert not [heavy for heavy in ("torch", "transformers") if f"'{heavy}'" in done.stderr]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nix.jsonl"], "nix.jsonl: No such file or directory. Name a file that exists."),
        (["d.jsonl", "--base", "nix"], "nix is not a folder. A model folder needs its tokenizer."),
        (["broken.jsonl"], "broken.jsonl:1: not JSON"),
        (["long.jsonl"], "long.jsonl:1: 100 tokens with the end token, more than the model's 99 positions."),
    ],
)
def test_a_mistake_is_one_message(cli: Lora, here: Path, arguments: list[str], message: str) -> None:
    (here / "broken.jsonl").write_text("{", encoding="utf-8")
    (here / "long.jsonl").write_text(json.dumps({"text": "The" + " euro" * 98}), encoding="utf-8")
    code, out, err = cli("data", "show", *arguments, cwd=here)
    assert (code, out) == (1, "")
    assert err.startswith(f"error: {message}") and err.count("\n") == 1


def test_without_a_model_the_next_step_is_named(cli: Lora, tmp_path: Path) -> None:
    code, _, err = cli("data", "show", "d.txt", cwd=tmp_path)
    assert code == 1
    assert err.startswith("error: There is no model in artifacts/expanded or artifacts/base")
    assert "--base, or run `lora pretrain`." in err
