# ruff: noqa: ARG002 (most methods need only some of what a hook gets)
"""Prompt tuning (Lester et al. 2021): embeddings of virtual tokens before every sequence train."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pipeline.calc.method import FinetuningMethod, TrainedParts
from pipeline.calc.settings import option
from pipeline.project.params.schema import Count, Rate
from pipeline.project.params.sections import AdapterTraining
from pipeline.project.stage_graph import Look
from pipeline.stages.methods import method

if TYPE_CHECKING:
    from pipeline.calc.architecture import Architecture
    from pipeline.calc.tape import Ops, Value
    from pipeline.models.load import Base
    from pipeline.project.runner import Event, Job
    from pipeline.stages.finetune import Attached


class FinetunePrompt(AdapterTraining, frozen=True, kw_only=True):
    """The embeddings of virtual tokens train (Lester et al. 2021)."""

    PRETRAINED: ClassVar[Mapping[str, Any]] = {"learning_rate": 3e-2, "virtual_tokens": 20}

    learning_rate: Annotated[Rate, "of the optimizer, after warm-up"] = 3e-2
    virtual_tokens: Annotated[
        Count, "virtual tokens before every sequence; each takes one position"
    ] = 20


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
)


def attach(job: Job, settings: FinetunePrompt, base: Base) -> Generator[Event, None, Attached]:
    from pipeline.stages.finetune import attach_virtual

    return (yield from attach_virtual(job, settings, base, Prompt(settings.virtual_tokens)))


# What the calculator counts, and what it adds to a simulated step.


@dataclass(frozen=True)
class Prompt(FinetuningMethod):
    """Trained embeddings before every sequence (Lester et al. 2021)."""

    name = "prompt"

    virtual_tokens: int = option(20, "Number of virtual tokens (prefix, prompt).", least=1)

    @property
    def title(self) -> str:
        return f"prompt tuning, {self.virtual_tokens} virtual tokens"

    @property
    def positions(self) -> int:
        return self.virtual_tokens

    def trained_parts(self, model: Architecture) -> TrainedParts:
        return TrainedParts({"prompt": self.virtual_tokens * model.embedding_width})

    def embed(self, ops: Ops, x: Value, ids: Value) -> Value:
        """(B, virtual + T, D): the same virtual tokens before every sequence."""
        width = ops.model.embedding_width
        table = ops.adapter_weight(self.virtual_tokens * width)
        return ops.tape.op(x, elements=ops.n * width, weights=[table])


COUNTED = Prompt()
