"""docs/tour.md: the commands are typed, and print what the page shows."""

import math
import re
import shutil
from itertools import zip_longest
from pathlib import Path

import pytest

from docs.tour import PAGE, run, typed
from tests.support import PIPELINE, ROOT, WORK, make, new_project

NUMBER = re.compile(r"[-+±]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?%?")
BARS = re.compile("[█▏▎▍▌▋▊▉]+")
COMMANDS = list(typed(PAGE.read_text(encoding="utf-8")))


@pytest.fixture(scope="module")
def toured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with all that the tour reads; what `make repro` made here is taken from its cache."""
    root = new_project(tmp_path_factory.mktemp("tour") / "project")
    if (ROOT / ".lora-cache").is_dir():
        shutil.copytree(ROOT / ".lora-cache", root / ".lora-cache")
    make(root, [*PIPELINE, *(name for name in WORK if name not in PIPELINE)])
    return root


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


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(COMMANDS)), ids=[one.command[:50] for one in COMMANDS])
def test_a_command_of_the_tour_prints_what_the_page_shows(toured: Path, number: int) -> None:
    command, shown = COMMANDS[number]
    printed = run(command, toured)
    assert len(printed.splitlines()) == len(shown.splitlines())
    for ours, theirs in zip(printed.splitlines(), shown.splitlines(), strict=True):
        assert same(ours, theirs), f"{ours}\n{theirs}"
