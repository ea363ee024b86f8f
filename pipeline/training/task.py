"""What a run trains: a model, its learners, and the path by which they read batches."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from pipeline.calc.method import FinetuningMethod
from pipeline.models.base import CausalLM, Checkpointing
from pipeline.models.device import device_for
from pipeline.models.kernels import uses_cpu_kernels
from pipeline.models.load import Base
from pipeline.project.params.sections import Training
from pipeline.project.runner import Facts
from pipeline.training.batches import Batches
from pipeline.training.optimizer import FlatOptimizer
from pipeline.training.step import Evaluation, Learner, LossPath
from pipeline.training.update_rules import rule_of

if TYPE_CHECKING:  # a run without it does not import it
    from pipeline.training.data import Prompts
    from pipeline.training.retention import RetentionLoss


@dataclass(frozen=True)
class TrainingTask:
    """A model and its learners, which take the same number of steps on data of their own order."""

    model: CausalLM
    learners: Sequence[Learner]
    path: LossPath
    evaluation: Evaluation | None = None
    # tells the memory calculator which parameters train; None: it does not know them
    method: FinetuningMethod | None = None
    # whether the frozen weights are sharded over the ranks; None: only if one device is too small
    sharded: bool | None = None
    # what to do when memory runs out; by default what the calculator suggests
    less_memory: str = ""
    # the optimizer's, of the run that this one continues
    state: Mapping[str, Tensor] | None = None
    # name → outcome of the adapters of a sweep's earlier passes, whose logs stay
    earlier: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    # what the learners answer while they train
    prompts: "Prompts | None" = None
    # held-out examples that they answer at each evaluation
    questions: "Prompts | None" = None

    @classmethod
    def of_one(
        cls,
        model: CausalLM,
        batches: Batches,
        settings: Training,
        method: FinetuningMethod | None,
        evaluation: Evaluation | None = None,
        retain: "RetentionLoss | None" = None,
        **more: Any,
    ) -> "TrainingTask":
        """The task of one learner: whatever parameters of `model` require a gradient."""
        learner = Learner(settings, batches, retain)
        return cls(model, [learner], LossPath(model), evaluation, method, **more)

    @property
    def settings(self) -> Training:
        """The first learner's: epochs, batches, evaluation and checkpointing are those of all."""
        return self.learners[0].settings

    @property
    def batches(self) -> Batches:
        return self.learners[0].batches

    @property
    def total(self) -> int:
        """Number of steps without early stopping."""
        return self.settings.total_steps(len(self.batches))

    @property
    def live(self) -> list[int]:
        """The learners that were not stopped."""
        return [n for n, learner in enumerate(self.learners) if learner.stopped is None]


class TrainingSetup(NamedTuple):
    """A model that is ready to train; `save` then writes the artifact to the job's folder."""

    base: Base
    task: TrainingTask
    save: Callable[[FlatOptimizer], Facts]


def build_optimizer(model: nn.Module, *settings: Training) -> FlatOptimizer:
    """The optimizer of a model's learners, given the settings of each."""
    ratios = [getattr(section, "loraplus_ratio", 1.0) for section in settings]
    decays = [section.weight_decay for section in settings]
    scaled, rule = settings[0].precision == "fp16", rule_of(settings[0].optimizer)
    return FlatOptimizer(model, scaled, ratios, rule, decays)


def prepare_model(
    model: CausalLM, checkpointing: Checkpointing, compiles: bool = False
) -> torch.device:
    """Apply checkpointing and faster kernels; returns the device to train on, to move it to."""
    device = device_for(model)
    model.checkpoint_blocks(checkpointing)
    if uses_cpu_kernels(device):
        model.prepare_cpu_training()
    elif not compiles:  # the compiler fuses the same parts
        model.prepare_accelerator_training(device)
    if compiles:
        # torch's compiler takes 1.4 seconds to import
        from pipeline.models.kernels.compiled import compile_blocks

        compile_blocks(model)
    return device
