"""Paths that lead nowhere: loops of symbolic links, and ~ of a user who does not exist."""

from pathlib import Path

import pytest

from tests.conftest import Lora


@pytest.fixture
def loops(tmp_path: Path) -> Path:
    """A folder in which `a` and `b` are links to one another."""
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    (tmp_path / "d.jsonl").write_text('{"prompt": "a", "completion": "b"}\n', encoding="utf-8")
    (tmp_path / "params.yaml").write_text("base: minigpt\npretrain: {}\n", encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize(
    "arguments",
    [
        "train --base a --data d.jsonl",
        "train --base d.jsonl --data a",
        "train --base minigpt --data d.jsonl --out a",
        "train --base minigpt --data d.jsonl --out a/x",
        "train --base minigpt --data d.jsonl --set evaluate.prompts=~nobody-x/p.yaml",
        "new a",
        "new a/x",
        "new p --params a",
        "import --params a",
        "import --set base=a",
        "import --set base=~nobody-x/m",
        "pretrain --set pretrain.data=a",
        "prompt hi --base a",
        "prompt hi --adapter a",
        "chat --base a",
        "serve --base a",
        "calc --model a/config.json",
        "calc --model ~nobody-x/m",
        "adapters --folder a",
        "adapters verify a",
        "adapters import a --base b --out c",
        "adapters combine a b --out c",
        "adapters compress a --rank 2 --out c",
        "export a --format peft --out c",
        "push a org/x",
        "data check a",
        "data show a",
        "data convert d.jsonl a/x.csv",
        "runs --params a",
        "spectrum a b",
    ],
)
def test_a_path_that_leads_nowhere_is_one_message(cli: Lora, loops: Path, arguments: str) -> None:
    code, out, err = cli(*arguments.split(), cwd=loops)
    assert code == 1
    assert "Traceback" not in out + err
    assert err.splitlines()[-1].startswith("error: ")
    assert not (loops / "c").exists()
