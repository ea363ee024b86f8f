"""Prompt tuning (Lester et al. 2021): embeddings of virtual tokens train, before every sequence (§7)."""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Annotated

from pipeline.project.palette import Look
from pipeline.project.params.schema import Count, Rate
from pipeline.project.params.sections import AdapterTraining
from pipeline.project.stage_graph import Stage

if TYPE_CHECKING:
    from pipeline.models.load import Base
    from pipeline.project.runner import Event, Facts, Job
    from pipeline.stages.finetune import Attached


class FinetunePrompt(AdapterTraining, frozen=True, kw_only=True):
    """The embeddings of virtual tokens train (Lester et al. 2021)."""

    learning_rate: Annotated[Rate, "of Adam, after warm-up"] = 3e-2
    virtual_tokens: Annotated[Count, "virtual tokens before every sequence; each takes one position"] = 20


STAGE = Stage(
    "finetune_prompt",
    __name__,
    output="prompt",
    kind="adapter",
    method="prompt",
    settings=FinetunePrompt,
    needs=("expand_vocab",),
    data=("data",),
    summary="Prompt tuning",
    title="Prompt tuning",
    variant="prompt",
    look=Look("#CC79A7", "◆", (0, (5, 1, 1, 1, 1, 1)), "\\\\"),
    order=5,
    pretrained={"precision": "bf16", "learning_rate": 3e-2, "virtual_tokens": 20},
)


def run(job: Job) -> Generator[Event, None, Facts]:
    from pipeline.stages.finetune import finetune

    return finetune(job, attach)


def attach(job: Job, settings: FinetunePrompt, base: Base) -> Generator[Event, None, Attached]:
    from pipeline.stages.virtual_tokens import attach_virtual

    return (yield from attach_virtual(job, settings, base))
