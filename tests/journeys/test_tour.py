"""docs/tutorials/document.md: the commands are typed, and print what the page shows."""

import math
import re
import shlex
import shutil
from itertools import zip_longest
from pathlib import Path

import pytest

from cli import console
from docs.tour import PAGE, run, typed
from pipeline.workbench import open_project
from tests.conftest import Built, Lora
from tests.helpers.projects import GIVEN, ROOT, make, new_houses, save

NUMBER = re.compile(r"[-+±]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?%?")
BARS = re.compile("[█▏▎▍▌▋▊▉]+")
COMMANDS = list(typed(PAGE.read_text(encoding="utf-8")))


@pytest.fixture(scope="module")
def toured(built: Built) -> Path:
    """Both projects with all that the tour reads; what `make document` made here is taken from its cache."""

    def build(root: Path) -> None:
        new_houses(root)
        if (ROOT / ".lora-cache").is_dir():
            shutil.copytree(ROOT / ".lora-cache", root / ".lora-cache")
        for folder in (root, root / "document"):
            make(folder, list(open_project(folder / "params.yaml").stages))

    return built("tour", build) / "document"


def same(one: str, other: str) -> bool:
    """Words alike, numbers near: what trained on another processor differs in its last digits, and where a rate is so
    high that seeds part, by as much as they do."""
    pieces = [[p for p in re.split(r"\s+(?!±)|(?<=[(=:])", BARS.sub("", text)) if p] for text in (one, other)]
    return all(_near(a or "", b or "") for a, b in zip_longest(*pieces))


def _near(one: str, other: str) -> bool:
    numbers = [NUMBER.findall(text) for text in (one, other)]
    if NUMBER.sub("#", one) != NUMBER.sub("#", other):
        return False
    spread = max((_value(number) for found in numbers for number in found if "±" in number), default=0.0)
    for a, b in zip(*numbers, strict=True):
        x, y = _value(a), _value(b)
        apart = max(spread, 8 if a.endswith("%") or "±" in a else 0.15)
        if not math.isclose(x, y, rel_tol=0.15, abs_tol=apart):
            return False
    return True


def _value(number: str) -> float:
    return float(number.replace(",", "").strip("±%+"))


def test_numbers_may_be_near_and_words_may_not_differ() -> None:
    assert same("loss 0.231  kept 72%", "loss 0.228  kept  74%")
    assert same("loss 0.231 ±0.7", "loss  0.9 ±0.6")
    assert not same("loss 0.231", "loss 0.9")
    assert not same("loss 0.231 ±0.002", "loss 0.9 ±0.002")
    assert not same("tisch 98%", "sofa 98%")
    assert not same("a b", "a b c")


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
