"""Lines in braille dots."""

from hypothesis import example, given
from hypothesis import strategies as st

from tui.panes.plot.raster import ACROSS, DOWN, braille

POINTS = st.lists(st.tuples(st.floats(-5, 25), st.floats(-20, 20)), max_size=30).map(sorted)


def dots(chars: dict[tuple[int, int], str]) -> set[tuple[int, int]]:
    """The dots set in `chars`, by the Unicode numbering of braille dots."""
    offsets = {
        1: (0, 0),
        2: (0, 1),
        3: (0, 2),
        4: (1, 0),
        5: (1, 1),
        6: (1, 2),
        7: (0, 3),
        8: (1, 3),
    }
    return {
        (x * ACROSS + offsets[n][0], y * DOWN + offsets[n][1])
        for (x, y), char in chars.items()
        for n in offsets
        if (ord(char) - 0x2800) >> (n - 1) & 1
    }


def test_a_level_line_is_a_row_of_dots() -> None:
    assert dots(braille([(0, 1), (2.99, 1)], 3, 2)) == {(x, 4) for x in range(6)}


def test_an_upright_line_is_a_column_of_dots() -> None:
    assert dots(braille([(1, 0), (1, 1.99)], 3, 2)) == {(2, y) for y in range(8)}


@example([(-2.225073858507e-311, 1.0), (0.0, 0.0)])
@given(POINTS)
def test_every_point_inside_has_its_dot_and_nothing_is_outside(
    points: list[tuple[float, float]],
) -> None:
    chars = braille(points, 20, 10)
    assert all(0 <= x < 20 and 0 <= y < 10 for x, y in chars)
    drawn = dots(chars)
    for x, y in points:
        if 0 <= x < 20 and 0 <= y < 10:
            assert (int(x * ACROSS), int(y * DOWN)) in drawn


@given(st.lists(st.floats(0, 9.9), min_size=2, max_size=20))
def test_a_line_has_no_gap(heights: list[float]) -> None:
    drawn = dots(braille([(float(x), y) for x, y in enumerate(heights)], 20, 10))
    columns = {
        x: sorted(y for column, y in drawn if column == x) for x in range(2 * len(heights) - 1)
    }
    assert all(columns.values())
    for x, ys in columns.items():
        assert ys == list(range(ys[0], ys[-1] + 1))
        if x:
            assert ys[0] <= columns[x - 1][-1] + 1
            assert ys[-1] >= columns[x - 1][0] - 1
