"""Preference optimization with LoRA: DPO, IPO, KTO, ORPO or SimPO, with one model in memory.

The losses are in training/preferences/losses.py.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pipeline.calc.method import FinetuningMethod
from pipeline.errors import UserError
from pipeline.project.params.schema import Rate, Share, Steps, Weight
from pipeline.project.params.sections import Data
from pipeline.project.stage_graph import Look
from pipeline.stages.methods import lora, method

if TYPE_CHECKING:
    from pipeline.calc.architecture import Architecture
    from pipeline.models.load import Base
    from pipeline.project.runner import Event, Facts, Job
    from pipeline.stages.finetune import Attached, Prepared


class FinetuneDpo(lora.FinetuneLora, frozen=True, kw_only=True):
    """LoRA trained on pairs of answers, of which one is better, instead of on answers."""

    NOT_SHARED: ClassVar[frozenset[str]] = frozenset({"window"})
    COMPARES: ClassVar[bool] = True
    PRETRAINED: ClassVar[Mapping[str, Any]] = {
        **lora.FinetuneLora.PRETRAINED,
        "learning_rate": 2e-5,
        "epochs": 1,
        "train_embeddings": "none",
    }

    data: Annotated[
        Data, "pairs {prompt, chosen, rejected}; for kto also answers {prompt, completion, label}"
    ] = "data/preferences.de.jsonl"
    learning_rate: Annotated[
        Rate, "of A and all else; lower than that of examples: answers are pushed away too"
    ] = 5e-4
    train_embeddings: Annotated[
        Literal["all", "new_rows", "none"],
        "embeddings and head: all of them, expand_vocab's new rows, or none",
    ] = "none"
    window: Annotated[Steps, "must be 0: an answer is compared as a whole"] = 0
    loss: Annotated[
        Literal["dpo", "ipo", "kto", "orpo", "simpo"],
        "dpo (Rafailov et al. 2023); ipo (Azar et al. 2023), which bounds the margin; kto "
        "(Ethayarajh et al. 2024), for single answers with labels; orpo (Hong et al. 2024) and "
        "simpo (Meng et al. 2024), without a reference",
    ] = "dpo"
    beta: Annotated[
        Rate,
        "weight of the reference: with a larger one answers stay nearer to it. simpo takes 2 to "
        "2.5, others 0.1",
    ] = 0.1
    label_smoothing: Annotated[
        Share,
        "share of the pairs that may be the wrong way round (cDPO, Mitchell 2023); for dpo and "
        "simpo",
    ] = 0.0
    rpo_alpha: Annotated[
        Weight,
        "weight of the chosen answers' own likelihood beside the loss (RPO, Pang et al. 2024); 0: "
        "off",
    ] = 0.0
    simpo_gamma: Annotated[Weight, "simpo: the margin that is wanted"] = 0.5
    reference: Annotated[
        Literal["start", "base"],
        "what is compared with: the adapter that init_from names, or the base without any",
    ] = "start"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window:
            raise UserError(
                f"window must be 0: preferences are of whole answers, got {self.window}. Remove it."
            )
        if self.label_smoothing and self.loss not in ("dpo", "simpo"):
            raise UserError(
                f"label_smoothing is for the losses dpo and simpo, not for {self.loss}. Set it to "
                "0."
            )
        if self.label_smoothing >= 0.5:
            raise UserError(
                f"label_smoothing must be below 0.5, got {self.label_smoothing:g}. Lower it."
            )
        if self.rpo_alpha and self.loss not in ("dpo", "ipo", "simpo"):
            raise UserError(
                f"rpo_alpha is for the losses dpo, ipo and simpo, not for {self.loss}. Set it to 0."
            )


STAGE = method(
    "dpo",
    __name__,
    FinetuneDpo,
    output="dpo_adapter",
    kind="adapter",
    data=lora.STAGE.data,
    summary="Train on preferences",
    title="DPO",
    look=Look("#56B4E9", "▶", (0, (5, 1, 1, 1)), "oo"),
    order=3.5,
)


def attach(job: Job, settings: FinetuneDpo, base: Base) -> Generator[Event, None, Attached]:
    """LoRA, new or of an earlier run, that is trained on preferences."""
    attached = yield from lora.attach(job, settings, base)
    return replace(attached, prepare=prepare)


def prepare(
    job: Job, settings: FinetuneDpo, base: Base, first: int
) -> Generator[Event, None, Prepared]:
    """The pairs, with their log-probabilities under the reference: the model now, or its base."""
    from pipeline.stages.finetune import Prepared
    from pipeline.training.parallel.sharding import is_sharded, shards_first
    from pipeline.training.preferences.batches import AnswerBatches
    from pipeline.training.preferences.data import build_answers, preferred, with_reference
    from pipeline.training.preferences.losses import WITH_REFERENCE, PreferencePath
    from pipeline.training.step import Evaluation

    answers = yield from build_answers(job, settings, settings.loss, base)
    as_base = settings.reference == "base" or not settings.init_from
    if settings.loss in WITH_REFERENCE:
        answers = yield from with_reference(job, base, answers, as_base)
    training, held_out = answers
    batches = AnswerBatches.of(training, settings, first)
    path = PreferencePath(base.model, settings)
    if held_out is None:
        return Prepared(batches, None, path)
    in_order = AnswerBatches.held_out(held_out, settings)
    evaluation = Evaluation.of(settings, in_order, len(batches))
    # KTO's answers are no pairs, and neither a trial nor a sharded run has these facts
    if settings.loss == "kto" or not job.key or shards_first(job, base.model):
        return Prepared(batches, evaluation, path)
    # under the model as it is now, which may be the reference
    known = None if settings.init_from and as_base else held_out.reference
    before = preferred(base.model, held_out, known)

    def facts() -> Facts:
        if is_sharded(base.model):
            return {}
        return {"preferences": {"before": before, "after": preferred(base.model, held_out)}}

    return Prepared(batches, evaluation, path, facts)


class Dpo(lora.Lora):
    """LoRA on pairs of answers, with one copy of the model in memory.

    The reference is the same model without the adapter, or before training: its log-probabilities
    are computed once.
    """

    name = "dpo"
    columns = ("DPO", "DPO NF4")
    aliases = {}  # noqa: RUF012 (none of LoRA's)
    step = {"loss": "chunked"}  # noqa: RUF012 (as the trainer computes it)
    answers = 2

    @property
    def title(self) -> str:
        return f"DPO, {super().title}"

    def notes(self, model: Architecture) -> list[str]:
        return [
            *super().notes(model),
            "a batch of n pairs has 2n sequences; no second model is in memory",
        ]


COUNTED: FinetuningMethod = Dpo()
