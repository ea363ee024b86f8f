"""The speed of training, measured on a few steps of the real run."""

import time
from statistics import quantiles
from typing import NamedTuple

import torch

from pipeline.errors import UserError
from pipeline.training.loop import Diverged, steps
from pipeline.training.memory.prediction import predicted_peak
from pipeline.training.task import TrainingTask, build_optimizer, prepare_model

LEAST, MOST = 3, 8  # steps that are timed
SECONDS = 10.0  # after them no further step is begun


class Probe(NamedTuple):
    """What a few steps tell of a whole run."""

    # tokens per second, between which half of the timed steps lie
    slow: float
    fast: float
    timed: int  # steps
    steps_per_epoch: int
    steps: int  # of the whole run
    epoch_tokens: int  # of all examples in an epoch
    tokens: int  # of the whole run
    # peak memory of the largest step of an epoch, in bytes of tensors on the device; 0: not known
    predicted: int
    trained: int  # bytes of the weights that train
    device: torch.device

    def of_all(self, share: float, max_steps: int) -> "Probe":
        """The probe of all examples, of which this one read only `share`."""
        per_epoch = round(self.steps_per_epoch / share)
        epoch_tokens = round(self.epoch_tokens / share)
        steps = max_steps or per_epoch * (self.steps // self.steps_per_epoch)
        return self._replace(
            steps_per_epoch=per_epoch,
            steps=steps,
            epoch_tokens=epoch_tokens,
            tokens=round(epoch_tokens * steps / per_epoch),
        )

    @property
    def seconds(self) -> tuple[float, float]:
        """The least and the most time that the whole run takes."""
        return self.tokens / self.fast, self.tokens / self.slow


def probe(task: TrainingTask) -> Probe:
    """Train a few steps and time them, which changes the model.

    Raises UserError if their loss is not finite.
    """
    model, batches, total = task.model, task.batches, task.total
    step_tokens = []
    for number in range(len(batches)):
        step_tokens.append(sum(map(batches.dataset.tokens, batches.windows(number))))
    with task.path.base():
        device = prepare_model(model, task.settings.gradient_checkpointing, task.settings.compile)
    model.to(device)
    optimizer = build_optimizer(model, *(learner.settings for learner in task.learners))
    predicted = predicted_peak(task, batches.largest_step(range(min(len(batches), total))))
    model.train()
    speeds, began = list[float](), time.monotonic()
    before = began
    try:
        for number, _ in enumerate(steps(task, optimizer)):
            now = time.monotonic()
            if number or total == 1:  # the first step allocates
                speeds.append(step_tokens[number % len(batches)] / max(now - before, 1e-9))
            if len(speeds) >= MOST or (len(speeds) >= LEAST and now - began > SECONDS):
                break
            before = now
    except Diverged:
        raise UserError(
            "the loss is not finite within a few steps. Lower learning_rate, or check the data."
        ) from None
    trained = [p.numel() * p.element_size() for p in model.parameters() if p.requires_grad]
    epoch, rest = divmod(total, len(batches))
    tokens = epoch * sum(step_tokens) + sum(step_tokens[:rest])
    # a step that another program held up says nothing of the others
    slow, _, fast = quantiles(speeds, n=4, method="inclusive") if len(speeds) > 1 else speeds * 3
    return Probe(
        slow,
        fast,
        timed=len(speeds),
        steps_per_epoch=len(batches),
        steps=total,
        epoch_tokens=sum(step_tokens),
        tokens=tokens,
        predicted=predicted,
        trained=sum(trained),
        device=device,
    )
