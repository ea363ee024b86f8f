"""Values in rows of blocks."""

from itertools import pairwise
from math import nan

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tui.widgets.plot.sparkline import EIGHTHS, area, sparkline


def heights(rows: list[str]) -> list[int]:
    """Eighths of a cell in each column."""
    return [sum(EIGHTHS.index(row[x]) for row in rows) for x in range(len(rows[0]))]


def test_the_lowest_is_an_eighth_and_the_highest_is_full() -> None:
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"


def test_fewer_values_than_columns_stand_at_the_right() -> None:
    assert sparkline([0, 7], 5) == "   ▁█"


@pytest.mark.parametrize(("values", "row"), [([], "   "), ([3, 3, 3], "▁▁▁"), ([nan, 1, 2], " ▁█")])
def test_nothing_a_constant_and_a_hole(values: list[float], row: str) -> None:
    assert sparkline(values, 3) == row


def test_given_ends_make_rows_comparable_and_clip() -> None:
    assert sparkline([0, 50, 100, 200], 4, 0, 100) == "▁▅██"


@given(
    st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=50), st.integers(1, 20), st.integers(1, 4)
)
def test_more_is_never_lower(values: list[float], width: int, height: int) -> None:
    rows = area(values, width, height)
    assert [len(row) for row in rows] == [width] * height
    drawn = heights(rows)[-min(len(values), width) :]
    if len(values) <= width:
        assert all(a <= b for (_, a), (_, b) in pairwise(sorted(zip(values, drawn, strict=True))))
    assert max(drawn) in (1, 8 * height)


def test_more_values_than_columns_are_averaged() -> None:
    assert sparkline([0, 0, 7, 7], 2) == "▁█"
