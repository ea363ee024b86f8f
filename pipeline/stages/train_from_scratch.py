"""train_from_scratch: the expanded base's shape, random weights, trained on old and new sentences (§1, §7)."""

from collections.abc import Generator

import torch

from pipeline.calc.settings import FULL
from pipeline.models.load import Base, load_base, stored_precision, untrained
from pipeline.project.runner import Event, Facts, Job
from pipeline.training.data import prepare_data, save_checkpoint
from pipeline.training.loop import TrainingTask, train


def train_from_scratch(job: Job) -> Generator[Event, None, Facts]:
    """Random weights → every parameter trained on all files → a checkpoint in the bits that the base is stored in.

    Raises UserError, and what `train` does.
    """
    settings = job.project.params.train_from_scratch
    folder = job.artifact("expand_vocab")
    base = anew(job, settings.precision)
    batches, evaluation = yield from prepare_data(job, settings, base)
    optimizer = yield from train(job, TrainingTask(base.model, batches, settings, FULL, evaluation))
    stored = None if stored_precision(folder) == settings.precision else anew(job, None).model
    return save_checkpoint(job, base, optimizer, trained_from=stored)


def anew(job: Job, precision: str | None) -> Base:
    """The expanded base with its tokenizer, in `precision` or its own, as if it had never learned anything.

    Nothing of its weights stays; those that take their place are drawn in fp32, so that the seed alone decides them.
    """
    folder, trust = job.project.artifact("expand_vocab"), job.project.params.pretrain.trust_remote_code
    base = load_base(folder, precision, trust)
    torch.manual_seed(job.project.params.train_from_scratch.seed)
    base.model.load_state_dict(untrained(folder, trust).state_dict())
    return base
