"""finetune_full, finetune_freeze, finetune_lora: three ways to teach the same sentences (the document's §9)."""

from collections.abc import Generator, Iterator
from pathlib import Path

import torch

from pipeline.adapters.attach import ENDS, AdapterSpec, adapter_layers, attach, short_targets
from pipeline.adapters.peft_format import save_adapter
from pipeline.adapters.targets import resolve
from pipeline.artifact import base_fingerprint, read_manifest
from pipeline.calc.settings import FULL, Method
from pipeline.errors import UserError
from pipeline.models.base import Base, count, load_base
from pipeline.models.minigpt import MiniGPT
from pipeline.params import FinetuneFreeze, FinetuneFull, FinetuneLora
from pipeline.runner import Event, Facts, Job, Note
from pipeline.training.loop import train
from pipeline.training.task import batches_of, examples_of, save_checkpoint, save_curve


def finetune(job: Job) -> Generator[Event, None, Facts]:
    """The expanded base, made trainable as the method says, trained, and saved as checkpoint or adapter."""
    settings = job.project.section(job.stage)
    assert isinstance(settings, FinetuneFull | FinetuneFreeze | FinetuneLora)
    folder = job.artifact("expand_vocab")
    base = load_base(folder)
    model, tokenizer = base
    batches = batches_of(examples_of(job, settings), settings, tokenizer, model.config.max_positions)
    total = count(model)["total"]
    torch.manual_seed(settings.seed)
    spec = None
    if isinstance(settings, FinetuneLora):
        spec = lora_spec(model, settings, new_rows(folder))
        attach(model, spec)
        yield from _note_wide_rank(model, spec)
    elif isinstance(settings, FinetuneFreeze):
        freeze(model, settings)
    trainable = count(model)["trainable"]
    yield from train(job, model, batches, settings, method_of(settings, spec))
    if spec is None:
        return save_checkpoint(job, base)
    return _save_adapter(job, base, spec, folder) | {"parameters": {"total": total, "trainable": trainable}}


def method_of(settings: FinetuneFull | FinetuneFreeze | FinetuneLora, spec: AdapterSpec | None) -> Method:
    """What trains, as the calculator says it."""
    if isinstance(settings, FinetuneFreeze):
        return Method("freeze", last_blocks=settings.last_blocks, train_embeddings=settings.train_embeddings)
    if spec is None or isinstance(settings, FinetuneFull):
        return FULL
    rows = max((len(ids) for ids in spec.rows.values()), default=0)
    ends = "all" if spec.saved else "new_rows" if rows else "none"
    return Method("lora", spec.rank, spec.alpha, spec.targets, embeddings=ends, new_rows=rows)


def freeze(model: MiniGPT, settings: FinetuneFreeze) -> None:
    """Only the last blocks, and embeddings and head if asked, train. Raises UserError if nothing would."""
    blocks = list(model.decoder.layers)
    if settings.last_blocks > len(blocks):
        raise UserError(
            f"finetune_freeze.last_blocks must be at most {len(blocks)}, the model's blocks, "
            f"got {settings.last_blocks}. Edit params.yaml."
        )
    if not settings.last_blocks and not settings.train_embeddings:
        raise UserError("finetune_freeze leaves nothing to train. Raise last_blocks or set train_embeddings: true.")
    model.requires_grad_(False)
    for block in blocks[len(blocks) - settings.last_blocks :]:
        block.requires_grad_(True)
    model.embeddings.requires_grad_(settings.train_embeddings)
    model.lm_head.requires_grad_(settings.train_embeddings)


def lora_spec(model: MiniGPT, settings: FinetuneLora, new: tuple[int, ...]) -> AdapterSpec:
    """The settings, resolved against this model."""
    tied = model.config.tie_embeddings
    return AdapterSpec(
        rank=settings.rank,
        alpha=settings.alpha,
        targets=short_targets(model, resolve(model, settings.target_modules)),
        saved=ENDS if settings.train_embeddings == "all" else (),
        rows=dict.fromkeys(ENDS[: 1 if tied else 2], new) if settings.train_embeddings == "new_rows" and new else {},
    )


def _note_wide_rank(model: MiniGPT, spec: AdapterSpec) -> Iterator[Event]:
    """A rank above a matrix's smaller side costs parameters and expresses nothing more (§2.4)."""
    for name, layer in adapter_layers(model):
        widest = min(layer.base.weight.shape)
        if spec.rank > widest:
            yield Note(f"finetune_lora.rank {spec.rank} is more than {name} can use: its rank is at most {widest}")
            return


def new_rows(expanded: Path) -> tuple[int, ...]:
    """Ids of the rows that expand_vocab added."""
    start, stop = read_manifest(expanded).get("new_rows", (0, 0))
    return tuple(range(start, stop))


def _save_adapter(job: Job, base: Base, spec: AdapterSpec, folder: Path) -> Facts:
    model, tokenizer = base
    save_adapter(job.out, model, spec, f"artifacts/{folder.name}")
    tokenizer.save(job.out, model.config.max_positions)
    save_curve(job)
    return {"base": base_fingerprint(folder)}
