"""Thoughts divided from answers, and wrapped lines: in any pieces the same as at once."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from tui.screens.chat.thoughts import ThoughtSplitter, WrappedText, split_thoughts

PIECES = st.lists(
    st.sampled_from(["<th", "ink>", "<think>", "</", "think>", "</think>", " ", "\n", "a", "<"]),
    max_size=12,
)
WORDS = st.lists(st.text("ab  \n\t\x1b語é\u0301🙂", max_size=12), max_size=12)


@pytest.mark.parametrize(
    ("text", "thoughts", "answer"),
    [
        ("hello", "", "hello"),
        ("<think>\nhm\n</think>\n\nyes", "\nhm\n", "\n\nyes"),
        ("\n<think>hm</think>yes", "hm", "yes"),
        ("<think>not closed </th", "not closed </th", ""),
        ("say <think>no</think>", "", "say <think>no</think>"),
        ("<thin", "", "<thin"),
        ("<think></think>yes", "", "yes"),
    ],
    ids=["none", "qwen", "white space", "open", "within", "half a tag", "empty"],
)
def test_thoughts_stand_before_the_answer(text: str, thoughts: str, answer: str) -> None:
    assert split_thoughts(text) == (thoughts, answer)


@given(PIECES)
def test_thoughts_are_the_same_in_any_pieces(pieces: list[str]) -> None:
    splitter = ThoughtSplitter()
    parts = [*map(splitter.feed, pieces), splitter.finish()]
    assert ("".join(a for a, _ in parts), "".join(b for _, b in parts)) == split_thoughts(
        "".join(pieces)
    )


@given(WORDS, st.integers(2, 9))
def test_lines_are_the_same_in_any_pieces_fit_and_obey_nothing(
    pieces: list[str], width: int
) -> None:
    wrapped = WrappedText(width)
    for number, piece in enumerate(pieces, 1):
        wrapped.append(piece)
        assert wrapped.lines == WrappedText(width, "".join(pieces[:number])).lines
    assert all(cell_len(line) <= width for line in wrapped.lines)
    assert not any(character in line for line in wrapped.lines for character in "\x1b\t\n")
    shown, text = "".join(wrapped.lines), "".join(pieces)
    assert [c for c in shown if c.isalpha()] == [c for c in text if c.isalpha()]


def test_words_stay_whole_and_a_long_one_is_broken() -> None:
    assert WrappedText(10, "the cat sits on the mat").lines == ["the cat", "sits on", "the mat"]
    assert WrappedText(4, "abcdefghij kl").lines == ["abcd", "efgh", "ij", "kl"]
    assert WrappedText(8, "one\n\n  two").lines == ["one", "", "  two"]
