"""Adam (Kingma & Ba 2015) by torch's fused kernel.

Not as torch.optim.Adam, whose construction imports torch's compiler: 1.4 seconds, longer than a short run trains.
"""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim.adam import adam

NAMES = ("step", "exp_avg", "exp_avg_sq")
Moments = dict[str, Tensor]


def moments_before(weights: Tensor) -> Moments:
    """The number of the last step and both averages of the gradient, as they are before the first."""
    zeros = torch.zeros_like(weights)
    return dict(zip(NAMES, (torch.zeros((), device=weights.device), zeros, zeros.clone()), strict=True))


@torch.no_grad()
def update(weights: Tensor, gradient: Tensor, moments: Moments, rates: Iterable[tuple[slice, float]]) -> None:
    """One step, in place: each part of `weights` at its own learning rate. Together the parts are all of it."""
    for part, rate in rates:
        mean, square = ([moments[name][part]] for name in NAMES[1:])
        number = [moments["step"].clone()]
        adam(
            [weights[part]],
            [gradient[part]],
            mean,
            square,
            [],
            number,
            fused=True,
            lr=rate,
            beta1=0.9,
            beta2=0.999,
            eps=1e-8,
            weight_decay=0,
            amsgrad=False,
            maximize=False,
        )
    moments["step"] += 1
