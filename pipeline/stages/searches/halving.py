"""Successive halving (Jamieson & Talwalkar 2016): after each rung the worse adapters stop."""

from pipeline.errors import UserError
from pipeline.stages.searches import Search, SearchSettings, check_trials, combinations, count
from pipeline.stages.searches.random import draw


def rungs(settings: SearchSettings, adapters: int, steps: int) -> dict[int, int]:
    """Step → how many adapters train on after it: one in `reduction_factor`.

    Each rung costs about the same. With 27 adapters, a factor of 3 and 81 steps: 9 after step 3, 3
    after step 9, 1 after step 27.
    """
    factor, left, numbers = settings.reduction_factor, adapters, list[int]()
    while left >= factor:
        left //= factor
        numbers.append(left)
    at = {steps // factor ** (len(numbers) - n): left for n, left in enumerate(numbers)}
    return {step: left for step, left in at.items() if step}


def _check(settings: SearchSettings) -> None:
    if settings.trials:
        check_trials(settings)
        adapters = len(draw(settings))  # a grid may have fewer combinations than `trials`
    else:
        adapters = count(settings)
    if adapters < settings.reduction_factor:
        raise UserError(
            f"reduction_factor is {settings.reduction_factor}, but there are only {adapters} "
            "adapters: none would be stopped. Lower it, or try more combinations."
        )


SEARCH = Search(
    lambda settings, _tried: draw(settings) if settings.trials else combinations(settings),
    lambda settings: bool(settings.trials),
    reads=("trials", "search_seed", "reduction_factor"),
    compares=True,
    rungs=rungs,
    check=_check,
)
