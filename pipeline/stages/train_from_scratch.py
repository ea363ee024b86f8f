"""train_from_scratch: the expanded base's shape, trained from random weights on old and new sentences (§1, §7)."""

from collections.abc import Generator

import torch

from pipeline.calc.settings import FULL
from pipeline.models.load import Base, load_base, stored_precision, untrained
from pipeline.project.runner import Event, Facts, Job
from pipeline.training.data import prepare_data, save_checkpoint
from pipeline.training.loop import TrainingTask, train


def train_from_scratch(job: Job) -> Generator[Event, None, Facts]:
    """Train every parameter from random weights on all files → a checkpoint in the base's stored precision.

    Raises UserError, and whatever `train` raises.
    """
    settings = job.project.params.train_from_scratch
    folder = job.artifact("expand_vocab")
    base = untrained_base(job, settings.precision)
    batches, evaluation = yield from prepare_data(job, settings, base)
    optimizer = yield from train(job, TrainingTask.of_one(base.model, batches, settings, FULL, evaluation))
    stored = None if stored_precision(folder) == settings.precision else untrained_base(job, None).model
    return save_checkpoint(job, base, optimizer, trained_from=stored)


def untrained_base(job: Job, precision: str | None) -> Base:
    """The expanded base's architecture and tokenizer with random weights, in `precision` or the base's own.

    Weights are drawn in fp32, so that they depend only on the seed.
    """
    folder, trust = job.project.artifact("expand_vocab"), job.project.params.pretrain.trust_remote_code
    base = load_base(folder, precision, trust)
    torch.manual_seed(job.project.params.train_from_scratch.seed)
    base.model.load_state_dict(untrained(folder, trust).state_dict())
    return base
