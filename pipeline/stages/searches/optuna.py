"""Optuna's samplers (Akiba et al. 2019), which learn from the held-out losses of each pass."""

import warnings
from collections.abc import Sequence
from math import ceil, inf
from typing import Any

from pipeline.errors import require
from pipeline.stages.searches import (
    Search,
    SearchSettings,
    Trial,
    Values,
    check_trials,
    one_grid,
    rounded,
)


def ask(settings: SearchSettings, tried: Sequence[Trial]) -> list[Values]:
    """The new combinations of the next generation; none once all `trials` are drawn."""
    # Each call replays the study from what was tried: with a seed the sampler draws the same again,
    # so that a killed sweep has no state to keep but its adapters' losses.
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        study = optuna.create_study(sampler=_sampler(settings))
    grid = one_grid(settings)
    for start in range(0, settings.trials, settings.generation):
        trials = [study.ask() for _ in range(min(settings.generation, settings.trials - start))]
        asked: list[Values] = []
        for trial in trials:
            asked.append({key: _suggest(trial, key, options) for key, options in grid.items()})
        known = [earlier.values for earlier in tried]
        new = [values for n, values in enumerate(asked) if values not in (*known, *asked[:n])]
        if new:
            return new
        for trial, values in zip(trials, asked, strict=True):
            loss = tried[known.index(values)].loss
            study.tell(trial, inf if loss is None else loss)
    return []


def _sampler(settings: SearchSettings) -> Any:
    from optuna import samplers

    # the first generation has no losses to learn from, so it is drawn at random
    seed, first = settings.search_seed % 2**32, settings.generation
    if settings.sampler == "gp":
        return samplers.GPSampler(seed=seed, n_startup_trials=first)
    if settings.sampler == "qmc":
        return samplers.QMCSampler(seed=seed)
    return samplers.TPESampler(seed=seed, n_startup_trials=first, constant_liar=True)


def _suggest(trial: Any, key: str, options: Any) -> Any:
    if isinstance(options, tuple):  # by number: a value may be a list, which Optuna does not take
        return options[trial.suggest_categorical(key, list(range(len(options))))]
    low, high = options["low"], options["high"]
    if isinstance(low, int):
        return trial.suggest_int(key, low, high, log=options["log"])
    return rounded(trial.suggest_float(key, low, high, log=options["log"]), low, high)


def _check(settings: SearchSettings) -> None:
    check_trials(settings)
    require("search: optuna", "search optuna")
    if settings.sampler in ("gp", "qmc"):
        require("sampler: gp, qmc", f"sampler {settings.sampler}")


SEARCH = Search(
    ask,
    draws=lambda _settings: True,
    reads=("trials", "search_seed", "sampler", "generation"),
    passes=lambda settings: ceil(settings.trials / settings.generation),
    compares=True,
    check=_check,
)
