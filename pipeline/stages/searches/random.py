"""Random search (Bergstra & Bengio 2012): combinations drawn evenly from lists and ranges."""

from math import exp, log
from random import Random
from typing import Any

from pipeline.stages.searches import Search, SearchSettings, Values, check_trials, one_grid, rounded

ATTEMPTS = 100  # draws per wanted combination: fewer come out of a grid that has fewer


def draw(settings: SearchSettings) -> list[Values]:
    """`trials` different combinations, or as many as the grid has."""
    # only `random()`: Python guarantees its numbers for a seed; other methods may change
    share = Random(settings.search_seed).random
    drawn = list[Values]()
    for _ in range(ATTEMPTS * settings.trials):
        values = {key: _value(options, share()) for key, options in one_grid(settings).items()}
        if values not in drawn:
            drawn.append(values)
        if len(drawn) == settings.trials:
            break
    return drawn


def _value(options: Any, share: float) -> Any:
    """The value at `share` (0 to 1) of a list or a range."""
    if isinstance(options, tuple):
        return options[int(share * len(options))]
    low, high = options["low"], options["high"]
    # the share of each whole number, linear or logarithmic, ends where that of the next begins
    end = high + 1 if isinstance(low, int) else high
    value = low * exp(share * log(end / low)) if options["log"] else low + share * (end - low)
    return min(high, int(value)) if isinstance(low, int) else rounded(value, low, high)


SEARCH = Search(
    lambda settings, _tried: draw(settings),
    lambda _settings: True,
    reads=("trials", "search_seed"),
    check=check_trials,
)
