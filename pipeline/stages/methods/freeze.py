"""Layer freezing: the last blocks, embeddings and head train (the document's §9.3)."""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Annotated

from pipeline.errors import UserError
from pipeline.project.palette import Look
from pipeline.project.params.schema import Steps
from pipeline.project.params.sections import Training
from pipeline.stages.methods import method

if TYPE_CHECKING:
    from pipeline.models.base import CausalLM
    from pipeline.models.load import Base
    from pipeline.project.runner import Event, Job
    from pipeline.stages.finetune import Attached


class FinetuneFreeze(Training, frozen=True, kw_only=True):
    """Layer freezing: the last blocks, embeddings and head train (§9.3)."""

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
    pretrained={"learning_rate": 1e-4, "train_embeddings": False},
)


def attach(_job: Job, settings: FinetuneFreeze, base: Base) -> Generator[Event, None, Attached]:
    from pipeline.calc.settings import FinetuningMethod
    from pipeline.stages.finetune import Attached

    yield from ()
    freeze(base.model, settings)
    counted = FinetuningMethod("freeze", last_blocks=settings.last_blocks, train_embeddings=settings.train_embeddings)
    return Attached(counted)


def freeze(model: CausalLM, settings: FinetuneFreeze) -> None:
    """Freeze all but the last blocks and, if set, embeddings and head. Raises UserError if nothing would train."""
    blocks = list(model.blocks)
    if settings.last_blocks > len(blocks):
        raise UserError(
            f"finetune_freeze.last_blocks must be at most {len(blocks)}, the model's blocks, "
            f"got {settings.last_blocks}. Lower it."
        )
    if not settings.last_blocks and not settings.train_embeddings:
        raise UserError("finetune_freeze leaves nothing to train. Increase last_blocks or set train_embeddings: true.")
    model.requires_grad_(False)
    for block in blocks[len(blocks) - settings.last_blocks :]:
        block.requires_grad_(True)
    for module in (model.embeddings, model.head):
        module.requires_grad_(settings.train_embeddings)
