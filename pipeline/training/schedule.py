"""The learning rate of each step."""

import math

from pipeline.errors import UserError
from pipeline.project.params.sections import Training


def rate(settings: Training, step: int, total: int) -> float:
    """The learning rate at step `step` of `total`, from 1: linear warm-up, then constant, or decay to 0 after the last.

    Linear decay as in Devlin et al. 2018 (appendix A.2), cosine as in Loshchilov & Hutter 2017 (eq. 5).
    """
    warmup = min(settings.warmup_steps, total)
    if step <= warmup:
        return settings.learning_rate * step / warmup
    progress = (step - 1 - warmup) / max(1, total - warmup)  # fraction of the decay done, 0 at its first step
    if settings.schedule == "linear":
        return settings.learning_rate * (1 - progress)
    if settings.schedule == "cosine":
        return settings.learning_rate * (1 + math.cos(math.pi * progress)) / 2
    return settings.learning_rate


def refuse_long_warmup(settings: Training, total: int, section: str) -> None:
    """Raises UserError if all `total` steps are warm-up: no step would follow at the full learning rate."""
    if settings.warmup_steps >= total:
        raise UserError(
            f"{section}.warmup_steps must be below {total}, the total number of training steps, "
            f"got {settings.warmup_steps}. Lower it."
        )
