"""Prefix tuning (Li & Liang 2021): keys and values of virtual tokens train in every block."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pipeline.calc.method import FinetuningMethod, TrainedParts
from pipeline.calc.settings import option
from pipeline.errors import UserError
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


class FinetunePrefix(AdapterTraining, frozen=True, kw_only=True):
    """Keys and values of virtual tokens in every block train (Li & Liang 2021)."""

    PRETRAINED: ClassVar[Mapping[str, Any]] = {"learning_rate": 1e-2, "virtual_tokens": 20}

    learning_rate: Annotated[Rate, "of the optimizer, after warm-up"] = 1e-2
    virtual_tokens: Annotated[
        Count, "virtual tokens before every sequence; each takes one position"
    ] = 20


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
)


def attach(job: Job, settings: FinetunePrefix, base: Base) -> Generator[Event, None, Attached]:
    from pipeline.models.device import placed_for_inference
    from pipeline.stages.finetune import attach_virtual

    attached = yield from attach_virtual(job, settings, base, Prefix(settings.virtual_tokens))
    if settings.gradient_checkpointing != "none":
        with placed_for_inference(base.model):
            works = base.model.supports_prefix  # runs the model with a prefix, to try it
        if not works:
            raise UserError(
                "finetune_prefix.gradient_checkpointing must be none, got "
                f"{settings.gradient_checkpointing}: prefix tuning does not work with gradient "
                "checkpointing on this model. Set it to none."
            )
    return attached


# What the calculator counts, and what it adds to a simulated step.


@dataclass(frozen=True)
class Prefix(FinetuningMethod):
    """Trained keys and values before those of every sequence, in every block."""

    name = "prefix"
    short_attention = False

    virtual_tokens: int = option(20, "Number of virtual tokens (prefix, prompt).", least=1)

    @property
    def title(self) -> str:
        return f"prefix tuning, {self.virtual_tokens} virtual tokens"

    def refuse(self, model: Architecture) -> None:
        for index, block in enumerate(model.blocks):
            if block.kind != "attention" or block.heads is not None:
                kind = {"latent": "latent attention", "delta": "a gated delta net"}.get(
                    block.kind, "heads of its own size"
                )
                raise UserError(
                    "prefix tuning needs the same keys and values in every block, but block "
                    f"{index} of this model has {kind}. Use --method lora or prompt."
                )

    def trained_parts(self, model: Architecture) -> TrainedParts:
        return TrainedParts({"prefix": len(model.blocks) * self.block_parameters(model)})

    def block_parameters(self, model: Architecture) -> int:
        return 2 * self.virtual_tokens * model.kv_heads * model.head_size

    def extend_keys(self, ops: Ops, x: Value) -> Value:
        """The virtual tokens' keys and a copy of x: (B, virtual + T, kv_heads · head_size)."""
        size = self.virtual_tokens * ops.model.kv_heads * ops.model.head_size
        added = [ops.adapter_weight(size)]
        return ops.tape.op(x, elements=x.elements + ops.run.virtual_places * size, weights=added)


COUNTED = Prefix()
