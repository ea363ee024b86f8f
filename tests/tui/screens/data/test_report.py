"""The histogram of lengths: every example is in a column, and the cut stands where it is."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.views.data_files import DataFile
from tui.screens.data.report import columns_of, draw_lengths, length_facts, longer_than

COLORS = dict.fromkeys(("error", "accent", "warning"), "#ffffff")


@given(
    st.lists(
        st.tuples(st.integers(1, 10_000), st.integers(1, 99)),
        min_size=1,
        unique_by=lambda each: each[0],
    )
)
def test_every_example_is_in_one_column(lengths: list[tuple[int, int]]) -> None:
    lengths = sorted(lengths)
    longest = lengths[-1][0]
    columns = columns_of(lengths, 40, longest)
    if longest >= 40:
        assert sum(columns) == sum(count for _, count in lengths)
    else:
        assert set(filter(None, columns)) == {count for _, count in lengths}, (
            "several columns for each length"
        )


@given(
    st.lists(
        st.tuples(st.integers(1, 5000), st.integers(1, 99)),
        min_size=1,
        unique_by=lambda each: each[0],
    ),
    st.integers(0, 6000),
    st.integers(1, 150),
    st.integers(1, 30),
)
def test_it_fits_any_size(
    lengths: list[tuple[int, int]], limit: int, width: int, rows: int
) -> None:
    report = {"lengths": sorted(lengths)}
    lines = draw_lengths(report, DataFile("f", max_length=limit), COLORS, width, rows).plain.split(
        "\n"
    )
    assert len(lines) == max(2, rows) and max(map(len, lines)) <= width
    longest = max(length for length, _ in lengths)
    if limit and limit <= longest:
        assert lines[-1].count("▲") == 1, "the cut is always marked"


@pytest.mark.parametrize(
    ("limit", "axis"),
    [
        (10, "0         ▲ max_length 10                      99 tokens"),
        (65, "0                     max_length 65 ▲          99 tokens"),
        (0, "0                                              99 tokens"),
    ],
    ids=["right", "left", "none"],
)
def test_the_axis_names_the_cut_where_there_is_room(limit: int, axis: str) -> None:
    report = {"lengths": [(5, 1), (99, 2)]}
    drawn = draw_lengths(report, DataFile("f", max_length=limit), COLORS, len(axis), 3).plain.split(
        "\n"
    )[-1]
    assert drawn.split() == axis.split()
    if limit:
        assert drawn.index("▲") == limit * len(axis) // 100


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
    assert (
        length_facts({"quantiles": None}, DataFile("f")) == []
        and longer_than(report["lengths"], 5) == 1  # type: ignore[arg-type]
    )
