"""The scatter: signs where their values are, and labels that never overlap."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.style import Style

from tui.widgets.plot.scatter import Axis, Point, draw

MUTED = Style(dim=True)
SHARE = Axis.around("kept", [0.4, 1.0], share=True)


def lines(
    points: list[Point], x: Axis = SHARE, y: Axis = SHARE, size: tuple[int, int] = (60, 20)
) -> list[str]:
    return [line.plain for line in draw(points, x, y, *size, MUTED)]


def test_more_is_to_the_right_and_up() -> None:
    text = lines([Point(0.4, 0.4, "a"), Point(1.0, 1.0, "b")])
    (low, left), (high, right) = (
        (n, line.index(sign)) for sign in "ab" for n, line in enumerate(text) if sign in line[6:]
    )
    assert low > high and left < right


def test_of_a_quantity_of_which_less_is_better_the_least_is_to_the_right() -> None:
    loss = Axis.around("loss", [1.0, 2.0], falls=True)
    text = next(
        line for line in lines([Point(1.0, 0.5, "a"), Point(2.0, 0.5, "b")], x=loss) if "a" in line
    )
    assert text.index("b") < text.index("a")


def test_points_in_one_cell_share_a_label() -> None:
    text = "\n".join(lines([Point(0.5, 0.5, "a", "one"), Point(0.5, 0.5, "b", "two")]))
    assert "a one, two" in text and "b" not in text


@given(
    points=st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=12),
    size=st.tuples(st.integers(1, 90), st.integers(1, 30)),
)
def test_each_label_is_whole_or_left_out(
    points: list[tuple[float, float]], size: tuple[int, int]
) -> None:
    names = [f"<{'abcdefghijkl'[n] * 5}>" for n in range(len(points))]
    axis = Axis.around("share", [value for point in points for value in point], share=True)
    text = lines(
        [Point(x, y, "●", name) for (x, y), name in zip(points, names, strict=True)],
        axis,
        axis,
        size,
    )
    assert len(text) <= max(size[1], 1) and all(
        len(line) <= size[0] or len(text) == 1 for line in text
    )
    inside = "\n".join(text)
    assert all(inside.count(name) <= 1 for name in names)
    assert inside.count("<") == inside.count(">")


def test_an_interval_is_a_line_through_the_sign() -> None:
    text = next(line for line in lines([Point(0.7, 0.7, "●", x_range=(0.5, 0.9))]) if "●" in line)
    left, _, right = text.partition("●")
    assert left.endswith("───") and right.startswith("───")


@pytest.mark.parametrize(
    ("axis", "most", "expected"),
    [
        pytest.param(SHARE, 7, ["40%", "50%", "60%", "70%", "80%", "90%", "100%"], id="tenths"),
        pytest.param(SHARE, 3, ["50%", "75%", "100%"], id="quarters"),
        pytest.param(
            Axis.around("rank", [1, 64], marks=[(1, "1"), (8, "8"), (64, "64")]),
            3,
            ["1", "8", "64"],
            id="marks",
        ),
        pytest.param(
            Axis.around("rank", [1, 64], marks=[(1, "1"), (8, "8"), (64, "64")]),
            2,
            ["1", "64"],
            id="fewer marks",
        ),
        pytest.param(
            Axis.around("rate", [1e-4, 1e-2]), 3, ["0.0001", "0.001", "0.01"], id="decades"
        ),
    ],
)
def test_ticks(axis: Axis, most: int, expected: list[str]) -> None:
    assert [label for _, label in axis.ticks(most)] == expected


@pytest.mark.parametrize("value", [0.0, -3.0, 1e-12, 5.0], ids=["zero", "negative", "tiny", "five"])
def test_one_value_alone_can_be_drawn(value: float) -> None:
    axis = Axis.around("loss", [value])
    assert any("●" in line for line in lines([Point(value, 0.5, "●")], x=axis))
