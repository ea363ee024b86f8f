"""Smoothing and decimation, compared with their definitions."""

import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.project.logs.run_log import Step, flat_from
from pipeline.views.series import Column, Log, Series

VALUES = st.lists(st.floats(-1e100, 1e100), min_size=1, max_size=200)
LOOSE = st.lists(st.floats(), min_size=1, max_size=100)  # NaN and infinities too


def series(values: Sequence[float], strength: float = 0.0) -> Series:
    log = Log(strength)
    log.extend([(i + 1, 1, value, 1.0, 1.0, i) for i, value in enumerate(values)])
    return log.series["loss"]


def weighted_means(values: Sequence[float], strength: float) -> list[float]:
    """For each value, the mean of all up to it: the last has the weight 1 - strength or, if more,
    8/(n + 7) of n, and those before share the rest as they did."""
    means = []
    for end in range(1, len(values) + 1):
        lasts = [max(1 - strength, 8 / (n + 7)) for n in range(1, end + 1)]
        weights = [
            last * math.prod(1 - later for later in lasts[n + 1 :]) for n, last in enumerate(lasts)
        ]
        assert sum(weights) == pytest.approx(1)
        means.append(sum(w * v for w, v in zip(weights, values[:end], strict=True)))
    return means


@given(
    st.lists(st.floats(-100, 100), min_size=1, max_size=60), st.sampled_from([0.0, 0.5, 0.9, 0.99])
)
def test_the_smoothed_line_is_the_weighted_mean_of_all_before(
    values: list[float], strength: float
) -> None:
    assert list(series(values, strength).smooth) == pytest.approx(
        weighted_means(values, strength), abs=1e-9
    )


def test_a_short_run_is_not_shown_as_the_mean_of_its_steps() -> None:
    falling = [2.13 * (0.114 / 2.13) ** (step / 12) for step in range(13)]
    smooth = series(falling, 0.9).smooth
    assert smooth[0] == falling[0]
    assert falling[-1] < smooth[-1] < 2 * falling[-1] < sum(falling) / 13


def test_a_long_run_has_the_exponential_moving_average() -> None:
    values = [math.sin(i * i) for i in range(2000)]
    mean = 0.0
    for value in values:
        mean = 0.9 * mean + 0.1 * value
    assert series(values, 0.9).smooth[-1] == pytest.approx(mean)


def test_changing_the_smoothing_equals_smoothing_from_the_start() -> None:
    log = Log(0.5)
    log.extend([(i, 1, math.sin(i), 1.0, 1.0, i) for i in range(1, 300)])
    log.smooth(0.9)
    assert list(log.series["loss"].smooth) == list(
        series(list(map(math.sin, range(1, 300))), 0.9).smooth
    )


@given(VALUES, st.integers(1, 50), st.floats(-10, 250), st.floats(0, 250))
def test_columns_hold_every_point_and_are_at_most_as_many_as_requested(
    values: list[float], columns: int, first: float, width: float
) -> None:
    last = first + width
    result = series(values).visible(first, last, columns)
    assert len(result) <= columns
    inside = [(i + 1, value) for i, value in enumerate(values) if first <= i + 1 <= last]
    assert bool(result) == bool(inside)
    for column in result:
        assert column.low <= column.high
        margin = 1e-9 * max(abs(column.low), abs(column.high))
        assert column.low - margin <= column.mean <= column.high + margin
    for _, value in inside:
        assert any(column.low <= value <= column.high for column in result)
    if inside:
        assert min(column.low for column in result) == min(value for _, value in inside)
        assert max(column.high for column in result) == max(value for _, value in inside)
        assert [column.x for column in result] == sorted(column.x for column in result)


@given(LOOSE, st.integers(1, 40))
def test_values_that_are_not_finite_are_left_out_and_the_others_kept(
    values: list[float], columns: int
) -> None:
    result = series(values).visible(1, len(values), columns)
    finite = [value for value in values if math.isfinite(value)]
    assert bool(result) == bool(finite)
    for value in finite:
        assert any(column.low <= value <= column.high for column in result)


@pytest.mark.parametrize("columns", [1, 7, 100, 376])
def test_cached_blocks_give_the_same_columns_as_reading_every_point(columns: int) -> None:
    values = [math.sin(i * i) for i in range(5000)]
    for first, last in ((1, 5000), (777, 3131)):
        line = series(values, 0.9)
        result = line.visible(first, last, columns)
        width = (last - first) / columns
        edges = [first + width * i for i in range(columns)]
        for number, column in enumerate(result):
            end = edges[number + 1] if number + 1 < columns else last + 1
            indices = [i for i in range(5000) if edges[number] <= i + 1 < end]
            raw, smooth = [values[i] for i in indices], [line.smooth[i] for i in indices]
            expected = Column(
                (indices[0] + indices[-1]) / 2 + 1, min(raw), max(raw), sum(smooth) / len(smooth)
            )
            assert (column.x, column.low, column.high) == (expected.x, expected.low, expected.high)
            assert column.mean == pytest.approx(expected.mean)


def test_a_learning_rate_is_not_smoothed() -> None:
    log = Log(0.9)
    log.extend([(step, 1, 1.0, 1 / step, 1.0, 1) for step in range(1, 9)])
    log.smooth(0.99)
    assert log.series["learning_rate"].smooth == log.series["learning_rate"].y


def test_one_point_is_one_column() -> None:
    assert series([2.5]).visible(1, 1, 100) == [Column(1, 2.5, 2.5, 2.5)]


def test_rows_out_of_order_are_counted_and_left_out() -> None:
    log = Log(0.0)
    log.extend([(step, 1, 1.0, 1.0, 1.0, 1) for step in (1, 2, 2, 1, 3)])
    assert (list(log.steps), log.foreign) == ([1, 2, 3], 2)


@given(st.lists(st.floats(0, 10), min_size=1, max_size=12), st.integers(1, 4))
def test_flat_is_what_flat_from_says(means: list[float], each: int) -> None:
    steps = [
        Step(1 + epoch * each + i, epoch + 1, loss, 1.0, 1.0, 1)
        for epoch, loss in enumerate(means)
        for i in range(each)
    ]
    log = Log(0.0)
    log.extend([(s.step, s.epoch, s.loss, s.learning_rate, s.grad_norm, s.tokens) for s in steps])
    epoch = flat_from(steps)
    assert log.flat(running=False) == (None if epoch is None else (epoch, 1 + (epoch - 1) * each))


def test_while_a_run_is_running_its_last_epoch_does_not_count() -> None:
    log = Log(0.0)
    log.extend([(i + 1, i + 1, loss, 1.0, 1.0, 1) for i, loss in enumerate([5, 1, 1, 1, 4])])
    assert log.flat(running=True) == (2, 2)
    assert log.flat(running=False) is None


def test_the_nearest_point_is_found() -> None:
    log = Log(0.0)
    assert log.index_at(3) is None
    log.extend([(step, 1, 1.0, 1.0, 1.0, 1) for step in (10, 20, 40)])
    assert [log.index_at(step) for step in (1, 14, 16, 29, 31, 99)] == [0, 0, 1, 1, 2, 2]
