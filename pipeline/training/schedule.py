"""The learning rate of each step."""

import math

from pipeline.errors import UserError
from pipeline.project.params.sections import Training


def rate(settings: Training, step: int, total: int) -> float:
    """Of step `step`, counted from 1, of `total`: a linear warm-up, then constant, or down to zero after the last.

    Linear decay as in Devlin et al. 2018 (appendix A.2), cosine as in Loshchilov & Hutter 2017 (eq. 5).
    """
    warm = min(settings.warmup_steps, total)
    if step <= warm:
        return settings.learning_rate * step / warm
    gone = (step - 1 - warm) / max(1, total - warm)  # share of the decay that is over, 0 at its first step
    if settings.schedule == "linear":
        return settings.learning_rate * (1 - gone)
    if settings.schedule == "cosine":
        return settings.learning_rate * (1 + math.cos(math.pi * gone)) / 2
    return settings.learning_rate


def refuse_long_warmup(settings: Training, total: int, section: str) -> None:
    """Raises UserError if all `total` steps are warm-up: the rate would be reached at the last one, or never."""
    if settings.warmup_steps >= total:
        raise UserError(
            f"{section}.warmup_steps must be below {total}, the steps of the whole training, "
            f"got {settings.warmup_steps}. Lower it."
        )
