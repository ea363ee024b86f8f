"""Lines, ticks and labels as cells."""

from math import log10

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tui.widgets.plot.line_plot import Line, LinePlot, View, line_plot, text
from tui.widgets.plot.scale import fit, is_drawable, number, spans_decade, ticks


def drawn(plot: LinePlot) -> list[str]:
    return text(plot.rows).plain.splitlines()


def falling(count: int = 100, start: float = 10.0) -> list[tuple[float, float]]:
    return [(float(x), start / x) for x in range(1, count + 1)]


def test_a_line_has_its_name_and_value_beside_its_end() -> None:
    plot = drawn(line_plot([Line(falling(), "#0072B2", "lora", "0.1", "■")], 60, 12))
    assert plot[-2].endswith("■ lora 0.1")
    assert all(len(row) == 60 for row in plot)


def test_labels_of_lines_that_end_together_have_a_row_each() -> None:
    lines = [Line([(0, 1), (9, 1 + n / 1e6)], "", f"run-{n}") for n in range(6)]
    rows = [row.split()[-1] for row in drawn(line_plot(lines, 60, 12)) if "run-" in row]
    assert sorted(rows) == [f"run-{n}" for n in range(6)] and rows == sorted(rows, reverse=True)


def test_where_rows_do_not_suffice_the_labels_of_the_top_lines_stay() -> None:
    plot = drawn(line_plot([Line([(0, n), (9, n)], "", f"run-{n}") for n in range(9)], 60, 5))
    assert [row.split()[-1] for row in plot if "run-" in row] == [
        "run-8",
        "run-7",
        "run-6",
        "run-5",
    ]


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=12), st.integers(4, 20))
def test_no_two_labels_share_a_row(ends: list[float], height: int) -> None:
    lines = [Line([(0, y), (1, y)], "", f"run-{n}") for n, y in enumerate(ends)]
    shown = [row for row in drawn(line_plot(lines, 60, height)) if "run-" in row]
    assert len(shown) == min(len(ends), height - 1)


def test_the_last_line_covers_the_others_and_a_bold_one_is_thicker() -> None:
    def styles(first: str, second: str) -> set[str]:
        lines = [Line([(0, 0), (9, 0)], first), Line([(0, 0), (9, 0)], second, bold=True)]
        return {
            style
            for row in line_plot(lines, 30, 5).rows
            for cells, style in row
            if "⠒" in cells or "⠶" in cells
        }

    assert styles("red", "blue") <= {"blue"} and styles("blue", "red") <= {"red"}


def test_a_log_scale_has_decades_and_leaves_out_what_is_not_positive() -> None:
    points = [(0.0, 0.0), *falling(), (101.0, -3.0)]
    plot = line_plot([Line(points)], 60, 10, View(log=True))
    assert plot.y[0] < log10(0.1) and plot.y[1] > 1
    assert [row.split()[0] for row in drawn(plot) if row[:3].strip()][:3] == ["10", "1", "0.1"]


def test_marks_the_cursor_and_the_flat_point_are_drawn() -> None:
    marks = [(float(x), 3.0) for x in range(10, 100, 20)]
    plot = drawn(
        line_plot([Line(falling(), marks=marks, flat=(50.0, 0.2))], 60, 12, View(cursor=30))
    )
    assert sum(row.count("×") for row in plot) == len(marks)
    assert sum(row.count("»") for row in plot) == 1 and sum("│" in row for row in plot) > 5


def test_a_stray_line_does_not_decide_the_range() -> None:
    assert line_plot([Line([(0, 1), (1, 2)]), Line([(0, 1), (1, 1e6)], stray=True)], 40, 8).y[1] < 3


def test_signs_tell_lines_apart_without_colors() -> None:
    plot = "".join(
        drawn(line_plot([Line(falling(), sign="■"), Line(falling(), sign="●")], 80, 12, signs=True))
    )
    assert plot.count("■") > 2 and plot.count("●") > 2


@given(
    st.lists(st.tuples(st.floats(-1e300, 1e300), st.floats()), max_size=20).map(sorted),
    st.integers(1, 90),
    st.integers(1, 30),
    st.booleans(),
)
def test_anything_fits_any_size(
    points: list[tuple[float, float]], width: int, height: int, log: bool
) -> None:
    plot = line_plot(
        [Line(points, "", "a name that is long", "0.123", "■", marks=points[:3])],
        width,
        height,
        View(log=log),
    )
    assert [sum(len(cells) for cells, _ in row) for row in plot.rows] == [width] * height


def test_x_at_is_the_step_under_a_column() -> None:
    plot = line_plot([Line(falling())], 60, 12)
    assert plot.x_at(plot.left - 1) is None and plot.x_at(plot.left + plot.width) is None
    assert plot.x_at(plot.left) == pytest.approx(1 + 99 * 0.5 / plot.width)


@pytest.mark.parametrize(
    ("range_", "most", "log", "labels"),
    [
        ((0, 100), 5, False, ["0", "20", "40", "60", "80"]),
        ((-2.2, 1.2), 4, True, ["0.01", "0.1", "1", "10"]),
        ((-0.5, 0.9), 6, True, ["0.5", "1", "2", "5"]),
        ((-8.0, 8.0), 4, True, ["1e-08", "0.001", "100", "10M"]),
        ((0, 2e7), 4, False, ["0", "5M", "10M", "15M"]),
        ((0.001, 0.0013), 3, False, ["0.001", "0.0011", "0.0012"]),
    ],
    ids=["linear", "decades", "within-a-decade", "many-decades", "millions", "narrow"],
)
def test_ticks(range_: tuple[float, float], most: int, log: bool, labels: list[str]) -> None:
    assert [label for _, label in ticks(range_, most, log)] == labels


@given(st.floats(-1e300, 1e300), st.floats(-1e300, 1e300), st.integers(1, 9), st.booleans())
def test_ticks_are_in_the_range_and_at_most_as_many_as_asked(
    a: float, b: float, most: int, log: bool
) -> None:
    range_ = (min(a, b) % 300, max(a, b) % 300) if log else (min(a, b), max(a, b))
    if range_[0] < range_[1] and is_drawable(range_):
        found = ticks(range_, most, log)
        assert len(found) <= most
        slack = 1e-9 * max(map(abs, range_))
        assert all(range_[0] - slack <= tick <= range_[1] + slack for tick, _ in found)


def test_the_fitted_range_holds_all_values_and_a_decade_is_told() -> None:
    low, high = fit([1.0, 5.0, float("nan")])
    assert low < 1 and high > 5 and fit([]) == (0, 1) and fit([-1, 0], log=True) == (0, 1)
    assert is_drawable(fit([7.0])) and is_drawable(fit([1e300]))
    assert (
        spans_decade([0.1, 1.0])
        and not spans_decade([0.2, 1.0])
        and not spans_decade([0, 1])
        and not spans_decade([])
    )


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (0, "0"),
        (1234567, "1.235M"),
        (12000, "12,000"),
        (0.00025, "0.00025"),
        (float("inf"), "inf"),
        (float("nan"), "nan"),
    ],
    ids=["zero", "millions", "thousands", "small", "infinite", "nan"],
)
def test_numbers(value: float, said: str) -> None:
    assert number(value) == said
