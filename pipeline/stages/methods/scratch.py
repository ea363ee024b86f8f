"""Training from scratch: the expanded base's shape, from random weights, on old and new sentences."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pipeline.project.params.schema import Count
from pipeline.project.params.sections import Data, Training
from pipeline.project.stage_graph import Look, Stage
from pipeline.stages.methods.full import COUNTED as FULL

if TYPE_CHECKING:
    from pipeline.models.base import CausalLM
    from pipeline.models.load import Base
    from pipeline.project.runner import Event, Facts, Job


class TrainFromScratch(Training, frozen=True, kw_only=True):
    """A model of the base's shape with random weights learns old and new sentences together.

    60 epochs of both files are 1,200 steps: as many as pretraining and full fine-tuning take one
    after the other.
    """

    # from random weights: enough to run the stage, not to learn
    PRETRAINED: ClassVar[Mapping[str, Any]] = {"epochs": 1}

    data: Annotated[Data, "old and new sentences, whose words expand_vocab knows"] = (
        "data/pretrain.de.txt",
        "data/finetune.de.txt",
    )
    epochs: Annotated[Count, "times that every sentence is seen"] = 60


STAGE = Stage(
    "train_from_scratch",
    __name__,
    output="from_scratch",
    kind="checkpoint",
    method="scratch",
    settings=TrainFromScratch,
    needs=("expand_vocab",),
    data=("data", "eval_data"),
    summary="Train a model of the base's shape from random weights, on old and new data",
    title="Training from scratch",
    variant="scratch",
    look=Look("#56B4E9", "▼", ":", ".."),
    order=0,
)


def run(job: Job) -> Generator[Event, None, Facts]:
    """Train every parameter from random weights on all files → a checkpoint in the base's stored
    precision.

    Raises UserError, and whatever `train` raises.
    """
    from pipeline.models.load import stored_precision
    from pipeline.training.data import asked_while_training, prepare_data
    from pipeline.training.loop import train
    from pipeline.training.saving import finish, save_checkpoint
    from pipeline.training.task import TrainingTask

    settings = job.project.section(job.stage)
    folder = job.artifact("expand_vocab")
    base = untrained_base(job, settings.precision)
    batches, evaluation = yield from prepare_data(job, settings, base)
    asked = asked_while_training(job, settings, base)

    def as_stored() -> CausalLM:
        return untrained_base(job, None).model

    converted = stored_precision(folder) != settings.precision
    save = partial(save_checkpoint, base=base, trained_from=as_stored if converted else None)
    task = TrainingTask.of_one(base.model, batches, settings, FULL, evaluation, save=save, **asked)
    optimizer = yield from train(job, task)
    return finish(job, task, optimizer)


def untrained_base(job: Job, precision: str | None) -> Base:
    """The expanded base's architecture and tokenizer with random weights, in `precision` or the
    base's own.

    Weights are drawn in fp32, so that they depend only on the seed.
    """
    import torch

    from pipeline.models.load import load_base, untrained

    folder, trust = (
        job.project.artifact("expand_vocab"),
        job.project.params.origin.trust_remote_code,
    )
    base = load_base(folder, precision, trust)
    torch.manual_seed(job.project.section(job.stage).seed)
    base.model.load_state_dict(untrained(folder, trust).state_dict())
    return base
