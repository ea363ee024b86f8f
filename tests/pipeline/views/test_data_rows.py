"""Rows of a data file as a screen shows them: read by pages, and edited by their texts."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import UserError
from pipeline.views.data_rows import PAGE, FileRows, RowTexts, row_facts

TURNS = {"messages": [{"role": "user", "content": "Where?"}, {"from": "gpt", "value": "Here."}]}


def page(first: int, count: int) -> dict[str, Any]:
    rows = [
        {"position": n, "row": n + 1, "text": f"row\n{n}", "problem": ""}
        for n in range(first, first + count)
    ]
    return {"event": "page", "rows": rows}


def test_only_pages_that_are_seen_are_asked_for_and_each_once() -> None:
    asked: list[int] = []
    rows = FileRows(asked.append)
    rows.total = 1_000_000
    assert len(rows) == 1_000_000 and rows[500_000] is None and rows[500_010] is None
    assert asked == [499_975]
    assert rows[:300] == [None] * 300 and asked == [499_975], "a slice asks for nothing"
    rows.put(page(499_975, PAGE))
    assert rows[500_002].text == "row 500002" and asked == [499_975]
    assert rows[10] is None and asked == [499_975, 0]


def test_what_is_read_again_keeps_its_tokens() -> None:
    rows = FileRows(lambda _: None)
    rows.put(page(0, 3))
    rows.put({"event": "done", "lengths": {"1": [7, 6, 2]}, "problems": {"2": "too long"}})
    rows.put(page(0, 3))
    assert (rows[1].tokens, rows[1].cut, rows[2].problem, len(rows)) == (7, 2, "too long", 3)


def test_after_a_search_the_rows_are_those_that_were_found() -> None:
    rows = FileRows(lambda _: None)
    rows.total, rows.found = 100, []
    rows.found += rows.put(page(7, 1))
    rows.found += rows.put(page(9, 1))
    assert [row.number for row in rows] == [8, 10]


def test_a_row_says_from_which_turn_on_it_is_cut() -> None:
    turns = [("user", [["read", "a"]]), ("assistant", [["trained", "b"], ["cut", "c"]])]
    answer = {"turns": turns, "problem": "", "tokens": 9, "trained": 3, "cut": 2}
    assert row_facts(answer) == ["9 tokens", "2 cut from turn 2", "3 trained on"]
    assert row_facts({"turns": turns, "problem": ""}) == ["mask by roles, no tokens"]
    assert row_facts({"turns": turns, "problem": "not JSON"}) == []


def test_the_texts_of_a_row_are_its_fields() -> None:
    row = RowTexts("", json.dumps({**TURNS, "id": "x", "n": 3}))
    assert row.fields == [("user", "Where?"), ("gpt", "Here."), ("id", "x")]
    written = json.loads(row.with_texts(["Where now?", "There.", "y"]))
    assert [turn.get("content") or turn["value"] for turn in written["messages"]] == [
        "Where now?",
        "There.",
    ]
    assert (written["id"], written["n"]) == ("y", 3)
    assert row.record["id"] == "x", "the row itself stays as it was"


@given(
    st.dictionaries(st.text(), st.text() | st.integers() | st.lists(st.integers())),
    st.booleans(),
)
def test_a_row_whose_texts_stay_is_not_changed(record: dict[str, Any], as_json: bool) -> None:
    line = json.dumps(record)
    row = RowTexts(line, line, as_json)
    texts = [text for _, text in row.fields]
    assert not row.is_changed(texts) and json.loads(row.with_texts(texts)) == record
    if texts:
        assert row.is_changed([*texts[:-1], texts[-1] + "x"])


@pytest.mark.parametrize("line", ['{"a', "[1, 2]", '"text"', "", "[" * 100_000])
def test_what_is_no_object_is_edited_as_text_and_is_not_written(line: str) -> None:
    row = RowTexts(line, line)
    ((name, text),) = row.fields
    assert name == "" and not row.is_changed([text]) and row.is_changed([f"{text}x"])
    with pytest.raises(UserError, match=r"not JSON|must be a JSON object"):
        row.with_texts([text])


def test_a_row_with_too_many_texts_is_edited_as_json() -> None:
    line = json.dumps({str(n): "text" for n in range(41)})
    assert len(RowTexts(line, line).fields) == 1
