"""Series as cells: lines and points where their values are, labels that never overlap."""

from collections.abc import Sequence
from math import inf, log10, nan

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from textual.content import Content

from tests.helpers.panes import HOSTILE
from tui.panes.plot.canvas import Canvas
from tui.panes.plot.drawing import draw
from tui.panes.plot.scale import fit, is_drawable, number, spans_decade, ticks
from tui.panes.plot.series import XY, Axis, Bars, Line, Point, Rule, Series

SHARE = Axis("kept", share=True)
ANY = st.floats()  # also NaN, infinite, the smallest and the largest
POINTS = st.lists(st.tuples(ANY, ANY), max_size=12)
SIZES = st.tuples(st.integers(1, 90), st.integers(1, 30))
AXES = st.builds(
    Axis,
    st.sampled_from(["", "loss", "a quantity whose name is long"]),
    log=st.sampled_from([None, False, True]),
    falls=st.booleans(),
    share=st.booleans(),
    shown=st.booleans(),
)


def drawn(
    series: Sequence[Series],
    width: int = 60,
    height: int = 12,
    x: Axis = Axis(),  # noqa: B008  # it is frozen
    y: Axis = Axis(),  # noqa: B008
    cursor: float | None = None,
    signs: bool = False,
) -> list[str]:
    rows = draw(series, width, height, x, y, cursor=cursor, signs=signs).rows
    return [row.plain for row in rows]


def falling(count: int = 100, start: float = 10.0) -> list[XY]:
    return [(float(x), start / x) for x in range(1, count + 1)]


def style_at(row: Content, column: int) -> str:
    """The style of a cell."""
    styles = [str(span.style) for span in row.spans if span.start <= column < span.end]
    return " ".join(styles)


# Every size, every value


@given(POINTS.map(sorted), POINTS, AXES, AXES, SIZES, st.none() | ANY, st.booleans())
def test_anything_fits_any_size(
    line: list[XY],
    points: list[XY],
    x: Axis,
    y: Axis,
    size: tuple[int, int],
    cursor: float | None,
    signs: bool,
) -> None:
    values = [value for _, value in line]
    first = Line(line, label="a name that is long", value="0.123", sign="■", marks=line[:3])
    band = [(at, value, value) for at, value in line]
    series: list[Series] = [
        first,
        Line(line, bold=True, band=band, flat=line[0] if line else None, stray=True),
        Bars(lambda width: [(value, "") for value in (values * width)[:width]]),
        Rule(x=values[0] if values else nan, label="here"),
        Rule(y=values[-1] if values else nan),
    ]
    for at, value in points:
        interval = (value, at)
        series.append(Point(at, value, "●", "point", "", False, interval, interval))
    for shown in (series, series[:2], series[2:], []):
        rows = drawn(shown, *size, x, y, cursor, signs)
        assert [cell_len(row) for row in rows] == [size[0]] * size[1]


@given(st.lists(st.tuples(ANY, ANY), min_size=1, max_size=6), SIZES)
def test_given_ranges_are_kept(ranges: list[tuple[float, float]], size: tuple[int, int]) -> None:
    for low, high in ranges:
        if is_drawable((low, high)):
            drawing = draw([Line([(low, low), (high, high)])], *size, Axis(range=(low, high)))
            assert (drawing.x.low, drawing.x.high) == (low, high)
            assert len(drawing.rows) == size[1]


@pytest.mark.parametrize("text", [text for text in HOSTILE if text.strip()])
def test_names_of_any_characters_keep_the_rows_exactly_as_wide(text: str) -> None:
    axis = Axis(text)
    series: list[Series] = [
        Line(falling(), label=text, value=text, sign="■"),
        Rule(x=50, label=text),
        Point(30, 5, "●", text),
        Point(60, 5, "●", text),
    ]
    for width in (1, 7, 21, 60):
        assert {cell_len(row) for row in drawn(series, width, 12, axis, axis)} == {width}


@given(st.lists(st.tuples(st.integers(-3, 12), st.text(max_size=5))))
def test_what_is_written_over_wide_characters_leaves_no_half(texts: list[tuple[int, str]]) -> None:
    canvas = Canvas(10, 1)
    for x, text in texts:
        canvas.write(x, 0, text, "")
    assert cell_len(canvas.rows()[0].plain) == 10


# Lines


def test_a_line_has_its_name_and_value_beside_its_end() -> None:
    rows = drawn([Line(falling(), "$success", "lora", "0.1", "■")])
    assert rows[-2].endswith("■ lora 0.1")


