"""What a process is told by its environment, and what it does without standard streams."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.project.process import ProcessRank, is_valid, world
from tests.helpers.projects import LORA, ROOT

BIN = Path(sys.executable).parent
SET = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}


def sh(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", "-c", command], cwd=folder, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("WORLD_SIZE", "abc"),
        ("WORLD_SIZE", "0"),
        ("WORLD_SIZE", "1e3"),
        ("WORLD_SIZE", "9" * 20),
        ("RANK", "-1"),
        ("RANK", "4"),
        ("LOCAL_RANK", "²"),
        ("LOCAL_RANK", "2"),
        ("LOCAL_WORLD_SIZE", "5"),
    ],
)
def test_a_variable_that_torchrun_would_not_set_is_named(
    variable: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, right in SET.items():
        monkeypatch.setenv(name, right)
    assert world() == ProcessRank(1, 4, 1, 2)
    monkeypatch.setenv(variable, value)
    with pytest.raises(
        UserError, match=f"{variable} must be a whole number from .*, got '{value}'"
    ):
        world()


def test_an_empty_variable_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SET:
        monkeypatch.setenv(name, "")
    assert world() == ProcessRank(0, 1, 0, 1)


@pytest.mark.parametrize("name", ["auto", "cpu", "mps", "cuda", "cuda:0", "cuda:10", "cuda:99"])
def test_a_device_has_a_number_as_torch_reads_it(name: str) -> None:
    assert is_valid(name)


@pytest.mark.parametrize("name", ["cuda:00", "cuda:07", "cuda:١", "cuda:256", "cuda:", "cuda:0\n"])
def test_a_number_that_torch_refuses_or_takes_for_another_is_no_device(name: str) -> None:
    """torch raises RuntimeError for a leading zero, and reads cuda:256 as cuda:0."""
    assert not is_valid(name)


def test_the_command_says_which_variable_is_wrong(tmp_path: Path) -> None:
    ended = sh(f"WORLD_SIZE=abc {shlex.quote(LORA)} runs", tmp_path)
    assert ended.returncode == 1 and ended.stderr.startswith(
        "error: WORLD_SIZE must be a whole number"
    )
    assert ended.stderr.count("\n") == 1


def test_with_closed_streams_nothing_is_printed_into_a_file_that_is_written(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt": "a", "completion": "b"}\n', encoding="utf-8")
    convert = f"{shlex.quote(LORA)} data convert in.jsonl"
    ended = sh(f"{convert} open.csv && {convert} closed.csv <&- >&- 2>&-", tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "closed.csv").read_bytes() == (tmp_path / "open.csv").read_bytes()


@pytest.mark.parametrize("redirection", ["<&-", "</dev/null"])
def test_the_terminal_app_without_a_terminal_is_one_message(
    redirection: str, tmp_path: Path
) -> None:
    ended = sh(f"{shlex.quote(str(BIN / 'lora-tui'))} {redirection}", tmp_path)
    assert ended.returncode == 1
    assert (
        ended.stderr.startswith("error: lora-tui needs a terminal")
        and ended.stderr.count("\n") == 1
    )


@pytest.mark.slow
def test_a_chat_without_input_ends_and_bytes_that_are_no_text_are_asked_as_signs(
    brief: Path,
) -> None:
    chat = f"{shlex.quote(LORA)} chat --base artifacts/base"
    ended = sh(f"{chat} <&- && printf 'der \\377 hund\\n/quit\\n' | {chat}", brief)
    assert ended.returncode == 0 and "Traceback" not in ended.stderr, ended.stderr
    assert "does not know: \ufffd" in ended.stderr


LOADS = """
import gc, sys
from pathlib import Path
from pipeline.models.load import load_base
from pipeline.project.process import postpone_collection, resume_collection
usual = gc.get_threshold()
resume_collection()
print(gc.get_freeze_count() == 0)
postpone_collection()
print(gc.get_threshold() != usual)
load_base(Path(sys.argv[1]))
print(gc.get_threshold() == usual and gc.get_freeze_count() > 0)
"""


@pytest.mark.parametrize("kind", ["minigpt", "llama"])
def test_garbage_that_is_put_off_is_looked_for_again_when_a_model_is_loaded(
    kind: str, brief: Path, tmp_path: Path
) -> None:
    base = brief / "artifacts/base"
    if kind == "llama":
        from tests.helpers.bases import toy_checkpoint  # with transformers

        base = tmp_path / "model"
        toy_checkpoint(base)
    command = [sys.executable, "-c", LOADS, str(base)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True"] * 3
