"""Full fine-tuning: every parameter trains (the document's §1 and §9)."""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING

from pipeline.project.palette import Look
from pipeline.project.params.sections import Training
from pipeline.project.stage_graph import Stage

if TYPE_CHECKING:
    from pipeline.models.load import Base
    from pipeline.project.runner import Event, Facts, Job
    from pipeline.stages.finetune import Attached


class FinetuneFull(Training, frozen=True, kw_only=True):
    """Every parameter trains."""


STAGE = Stage(
    "finetune_full",
    __name__,
    output="full_finetuned",
    kind="checkpoint",
    method="full",
    settings=FinetuneFull,
    needs=("expand_vocab",),
    data=("data",),
    summary="Train every parameter",
    title="Full fine-tuning",
    variant="full",
    look=Look("#D55E00", "●"),
    order=1,
    pretrained={"learning_rate": 2e-5},
)


def run(job: Job) -> Generator[Event, None, Facts]:
    from pipeline.stages.finetune import finetune

    return finetune(job, attach)


def attach(_job: Job, _settings: FinetuneFull, _base: Base) -> Generator[Event, None, Attached]:
    """Nothing is added, and all of it trains already."""
    from pipeline.calc.settings import FULL
    from pipeline.stages.finetune import Attached

    yield from ()
    return Attached(FULL)
