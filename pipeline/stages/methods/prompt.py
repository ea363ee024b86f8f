"""Prompt tuning (Lester et al. 2021): embeddings of virtual tokens train, before every sequence (§7)."""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Annotated

from pipeline.project.palette import Look
from pipeline.project.params.schema import Count, Rate
from pipeline.project.params.sections import AdapterTraining
from pipeline.stages.methods import method

if TYPE_CHECKING:
    from pipeline.models.load import Base
    from pipeline.project.runner import Event, Job
    from pipeline.stages.finetune import Attached


class FinetunePrompt(AdapterTraining, frozen=True, kw_only=True):
    """The embeddings of virtual tokens train (Lester et al. 2021)."""

    learning_rate: Annotated[Rate, "of Adam, after warm-up"] = 3e-2
    virtual_tokens: Annotated[Count, "virtual tokens before every sequence; each takes one position"] = 20


STAGE = method(
    "prompt",
    __name__,
    FinetunePrompt,
    output="prompt",
    kind="adapter",
    summary="Prompt tuning",
    title="Prompt tuning",
    look=Look("#CC79A7", "◆", (0, (5, 1, 1, 1, 1, 1)), "\\\\"),
    order=5,
    pretrained={"precision": "bf16", "learning_rate": 3e-2, "virtual_tokens": 20},
)


def attach(job: Job, settings: FinetunePrompt, base: Base) -> Generator[Event, None, Attached]:
    from pipeline.stages.virtual_tokens import attach_virtual

    return (yield from attach_virtual(job, settings, base))
