"""Prefix tuning (Li & Liang 2021): keys and values of virtual tokens train, in front of every block's own (§7)."""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Annotated

from pipeline.errors import UserError
from pipeline.project.palette import Look
from pipeline.project.params.schema import Count, Rate
from pipeline.project.params.sections import AdapterTraining
from pipeline.stages.methods import method

if TYPE_CHECKING:
    from pipeline.models.load import Base
    from pipeline.project.runner import Event, Job
    from pipeline.stages.finetune import Attached


class FinetunePrefix(AdapterTraining, frozen=True, kw_only=True):
    """Keys and values of virtual tokens in every block train (Li & Liang 2021)."""

    learning_rate: Annotated[Rate, "of Adam, after warm-up"] = 1e-2
    virtual_tokens: Annotated[Count, "virtual tokens before every sequence; each takes one position"] = 20


STAGE = method(
    "prefix",
    __name__,
    FinetunePrefix,
    output="prefix",
    kind="adapter",
    summary="Prefix tuning",
    title="Prefix tuning",
    look=Look("#009E73", "◈", (0, (1, 1)), "||"),
    order=4,
    pretrained={"precision": "bf16", "learning_rate": 1e-2, "virtual_tokens": 20},
)


def attach(job: Job, settings: FinetunePrefix, base: Base) -> Generator[Event, None, Attached]:
    from pipeline.stages.virtual_tokens import attach_virtual

    attached = yield from attach_virtual(job, settings, base)
    if settings.gradient_checkpointing != "none" and not base.model.supports_prefix:
        raise UserError(
            f"finetune_prefix.gradient_checkpointing must be none, got {settings.gradient_checkpointing}: "
            "prefix tuning does not work with gradient checkpointing on this model. Set it to none."
        )
    return attached
