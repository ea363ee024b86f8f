"""Confidence intervals of a mean by the percentile bootstrap (Efron 1979), with a fixed seed."""

from collections.abc import Sequence

import numpy as np

LEVEL = 0.95
RESAMPLES = 10_000
CELLS = 10_000_000  # of counts in memory at once


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The bounds of the mean's 95% confidence interval.

    For a paired difference, pass the differences: drawing pairs is drawing their differences.
    """
    # A resample is n draws, so how often each distinct value occurs in it is multinomial. Most
    # scores are 0 or 1: two counts per resample, instead of n.
    distinct, counts = np.unique(np.asarray(values, dtype=np.float64), return_counts=True)
    n = len(values)
    generator = np.random.default_rng(0)
    step = max(1, CELLS // len(distinct))
    means = np.concatenate(
        [
            generator.multinomial(n, counts / n, size=min(step, RESAMPLES - start)) @ distinct / n
            for start in range(0, RESAMPLES, step)
        ]
    )
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
