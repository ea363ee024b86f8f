"""Prompt and prefix tuning: only virtual tokens before every sequence train (the document's §7)."""

from collections.abc import Generator
from pathlib import Path

from pipeline.adapters.peft.virtual_tokens import VirtualSpec, attach_virtual_tokens, cast_virtual_tokens, save_virtual
from pipeline.calc.settings import FinetuningMethod
from pipeline.errors import UserError
from pipeline.files.base_model import base_fingerprint
from pipeline.models.load import DTYPES, Base, count, skeleton
from pipeline.project.params.sections import FinetuneVirtual
from pipeline.project.runner import Event, Facts, Job
from pipeline.training.data import prepare_data, save_curve
from pipeline.training.loop import TrainingSetup, TrainingTask
from pipeline.training.optimizer import FlatAdam


def virtual_learner(
    job: Job, settings: FinetuneVirtual, base: Base, folder: Path
) -> Generator[Event, None, TrainingSetup]:
    """Set up training of virtual tokens on `base`, saved in PEFT's format; `folder` is the base's. Raises UserError."""
    model, tokenizer = base
    spec = VirtualSpec(job.stage.method, settings.virtual_tokens)
    attach_virtual_tokens(model, spec, len(tokenizer), settings.seed)
    assert model.virtual is not None
    cast_virtual_tokens(model.virtual, DTYPES[settings.adapter_precision])
    if spec.kind == "prefix" and settings.gradient_checkpointing != "none" and not model.supports_prefix:
        raise UserError(
            f"{job.stage.name}.gradient_checkpointing must be none, got {settings.gradient_checkpointing}: "
            "prefix tuning does not work with gradient checkpointing on this model. Set it to none."
        )
    batches, evaluation = yield from prepare_data(job, settings, base)
    trainable = count(model)["trainable"]
    method = FinetuningMethod(spec.kind, virtual_tokens=spec.tokens)

    def save(_: FlatAdam) -> Facts:
        save_virtual(job.out, model, f"artifacts/{folder.name}")
        tokenizer.save(job.out, model.max_length)
        save_curve(job)
        total = count(skeleton(folder, job.project.params.pretrain.trust_remote_code))["total"]
        return {"base": base_fingerprint(folder), "parameters": {"total": total, "trainable": trainable}}

    return TrainingSetup(base, TrainingTask.of_one(model, batches, settings, method, evaluation, sharded=False), save)