def test_labels_of_lines_that_end_together_have_a_row_each() -> None:
    lines = [Line([(0, 1), (9, 1 + n / 1e6)], "", f"run-{n}") for n in range(6)]
    rows = [row.split()[-1] for row in drawn(lines) if "run-" in row]
    assert rows == [f"run-{n}" for n in reversed(range(6))]


def test_where_rows_do_not_suffice_the_labels_of_the_top_lines_stay() -> None:
    rows = drawn([Line([(0, n), (9, n)], "", f"run-{n}") for n in range(9)], 60, 5)
    assert [row.split()[-1] for row in rows if "run-" in row] == [
        "run-8",
        "run-7",
        "run-6",
        "run-5",
    ]


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=12), st.integers(4, 20))
def test_no_two_labels_of_lines_share_a_row(ends: list[float], height: int) -> None:
    lines = [Line([(0, y), (1, y)], "", f"run-{n}") for n, y in enumerate(ends)]
    shown = [row for row in drawn(lines, 60, height) if "run-" in row]
    assert len(shown) == min(len(ends), height - 1)


def test_the_last_line_covers_the_others_and_a_bold_one_is_thicker() -> None:
    def styles(first: str, second: str) -> set[str]:
        lines = [Line([(0, 0), (9, 0)], first), Line([(0, 0), (9, 0)], second, bold=True)]
        found = set()
        for row in draw(lines, 30, 5).rows:
            for column, char in enumerate(row.plain):
                if "⠀" < char <= "⣿":
                    found.add(style_at(row, column))
        return found

    assert styles("red", "blue") == {"blue"} and styles("blue", "red") == {"red"}


def test_a_log_scale_has_decades_and_leaves_out_what_is_not_positive() -> None:
    drawing = draw([Line([(0.0, 0.0), *falling(), (101.0, -3.0)])], 60, 10, y_axis=Axis(log=True))
    assert drawing.y.low < log10(0.1) and drawing.y.high > 1
    labels = [row.plain.split()[0] for row in drawing.rows if row.plain[:3].strip()]
    assert labels[:3] == ["10", "1", "0.1"]


def test_marks_the_cursor_and_the_flat_point_are_drawn() -> None:
    marks = [(float(x), 3.0) for x in range(10, 100, 20)]
    rows = drawn([Line(falling(), marks=marks, flat=(50.0, 0.2))], cursor=30)
    assert sum(row.count("×") for row in rows) == len(marks)
    assert sum(row.count("»") for row in rows) == 1
    assert len({row.index("│") for row in rows if "│" in row}) == 1
    assert sum("│" in row for row in rows) > 5


def test_a_stray_line_does_not_decide_the_range_unless_all_are() -> None:
    straight, stray = Line([(0, 1), (1, 2)]), Line([(0, 1), (1, 1e6)], stray=True)
    assert draw([straight, stray], 40, 8).y.high < 3
    assert draw([stray], 40, 8).y.high > 1e6


def test_signs_tell_lines_apart_without_colors() -> None:
    lines = [Line(falling(), sign=sign, label="lora") for sign in "■●"]
    plot = "".join(drawn(lines, 80, signs=True))
    assert plot.count("■") > 2 and plot.count("●") > 2
    plain = "".join(drawn(lines, 80))
    assert plain.count("■") == plain.count("●") == 1, "beside the ends"


def test_a_band_is_as_high_as_what_was_smoothed() -> None:
    def dots(band: list[tuple[float, float, float]]) -> int:
        rows = drawn([Line([(0, 0), (9, 9)]), Line([], band=band)])
        return sum("⠀" < char <= "⣿" for row in rows for char in row)

    assert dots([(float(x), 2, 7) for x in range(9)]) > dots([]) + 50


def test_x_at_is_the_step_under_a_column() -> None:
    plot = draw([Line(falling())], 60, 12)
    assert plot.x_at(plot.left - 1) is None and plot.x_at(plot.left + plot.width) is None
    assert plot.x_at(plot.left) == pytest.approx(1 + 99 * 0.5 / plot.width)


# Points


def places(rows: list[str], signs: str) -> list[tuple[int, int]]:
    """Row and column of each sign."""
    found = []
    for sign in signs:
        row = next(n for n, row in enumerate(rows) if sign in row[6:])
        found.append((row, rows[row].index(sign, 6)))
    return found


def test_more_is_to_the_right_and_up() -> None:
    points = [Point(0.4, 0.4, "a"), Point(1.0, 1.0, "b")]
    (low, left), (high, right) = places(drawn(points, 60, 20, SHARE, SHARE), "ab")
    assert low > high and left < right


