"""The histogram of lengths: every example is in a column, and the cut stands where it is."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.views.data_files import DataFile
from pipeline.views.data_rows import length_counts, length_facts, problem_facts
from tui.panes.plot.drawing import draw
from tui.panes.plot.series import Bars
from tui.screens.data.report import histogram

LENGTHS = st.lists(
    st.tuples(st.integers(1, 5000), st.integers(1, 99)), min_size=1, unique_by=lambda each: each[0]
).map(sorted)


def drawn(lengths: Any, file: DataFile, width: int, height: int) -> list[str]:
    series, x, y = histogram(lengths, file)
    return [row.plain for row in draw(series, width, height, x, y).rows]


@given(LENGTHS, st.integers(0, 6000))
def test_every_example_is_in_one_column(lengths: Any, max_length: int) -> None:
    longest = lengths[-1][0]
    columns = length_counts(lengths, longest, max_length, 40)
    if longest >= 40:
        examples = sum(count for _, count in lengths)
        cut = sum(count for length, count in lengths if 0 < max_length < length)
        assert (sum(n for n, _ in columns), sum(n for _, n in columns)) == (examples, cut)
    else:
        assert {n for n, _ in columns} - {0} == {count for _, count in lengths}, (
            "several columns for each length"
        )


@given(LENGTHS, st.integers(0, 6000), st.integers(1, 150), st.integers(1, 30))
def test_it_fits_any_size(lengths: Any, limit: int, width: int, height: int) -> None:
    rows = drawn(lengths, DataFile("f", max_length=limit), width, height)
    assert len(rows) == height and {len(row) for row in rows} == {width}
    if 0 < limit <= lengths[-1][0]:
        assert "│" in "".join(rows), "the cut is always drawn"


@pytest.mark.parametrize(
    ("limit", "axis"),
    [
        (10, "0 ▲ max_length 10 99 tokens"),
        (65, "0 max_length 65 ▲ 99 tokens"),
        (0, "0 99 tokens"),
    ],
    ids=["right", "left", "none"],
)
def test_the_axis_names_the_cut_where_there_is_room(limit: int, axis: str) -> None:
    bottom = drawn([(5, 1), (99, 2)], DataFile("f", max_length=limit), 60, 8)[-1]
    assert bottom.split() == axis.split()


@pytest.mark.parametrize("limit", [10, 65], ids=["some", "all behind it"])
def test_bars_behind_the_cut_are_red(limit: int) -> None:
    bars = histogram([(5, 1), (99, 2)], DataFile("f", max_length=limit))[0][0]
    assert isinstance(bars, Bars)
    styles = {style for count, style in bars.columns(60) if count}
    assert styles == {"$accent", "$error"}


def test_the_title_counts_what_is_cut_or_windowed() -> None:
    report = {
        "lengths": [(5, 3), (9, 1)],
        "quantiles": {"p50": 5, "p99": 9},
        "truncated": 1,
        "examples": 4,
    }
    assert length_facts(report, DataFile("f", max_length=8))[0] == "1 cut (25%)"
    assert length_facts(report, DataFile("f", window=4))[0] == "1 in windows", (
        "a window predicts 4 tokens from 5"
    )
    assert length_facts({**report, "truncated": 0}, DataFile("f", max_length=9))[0] == "none cut"
    assert length_facts({**report, "quantiles": None}, DataFile("f")) == []


def test_problems_are_counted_by_their_level() -> None:
    assert problem_facts({"errors": 1, "warnings": 2}) == ["1 error", "2 warnings"]
    assert problem_facts({"errors": 0, "warnings": 0}) == []
