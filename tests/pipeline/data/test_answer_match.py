"""Answers against expected ones: what counts as the same, which JSON fields differ, how similar a
long text is.
"""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.answers.match import Match, count, describe, match, rouge_l, share

LONG = (
    "The refund was sent on Monday, and it takes three to five working days until the bank shows "
    "it in the account of the customer who asked."
)
KEYS = st.text(max_size=4)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=8,
)


@pytest.mark.parametrize(
    ("answer", "expected", "how"),
    [
        ("billing", "billing", "exact"),
        (" billing\n", "billing", "exact"),
        ("two  words", "two\nwords", "white space"),
        ("Billing", "billing", "different"),
        ("billing.", "billing", "different"),
        ("", "", "exact"),
        ('{"a": 1, "b": [true]}', '{"b":[true],"a":1}', "JSON"),
        ('{"a": 1.0}', '{"a": 1}', "JSON"),
        ('{"a": 1}', '{"a": true}', "different"),
        ('```json\n{"a": 1}\n```', '{"a": 1}', "different"),
        ('{"a": NaN}', '{"a": 1}', "different"),
        ("[" * 100_000, "[1]", "different"),
        ('{"a": ' + "9" * 5000 + "}", '{"a": 9}', "different"),
    ],
)
def test_an_answer_is_as_expected_exactly_after_white_space_or_as_json(
    answer: str, expected: str, how: str
) -> None:
    found = match(answer, expected)
    assert found.how == how
    assert found.as_expected == (how != "different")


def test_json_that_differs_names_its_fields() -> None:
    expected = '{"team": "billing", "items": [{"price": 1}, {"price": 2}], "urgent": false}'
    answer = '{"team": "sales", "items": [{"price": 1}, {"price": 3}], "extra": 0}'
    assert match(answer, expected).differs == ("team", "items[1].price", "urgent", "extra")
    assert match("team: billing", expected).differs == ("",)


@given(VALUES, VALUES)
def test_two_json_values_are_the_same_if_python_says_so_of_their_canonical_text(
    one: Any, other: Any
) -> None:
    first, second = ({"value": value} for value in (one, other))
    same = json.dumps(first, sort_keys=True) == json.dumps(second, sort_keys=True)
    assert match(json.dumps(first, indent=1), json.dumps(second)).as_expected == same


def test_the_path_of_a_field_is_short_however_deep_the_answer(deep: int = 200) -> None:
    one, other = ("[" * deep + value + "]" * deep for value in "12")
    (path,) = match(one, other).differs
    assert path.startswith("[0][0]") and len(path) <= 80


def test_a_long_free_text_is_similar_and_never_right_or_wrong() -> None:
    assert match(LONG, LONG) == Match("similar", rouge_l=1.0)
    other = match(LONG.replace("Monday", "Friday"), LONG)
    assert other.how == "similar" and not other.as_expected and 0.9 < (other.rouge_l or 0) < 1
    assert match("", LONG).rouge_l == 0
    # a long JSON is compared as JSON
    assert match("x", json.dumps({"text": LONG})).how == "different"


@given(*[st.lists(st.sampled_from("abcd"), max_size=9)] * 2)
def test_rouge_l_is_the_f1_of_the_longest_common_subsequence(
    one: list[str], other: list[str]
) -> None:
    table = [[0] * (len(other) + 1) for _ in range(len(one) + 1)]
    for i, left in enumerate(one, 1):
        for j, right in enumerate(other, 1):
            table[i][j] = (
                table[i - 1][j - 1] + 1 if left == right else max(table[i - 1][j], table[i][j - 1])
            )
    words = len(one) + len(other)
    expected = 2 * table[-1][-1] / words if words else 1.0
    assert rouge_l(" ".join(one), " ".join(other)) == pytest.approx(expected)


def test_text_without_spaces_is_compared_by_character() -> None:
    assert rouge_l("東京です", "京都です") == pytest.approx(3 / 4)


def test_counts_keep_short_answers_and_long_texts_apart() -> None:
    expected = '{"a": 1, "b": 2}'
    answers = [
        match(expected, expected),
        match('{"b":2,"a":1}', expected),
        match('{"a": 0, "b": 2}', expected),
    ]
    counts = count([*answers, match(LONG, LONG)])
    assert counts == {
        "n": 3,
        "as_expected": 2,
        "exact": 1,
        "white_space": 0,
        "json": 1,
        "differs": {"a": 1},
        "similar": {"n": 1, "rouge_l": 1.0},
    }
    assert (
        describe(counts)
        == "2 of 3 as expected (1 exactly, 1 as JSON); 1 long answer: similarity 1.00 (ROUGE-L)"
    )
    assert share(counts) == pytest.approx(2 / 3)
    assert share(count([match(LONG, LONG)])) is None and describe(count([])) == ""