def test_of_a_quantity_of_which_less_is_better_the_least_is_to_the_right_and_up() -> None:
    loss = Axis("loss", falls=True)
    points = [Point(1.0, 1.0, "a"), Point(2.0, 2.0, "b")]
    (high, right), (low, left) = places(drawn(points, 60, 20, loss, loss), "ab")
    assert low > high and left < right


def test_points_in_one_cell_share_a_label() -> None:
    axis = Axis(shown=False)
    points = [Point(0.5, 0.5, "a", "one"), Point(0.5, 0.5, "b", "two")]
    text = "\n".join(drawn(points, x=axis, y=axis))
    assert "a one, two" in text and "b" not in text


@given(
    st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=12),
    SIZES,
)
def test_each_label_is_whole_or_left_out(points: list[XY], size: tuple[int, int]) -> None:
    names = [f"<{'abcdefghijkl'[n] * 5}>" for n in range(len(points))]
    series = [Point(x, y, "●", name) for (x, y), name in zip(points, names, strict=True)]
    inside = "\n".join(drawn(series, *size, SHARE, SHARE))
    shared = [name for name in names if name in inside]
    assert all(inside.count(name) == 1 for name in shared)
    assert inside.count("<") == inside.count(">") == len(shared)
    assert "><" not in inside, "two labels read as one"


@given(st.floats(0, 1), st.floats(0, 1), st.integers(22, 90), st.integers(5, 30))
def test_a_label_alone_is_beside_its_sign_wherever_that_is(
    x: float, y: float, width: int, height: int
) -> None:
    corners = [Point(at, other, "+") for at in (0.0, 1.0) for other in (0.0, 1.0)]
    rows = drawn([Point(x, y, "●", "name"), *corners], width, height, SHARE, SHARE)
    assert any("name" in row for row in rows)


def test_a_point_outside_the_range_has_no_label() -> None:
    points = [Point(0, 0, "a", "outside"), Point(5, 5, "b", "inside")]
    text = "\n".join(drawn(points, x=Axis(range=(1, 9)), y=Axis(range=(1, 9))))
    assert "inside" in text and "outside" not in text


def test_the_pointed_label_is_in_reverse() -> None:
    rows = draw([Point(1, 1, "●", "name", "$success", pointed=True)], 40, 8).rows
    row = next(row for row in rows if "name" in row.plain)
    assert style_at(row, row.plain.index("name")) == "$success reverse"
    assert style_at(row, row.plain.index("●")) == "$success"


def test_an_interval_is_a_line_through_the_sign() -> None:
    points = [Point(0.7, 0.7, "●", x_range=(0.5, 0.9), y_range=(0.6, 0.8))]
    axis = Axis(range=(0, 1))
    rows = drawn(points, 60, 20, axis, axis)
    [(row, column)] = places(rows, "●")
    assert rows[row][column - 3 : column + 4] == "───●───"
    assert rows[row - 1][column] == rows[row + 1][column] == "│"


@pytest.mark.parametrize("end", [nan, inf, -inf, 0.0, 1e300])
def test_an_interval_with_an_end_that_has_no_place_is_drawn_as_far_as_it_goes(end: float) -> None:
    x = Axis(range=(-1, 1), log=True)
    rows = drawn([Point(1.0, 1.0, "●", x_range=(0.5, end), y_range=(end, end))], x=x)
    assert any("─●" in row for row in rows)


# Bars and rules


def test_bars_are_from_zero_and_the_least_is_seen() -> None:
    bars = Bars(lambda _: [(0.5, ""), (1.0, ""), (0.0, ""), (0.01, "")])
    axis = Axis(range=(0, 1), shown=False)
    assert drawn([bars], 8, 2, axis, axis) == ["     █  ", "    ██ ▁"]
    many = Bars(lambda width: [(1.0, "")] * (width + 3))
    assert drawn([many], 8, 1, axis, axis) == ["████████"]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.integers(1, 4))
def test_a_larger_value_is_never_a_lower_bar(values: list[float], height: int) -> None:
    axis = Axis(range=(0, 1), shown=False)
    rows = drawn([Bars(lambda _: [(value, "") for value in values])], 8, height, axis, axis)
    columns = [[row[x] for row in rows] for x in range(8 - len(values), 8)]
    heights = [sum(" ▁▂▃▄▅▆▇█".index(char) for char in column) for column in columns]
    by_value = sorted(zip(values, heights, strict=True))
    assert [height for _, height in by_value] == sorted(heights)


