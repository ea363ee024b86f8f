# ruff: noqa: ARG002 (most methods need only some of what a hook gets)
"""Layer freezing: the last blocks, embeddings and head train."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pipeline.calc.method import FinetuningMethod, TrainedBase, TrainedParts
from pipeline.calc.settings import option
from pipeline.errors import UserError
from pipeline.project.params.schema import Steps
from pipeline.project.params.sections import Training
from pipeline.project.stage_graph import Look
from pipeline.stages.methods import method

if TYPE_CHECKING:
    from pipeline.calc.architecture import Architecture
    from pipeline.models.base import CausalLM
    from pipeline.models.load import Base
    from pipeline.project.runner import Event, Job
    from pipeline.stages.finetune import Attached


class FinetuneFreeze(Training, frozen=True, kw_only=True):
    """Layer freezing: the last blocks, embeddings and head train."""

    PRETRAINED: ClassVar[Mapping[str, Any]] = {"learning_rate": 1e-4, "train_embeddings": False}

    last_blocks: Annotated[Steps, "number of last blocks that train"] = 1
    train_embeddings: Annotated[bool, "embeddings and head train too"] = True


STAGE = method(
    "freeze",
    __name__,
    FinetuneFreeze,
    output="layer_frozen",
    kind="checkpoint",
    summary="Train the last blocks and embeddings",
    title="Layer freezing",
    look=Look("#E69F00", "▲", "--", "//"),
    order=2,
)


def attach(_job: Job, settings: FinetuneFreeze, base: Base) -> Generator[Event, None, Attached]:
    from pipeline.stages.finetune import Attached

    yield from ()  # a generator, as every `attach`: this one has no events
    freeze(base.model, settings)
    return Attached(
        Freeze(last_blocks=settings.last_blocks, train_embeddings=settings.train_embeddings)
    )


def freeze(model: CausalLM, settings: FinetuneFreeze) -> None:
    """Freeze all but the last blocks and, if set, embeddings and head.

    Raises UserError if nothing would train.
    """
    blocks = list(model.blocks)
    if settings.last_blocks > len(blocks):
        raise UserError(
            f"finetune_freeze.last_blocks must be at most {len(blocks)}, the model's blocks, "
            f"got {settings.last_blocks}. Lower it."
        )
    if not settings.last_blocks and not settings.train_embeddings:
        raise UserError(
            "finetune_freeze leaves nothing to train. Increase last_blocks or set "
            "train_embeddings: true."
        )
    model.requires_grad_(False)
    for block in blocks[len(blocks) - settings.last_blocks :]:
        block.requires_grad_(True)
    for module in (model.embeddings, model.head):
        module.requires_grad_(settings.train_embeddings)


# What the calculator counts, and what it adds to a simulated step.


@dataclass(frozen=True)
class Freeze(FinetuningMethod):
    """The last blocks train, and with `train_embeddings` the embedding and the head."""

    name = "freeze"
    adapter = False

    last_blocks: int = option(1, "Number of last blocks to train (freeze).", least=0)
    train_embeddings: bool = option(
        True,
        "Train embedding and head too (freeze).",
        flags=("--train-embeddings/--freeze-embeddings",),
    )

    @property
    def title(self) -> str:
        blocks = f"freeze, last {self.last_blocks} blocks"
        return f"{blocks}, embeddings and head" if self.train_embeddings else blocks

    def refuse(self, model: Architecture) -> None:
        if not (self.last_blocks or self.train_embeddings):
            raise UserError(
                "freeze leaves nothing to train. Raise last-blocks, or train the embeddings."
            )

    def fitted(self, model: Architecture) -> Freeze:
        return replace(self, last_blocks=min(self.last_blocks, len(model.blocks)))

    def trained_parts(self, model: Architecture) -> TrainedParts:
        if self.last_blocks > len(model.blocks):
            raise UserError(
                f"last-blocks must be at most {len(model.blocks)}, the model's blocks, got "
                f"{self.last_blocks}."
            )
        blocks = model.blocks[len(model.blocks) - self.last_blocks :]
        parts = {"blocks": sum(block.parameters for block in blocks)}
        if self.train_embeddings:
            parts |= {"embeddings": model.embedding, "head": model.head}
        return TrainedParts(base=parts)

    def trained_base(self, model: Architecture) -> TrainedBase:
        return TrainedBase(len(model.blocks) - self.last_blocks, ends=self.train_embeddings)

    def matrices(self, model: Architecture) -> list[tuple[int, int]]:
        return model.matrices(len(model.blocks) - self.last_blocks)


COUNTED = Freeze()
