"""finetune_full, finetune_freeze, finetune_lora: three ways to teach the same sentences (the document's §9)."""

from collections.abc import Generator, Iterator
from pathlib import Path

import torch

from pipeline.adapters.attach import adapter_layers, attach, short_targets
from pipeline.adapters.peft_format import save_adapter
from pipeline.adapters.spec import AdapterSpec
from pipeline.adapters.targets import resolve
from pipeline.artifact import read_manifest
from pipeline.bases import base_fingerprint
from pipeline.calc.settings import FULL, Method
from pipeline.errors import UserError
from pipeline.models.base import DTYPES, Base, count, load_base, stored_precision
from pipeline.models.causal import CausalLM
from pipeline.models.skeleton import skeleton
from pipeline.params import FinetuneFreeze, FinetuneFull, FinetuneLora
from pipeline.runner import Event, Facts, Job, Note
from pipeline.training.loop import Task, train
from pipeline.training.retain import Retain, retain_of
from pipeline.training.task import data_of, save_checkpoint, save_curve


def finetune(job: Job, sharded: bool | None = None) -> Generator[Event, None, Facts]:
    """The expanded base, made trainable as the method says, trained, and saved as checkpoint or adapter.

    `sharded` as in `Task`. Raises UserError, and what `train` does.
    """
    settings = job.project.section(job.stage)
    assert isinstance(settings, FinetuneFull | FinetuneFreeze | FinetuneLora)
    folder = job.artifact("expand_vocab")
    trust = job.project.params.pretrain.trust_remote_code
    kept = settings.quantization if isinstance(settings, FinetuneLora) else "none"
    base = load_base(folder, settings.precision, trust, kept)
    model = base.model
    batches, evaluation = yield from data_of(job, settings, base)
    torch.manual_seed(settings.seed)
    spec, retain = None, None
    if isinstance(settings, FinetuneLora):
        spec = lora_spec(model, settings, new_rows(folder))
        texts = yield from retain_of(job, settings, base)  # completed, where they are to be, by the base as it is
        attach(model, spec, DTYPES[settings.adapter_precision])
        yield from _note_wide_rank(model, spec)
        retain = None if texts is None else Retain(model, texts, settings)
    elif isinstance(settings, FinetuneFreeze):
        freeze(model, settings)
    trainable = count(model)["trainable"]
    task = Task(model, batches, settings, method_of(settings, spec), evaluation, retain, sharded if spec else False)
    optimizer = yield from train(job, task)
    if spec is None:
        stored = stored_precision(folder) == settings.precision
        return save_checkpoint(job, base, optimizer, trained_from=None if stored else folder)
    total = count(skeleton(folder, trust))["total"]  # what is kept in few bits is no parameter
    return _save_adapter(job, base, spec, folder) | {"parameters": {"total": total, "trainable": trainable}}


def method_of(settings: FinetuneFull | FinetuneFreeze | FinetuneLora, spec: AdapterSpec | None) -> Method:
    """What trains, as the calculator says it."""
    if isinstance(settings, FinetuneFreeze):
        return Method("freeze", last_blocks=settings.last_blocks, train_embeddings=settings.train_embeddings)
    if spec is None or isinstance(settings, FinetuneFull):
        return FULL
    rows = max((len(ids) for ids in spec.rows.values()), default=0)
    ends = "all" if spec.saved else "new_rows" if rows else "none"
    targets = (spec.targets,) if isinstance(spec.targets, str) else spec.targets
    return Method("lora", spec.rank, spec.alpha, targets, embeddings=ends, new_rows=rows)


def freeze(model: CausalLM, settings: FinetuneFreeze) -> None:
    """Only the last blocks, and embeddings and head if asked, train. Raises UserError if nothing would."""
    blocks = list(model.blocks)
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
    for end in (model.embeddings, model.head):
        end.requires_grad_(settings.train_embeddings)


def lora_spec(model: CausalLM, settings: FinetuneLora, new: tuple[int, ...]) -> AdapterSpec:
    """The settings, resolved against this model."""
    rows = model.ends[: 1 if model.shape.tied else 2]
    return AdapterSpec(
        rank=settings.rank,
        alpha=settings.alpha,
        targets=short_targets(model, resolve(model, settings.target_modules)),
        saved=model.ends if settings.train_embeddings == "all" else (),
        rows=dict.fromkeys(rows, new) if settings.train_embeddings == "new_rows" and new else {},
    )


def _note_wide_rank(model: CausalLM, spec: AdapterSpec) -> Iterator[Event]:
    """A rank above a matrix's smaller side costs parameters and expresses nothing more (§2.4)."""
    for name, layer in adapter_layers(model):
        widest = min(layer.lora_A.shape[1], layer.lora_B.shape[0])
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
    tokenizer.save(job.out, model.shape.positions)
    save_curve(job)
    return {"base": base_fingerprint(folder)}
