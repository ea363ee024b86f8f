"""`python -m lora_workbench` is `lora`, whatever lies in the current folder."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.extension import environment, install
from tests.helpers.projects import lora

NAMES = ("cli.py", "pipeline.py", "tui.py")
COMMAND = """
from cli.options import group

app = group()


@app.command()
def greet() -> None:
    print("good day")
"""


def module(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "lora_workbench", *arguments],
        cwd=cwd,
        env={**os.environ, "COLUMNS": "100", "TERMINAL_WIDTH": "100", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("command", [("-h",), ("calc", "-h"), ("nope",), ("params", "show")])
def test_the_module_prints_and_exits_as_lora_does(command: tuple[str, ...], tmp_path: Path) -> None:
    ours, theirs = module(*command, cwd=tmp_path), lora(*command, cwd=tmp_path)
    assert (ours.returncode, ours.stdout, ours.stderr) == (
        theirs.returncode,
        theirs.stdout,
        theirs.stderr,
    )


@pytest.mark.parametrize("path", ["", ".", "{here}"])
def test_files_of_the_users_with_our_names_are_not_imported(path: str, tmp_path: Path) -> None:
    for name in NAMES:
        (tmp_path / name).write_text("raise SystemExit('of the user')\n", encoding="utf-8")
    variables = {"PYTHONPATH": path.format(here=tmp_path)} if path else {}
    done = module("calc", "-h", cwd=tmp_path, **variables)
    assert done.returncode == 0 and "of the user" not in done.stdout + done.stderr


def test_an_extension_is_found_whose_code_is_in_the_current_folder(tmp_path: Path) -> None:
    """As `pip install -e .` leaves it: what is installed names the folder."""
    install(tmp_path / "installed", {"command.greet": "greeting"})
    (tmp_path / "greeting.py").write_text(COMMAND, encoding="utf-8")
    for run in (module, lora):
        done = run("greet", cwd=tmp_path, **environment(tmp_path / "installed", tmp_path))
        assert (done.returncode, done.stdout) == (0, "good day\n"), done.stderr


@pytest.mark.parametrize("name", NAMES)
def test_what_hides_our_packages_elsewhere_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / name).touch()
    done = module("-h", cwd=tmp_path, PYTHONPATH=str(tmp_path / "theirs"))
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert f"theirs/{name} hides lora-workbench's own package {name[:-3]}" in done.stderr
