# ruff: noqa: ARG002 (most methods need only some of what a hook gets)
"""Full fine-tuning: every parameter trains."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pipeline.calc.method import FinetuningMethod, TrainedBase, TrainedParts
from pipeline.project.params.sections import Training
from pipeline.project.stage_graph import Look
from pipeline.stages.methods import method

if TYPE_CHECKING:
    from pipeline.calc.architecture import Architecture
    from pipeline.models.load import Base
    from pipeline.project.runner import Event, Job
    from pipeline.stages.finetune import Attached


class FinetuneFull(Training, frozen=True, kw_only=True):
    """Every parameter trains."""

    PRETRAINED: ClassVar[Mapping[str, Any]] = {"learning_rate": 2e-5}


STAGE = method(
    "full",
    __name__,
    FinetuneFull,
    output="full_finetuned",
    kind="checkpoint",
    summary="Train every parameter",
    title="Full fine-tuning",
    look=Look("#D55E00", "●"),
    order=1,
)


def attach(_job: Job, _settings: FinetuneFull, _base: Base) -> Generator[Event, None, Attached]:
    """Nothing to attach: all parameters of the base train already."""
    from pipeline.stages.finetune import Attached

    yield from ()
    return Attached(COUNTED)


# What the calculator counts, and what it adds to a simulated step.


class Full(FinetuningMethod):
    """Every weight of the base trains."""

    name = "full"
    adapter = False
    title = "full fine-tuning"

    def trained_parts(self, model: Architecture) -> TrainedParts:
        return TrainedParts(base={"all": model.total})

    def trained_base(self, model: Architecture) -> TrainedBase:
        return TrainedBase(0, ends=True, rest=True)

    def matrices(self, model: Architecture) -> list[tuple[int, int]]:
        outside = [(linear.outputs, linear.inputs) for linear in model.outside]
        return model.matrices() + outside


COUNTED = Full()
