"""Thoughts divided from answers, also while the text arrives."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.inference.talk import split_thoughts

PIECES = st.lists(
    st.sampled_from(["<th", "ink>", "<think>", "</", "think>", "</think>", " ", "\n", "a", "<"]),
    max_size=12,
)


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
    assert split_thoughts(text)[:2] == (thoughts, answer)


@given(PIECES)
def test_what_was_shown_of_a_text_that_arrives_is_never_taken_back(pieces: list[str]) -> None:
    whole = split_thoughts("".join(pieces))
    for number in range(len(pieces)):
        part = split_thoughts("".join(pieces[:number]), arrives=True)
        assert whole.thoughts.startswith(part.thoughts)
        assert whole.answer.startswith(part.answer)
