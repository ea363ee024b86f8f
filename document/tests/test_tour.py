"""document/docs/tour.md: the commands are typed, and print what the page shows."""

import shlex
import shutil
from pathlib import Path

import pytest
from tests.lab_projects import DOCUMENT, GIVEN, new_houses

from cli import console
from docs.tour import run, typed
from pipeline.stages.registry import open_project
from tests.conftest import Built, Lora
from tests.helpers.alike import same
from tests.helpers.projects import ROOT, make, save

PAGE = DOCUMENT / "docs/tour.md"
COMMANDS = list(typed(PAGE.read_text(encoding="utf-8")))


@pytest.fixture(scope="module")
def toured(built: Built) -> Path:
    """Both projects with all that the tour reads; what `make document` made here is taken from its
    cache.
    """

    def build(root: Path) -> None:
        new_houses(root)
        if (ROOT / ".lora-cache").is_dir():
            shutil.copytree(ROOT / ".lora-cache", root / ".lora-cache")
        for folder in (root, root / "document"):
            make(folder, list(open_project(folder / "params.yaml").stages))

    return built("tour", build) / "document"


def test_the_program_has_every_command_of_the_tour_and_calculates_what_the_page_shows(
    cli: Lora, studied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one project that was trained briefly: only the numbers of `lora calc` are the page's."""
    root = shutil.copytree(studied, tmp_path / "project", ignore=shutil.ignore_patterns("runs"))
    save(root / "params.yaml", GIVEN)
    monkeypatch.setattr(console.stdout, "width", 80)
    calculated = 0
    for command, shown in ((command.replace("../", ""), shown) for command, shown in COMMANDS):
        program, *words = shlex.split(command.partition(" | ")[0])
        if program != "lora":
            assert run(command, root), command
            continue
        code, out, err = cli(*words, cwd=root)
        assert (code, bool(out)) == (0, True), f"{command}\n{err}"
        if words[0] == "calc":
            calculated += 1
            lines = shown.splitlines()
            assert [line.rstrip() for line in out.splitlines()][: len(lines)] == lines, command
    assert calculated >= 4


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(COMMANDS)), ids=[one.command[:50] for one in COMMANDS])
def test_a_command_of_the_tour_prints_what_the_page_shows(toured: Path, number: int) -> None:
    command, shown = COMMANDS[number]
    printed = run(command, toured)
    assert len(printed.splitlines()) == len(shown.splitlines())
    for ours, theirs in zip(printed.splitlines(), shown.splitlines(), strict=True):
        assert same(ours, theirs), f"{ours}\n{theirs}"
