"""How a sweep chooses the combinations that it trains. A search is a file here with `SEARCH`.

Only the search that a sweep uses is imported. It imports no torch, and no other search's library.
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


class Search(NamedTuple):
    """How combinations are chosen, and which adapters are stopped early."""

    # (settings, tried): the combinations of the next pass, given those before; deterministic
    ask: Callable[[SearchSettings, Sequence[Trial]], list[Values]]
    # whether it draws from the grid, which may then have ranges
    draws: Callable[[SearchSettings], bool]
    # keys of finetune_sweep that it reads beside the grid
    reads: tuple[str, ...] = ()
    # the most passes that it asks for
    passes: Callable[[SearchSettings], int] = lambda _settings: 1
    # whether it needs held-out losses
    compares: bool = False
    # (settings, adapters, steps): step → how many adapters train on after it; None: all, always
    rungs: Callable[[SearchSettings, int, int], dict[int, int]] | None = None
    # raises UserError for settings that it cannot search with
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
    """The only grid. Raises UserError if there are several, as a draw is from one."""
    (first, *others) = grids(settings)
    if others:
        raise UserError(
            f"grid is a list, but search {settings.search} draws from one mapping. Join them."
        )
    return first


def check_trials(settings: SearchSettings) -> None:
    """Raises UserError without a number of combinations to draw, or for an empty grid."""
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
    """To three digits, as an adapter's name shows it, and inside the range."""
    return min(high, max(low, float(f"{value:.3g}")))


SEARCHES = Registry[Search]("search")