def test_the_label_of_a_rule_stands_below_it_on_the_side_that_has_room() -> None:
    for x, text in ((5, "▲ epoch 1"), (50, "epoch 1 ▲"), (99, "epoch 1 ▲")):
        rows = drawn([Line(falling()), Rule(x=x, label="epoch 1")])
        assert text in rows[-1]
        assert rows[-1].index("▲") == max(row.find("│") for row in rows)


@given(st.lists(st.floats(1, 100), max_size=5), st.integers(21, 90))
def test_labels_below_never_overlap(places: list[float], width: int) -> None:
    rules = [Rule(x=x, label=f"<{'abcde'[n] * 4}>") for n, x in enumerate(places)]
    below = drawn([Line(falling()), *rules], width)[-1]
    assert below.count("<") == below.count(">") <= below.count("▲")
    known = [label for _, label in draw([Line(falling())], width, 12).x.ticks(width // 10)]
    rest = [word for word in below.replace("▲", " ").split() if "<" not in word]
    assert set(rest) <= {*known}, "a tick is whole or left out"


def test_a_limit_is_a_line_across() -> None:
    rows = drawn([Rule(y=0.5)], y=Axis(range=(0, 1)))
    assert [row.count("╌") > 40 for row in rows if "╌" in row] == [True]


# Axes


@pytest.mark.parametrize(
    ("axis", "values", "most", "expected"),
    [
        (SHARE, [0.4, 1.0], 7, ["40%", "50%", "60%", "70%", "80%", "90%", "100%"]),
        (SHARE, [0.4, 1.0], 3, ["50%", "75%", "100%"]),
        (Axis("rank", marks=[(1, "1"), (8, "8"), (64, "64")]), [1, 64], 3, ["1", "8", "64"]),
        (Axis("rank", marks=[(1, "1"), (8, "8"), (64, "64")]), [1, 64], 2, ["1", "64"]),
        (Axis("rate", log=None), [1e-4, 1e-2], 3, ["0.0001", "0.001", "0.01"]),
        (Axis("rate", log=None), [1, 5], 3, ["2", "4"]),
    ],
    ids=["tenths", "quarters", "marks", "fewer marks", "decades", "less than a decade"],
)
def test_ticks_of_an_axis(axis: Axis, values: list[float], most: int, expected: list[str]) -> None:
    assert [label for _, label in axis.fitted(values).ticks(most)] == expected


@pytest.mark.parametrize("value", [0.0, -3.0, 1e-12, 5.0, 1e300, -1e300])
def test_one_value_alone_can_be_drawn(value: float) -> None:
    assert any("●" in row for row in drawn([Point(value, 0.5, "●")]))


@given(st.lists(ANY), AXES)
def test_the_range_of_an_axis_holds_all_that_has_a_place(values: list[float], axis: Axis) -> None:
    scale = axis.fitted(values)
    assert scale.low < scale.high
    for value in values:
        if not abs(value) < 1e300 or axis.share or (scale.log and value <= 0):
            continue
        share = scale.share(value)
        assert share is not None and -1e-9 <= share <= 1 + 1e-9


def test_an_axis_that_is_not_shown_takes_no_room() -> None:
    hidden = Axis("loss", shown=False)
    drawing = draw([Line(falling())], 60, 12, hidden, hidden)
    assert drawing.left == 0 and not any("loss" in row.plain for row in drawing.rows)


def test_titles_stand_above_and_the_second_below_where_there_is_no_room() -> None:
    x, y = Axis("new sentences completed"), Axis("old answers kept")
    wide, narrow = (drawn([Line(falling())], width, 12, x, y) for width in (60, 40))
    assert "↑ old answers kept" in wide[0] and wide[0].endswith("new sentences completed →")
    assert "↑ old answers kept" in narrow[0] and "new" not in narrow[0]
    assert narrow[-1].endswith("  new sentences completed →") and "50" in narrow[-2]
    alone = drawn([Line(falling())], x=x)
    assert alone[-1].endswith("new sentences completed →")


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
    low, high = fit([1.0, 5.0, nan])
    assert low < 1 and high > 5
    assert fit([]) == (0, 1) and fit([-1, 0], log=True) == (0, 1)
    assert is_drawable(fit([7.0])) and is_drawable(fit([1e300]))
    assert spans_decade([0.1, 1.0])
    for values in ([0.2, 1.0], [0, 1], []):
        assert not spans_decade(values)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (0, "0"),
        (1234567, "1.235M"),
        (12000, "12,000"),
        (0.00025, "0.00025"),
        (inf, "inf"),
        (nan, "nan"),
    ],
    ids=["zero", "millions", "thousands", "small", "infinite", "nan"],
)
def test_numbers(value: float, said: str) -> None:
    assert number(value) == said
