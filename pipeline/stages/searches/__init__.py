"""How a sweep chooses the combinations that it trains. A search is one file here, `SEARCH`, found
by its name.

Only the one that a sweep uses is imported. That imports no torch, and no library that only another
needs.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import product
from math import prod
from typing import Any, NamedTuple, Protocol

from pipeline.errors import UserError
from pipeline.extensions import Registry

Values = Mapping[str, Any]  # key of finetune_lora → value
Grid = Mapping[str, Any]  # key → the values to try: a tuple, or a range {low, high, log}


class SearchSettings(Protocol):
    """The keys of finetune_sweep that searches read."""

    @property
    def grid(self) -> Grid | tuple[Grid, ...]: ...
    @property
    def search(self) -> str: ...
    @property
    def trials(self) -> int: ...
    @property
    def search_seed(self) -> int: ...
    @property
    def reduction_factor(self) -> int: ...
    @property
    def sampler(self) -> str: ...
    @property
    def generation(self) -> int: ...


class Trial(NamedTuple):
    """A combination that was trained, and its held-out loss; None if it diverged."""

    values: Values
    loss: float | None


def _one_pass(_settings: SearchSettings) -> int:
    return 1


def _no_rungs(_settings: SearchSettings, _adapters: int, _steps: int) -> dict[int, int]:
    return {}


class Search(NamedTuple):
    """`reads`: the keys of finetune_sweep that it reads beside the grid.

    `ask(settings, tried)`: the combinations of the next pass, given those of all before; the same
    answer each time. `draws(settings)`: whether it draws from the grid, which may then have ranges.
    `passes`: how many there are at most. `compares`: whether it needs held-out losses.
    `rungs(settings, adapters, steps)`: step → how many adapters train on after it.
    `check(settings)` raises UserError.
    """

    ask: Callable[[SearchSettings, Sequence[Trial]], list[Values]]
    draws: Callable[[SearchSettings], bool]
    reads: tuple[str, ...] = ()
    passes: Callable[[SearchSettings], int] = _one_pass
    compares: bool = False
    rungs: Callable[[SearchSettings, int, int], dict[int, int]] = _no_rungs
    check: Callable[[SearchSettings], object] = id


def grids(settings: SearchSettings) -> tuple[Grid, ...]:
    """The grids whose combinations are tried one after the other."""
    return (settings.grid,) if isinstance(settings.grid, Mapping) else settings.grid


def count(settings: SearchSettings) -> int:
    """The number of combinations of grids without ranges."""
    return sum(prod(map(len, grid.values())) for grid in grids(settings))


def combinations(settings: SearchSettings) -> list[Values]:
    """Every combination of grids without ranges."""
    return [
        dict(zip(grid, values, strict=True))
        for grid in grids(settings)
        for values in product(*grid.values())
    ]


def one_grid(settings: SearchSettings) -> Grid:
    """The only grid. Raises UserError if there are several: which to draw from is not said."""
    (first, *others) = grids(settings)
    if others:
        raise UserError(
            f"grid is a list, but search {settings.search} draws from one mapping. Join them."
        )
    return first


def check_trials(settings: SearchSettings) -> None:
    """Raises UserError without a number of combinations to draw, or for a grid that nothing can be
    drawn from.
    """
    if not settings.trials:
        raise UserError(
            f"trials is 0, but search {settings.search} draws as many combinations. Set it, such "
            "as to 16."
        )
    if not one_grid(settings):
        raise UserError(
            f"grid is empty, but search {settings.search} draws from it. Name keys, such as "
            "learning_rate."
        )


def rounded(value: float, low: float, high: float) -> float:
    """To three digits, as a name shows it and somebody types it, inside the range."""
    return min(high, max(low, float(f"{value:.3g}")))


SEARCHES = Registry[Search]("search")
