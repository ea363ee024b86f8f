"""The intervals are those of resampling, and are the same each time."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.evaluation import bootstrap
from pipeline.evaluation.bootstrap import interval

SCORES = st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=1, max_size=40)


@given(SCORES)
def test_the_interval_is_that_of_drawing_examples_with_replacement(scores: list[float]) -> None:
    values = np.array(scores)
    drawn = np.random.default_rng(1).integers(0, len(values), size=(10_000, len(values)))
    low, high = np.quantile(values[drawn].mean(1), [0.025, 0.975])
    # the quantiles of two samples of 10,000 means, which may differ by one score of one example
    tolerance = float(np.ptp(values)) * (1 / len(values) + 0.02)
    assert interval(scores) == pytest.approx((low, high), abs=tolerance)


def test_it_is_scipys_percentile_interval() -> None:
    scipy_stats = pytest.importorskip("scipy.stats")
    values = np.random.default_rng(2).uniform(size=50)
    settings = {"method": "percentile", "n_resamples": 20_000, "rng": np.random.default_rng(3)}
    expected = scipy_stats.bootstrap((values,), np.mean, **settings).confidence_interval
    assert interval(values.tolist()) == pytest.approx((expected.low, expected.high), abs=0.005)


def test_a_paired_difference_is_narrower_than_two_independent_ones() -> None:
    base = np.random.default_rng(0).uniform(size=100)
    low, high = interval((base + 0.1 - base).tolist())
    assert (low, high) == pytest.approx((0.1, 0.1)), "every example gains as much"
    assert interval((base + 0.1).tolist())[1] - interval(base.tolist())[0] > 0.1


@given(SCORES)
def test_it_is_the_same_each_time_and_in_parts(scores: list[float]) -> None:
    whole = interval(scores)
    assert interval(scores) == whole
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bootstrap, "CELLS", 1000)
        assert interval(scores) == whole


@given(SCORES, st.permutations(range(5)))
def test_the_order_of_the_examples_does_not_count(scores: list[float], order: list[int]) -> None:
    assert interval(sorted(scores)) == interval(scores)
    assert interval([scores[n % len(scores)] for n in order]) == interval(
        sorted(scores[n % len(scores)] for n in order)
    )
