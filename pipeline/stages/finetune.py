"""finetune_full, _freeze, _lora, _prefix, _prompt: five ways to teach the same sentences (the document's §7 and §9)."""

from collections.abc import Generator, Iterator, Sequence
from math import prod
from pathlib import Path

import torch

from pipeline.adapters.attach import adapter_layers, attach, resolve, short_targets
from pipeline.adapters.config import WEIGHTS, AdapterSpec
from pipeline.adapters.peft.save import save_adapter, stored_spec
from pipeline.calc.settings import FULL, FinetuningMethod
from pipeline.errors import UserError
from pipeline.files.artifact import read_manifest
from pipeline.files.base_model import base_fingerprint
from pipeline.files.patterns import end_match, one_budget
from pipeline.files.safetensors_header import shapes
from pipeline.models.base import CausalLM
from pipeline.models.load import DTYPES, Base, count, load_base, skeleton, stored_precision
from pipeline.project.params.sections import FinetuneFreeze, FinetuneFull, FinetuneLora, FinetuneVirtual
from pipeline.project.runner import Event, Facts, Job, Note
from pipeline.training.data import prepare_data, save_checkpoint, save_curve
from pipeline.training.loop import TrainingSetup, TrainingTask, train
from pipeline.training.optimizer import FlatAdam


def finetune(job: Job, sharded: bool | None = None) -> Generator[Event, None, Facts]:
    """The expanded base, made trainable as the method says, trained, and saved as checkpoint or adapter.

    `sharded` as in `Task`. Raises UserError, and what `train` does.
    """
    learner = yield from prepare(job, sharded)
    return learner.save((yield from train(job, learner.task)))


def prepare(job: Job, sharded: bool | None = None) -> Generator[Event, None, TrainingSetup]:
    """The expanded base, made trainable as the stage's method says, and its data. Raises UserError."""
    settings = job.project.section(job.stage)
    assert isinstance(settings, FinetuneFull | FinetuneFreeze | FinetuneLora | FinetuneVirtual)
    folder = job.artifact("expand_vocab")
    trust = job.project.params.pretrain.trust_remote_code
    kept = settings.quantization if isinstance(settings, FinetuneLora | FinetuneVirtual) else "none"
    base = load_base(folder, settings.precision, trust, kept)
    if isinstance(settings, FinetuneVirtual):
        from pipeline.stages.virtual_tokens import virtual_learner  # LoRA needs none of it

        return (yield from virtual_learner(job, settings, base, folder))
    model = base.model
    batches, evaluation = yield from prepare_data(job, settings, base)
    torch.manual_seed(settings.seed)
    spec, retain = None, None
    if isinstance(settings, FinetuneLora):
        spec = lora_spec(model, settings, new_rows(folder))
        texts = None
        if settings.retention_weight:
            from pipeline.training.retention import (  # with generation, rarely needed
                RetentionLoss,
                load_retention_texts,
            )

            texts = yield from load_retention_texts(job, settings, base)  # prompts completed by the plain base
        attach(model, spec, DTYPES[settings.adapter_precision], settings.init_lora_weights)
        yield from note_wide_rank(model)
        retain = None if texts is None else RetentionLoss(model, texts, settings)
    elif isinstance(settings, FinetuneFreeze):
        freeze(model, settings)
    trainable = count(model)["trainable"]
    task = TrainingTask(
        model, batches, settings, method_of(settings, spec), evaluation, retain, sharded if spec else False
    )

    def save(optimizer: FlatAdam) -> Facts:
        if spec is None:
            stored = None if stored_precision(folder) == settings.precision else load_base(folder, None, trust).model
            return save_checkpoint(job, base, optimizer, trained_from=stored)
        total = count(skeleton(folder, trust))["total"]  # what is kept in few bits is no parameter
        save_curve(job)
        return save_files(job.out, base, spec, folder, {"total": total, "trainable": trainable})

    return TrainingSetup(base, task, save)


def method_of(settings: FinetuneFull | FinetuneFreeze | FinetuneLora, spec: AdapterSpec | None) -> FinetuningMethod:
    """What trains, as the calculator says it."""
    if isinstance(settings, FinetuneFreeze):
        return FinetuningMethod("freeze", last_blocks=settings.last_blocks, train_embeddings=settings.train_embeddings)
    if spec is None or isinstance(settings, FinetuneFull):
        return FULL
    rows = max((len(ids) for ids in spec.rows.values()), default=0)
    ends = "all" if spec.saved else "new_rows" if rows else "none"
    targets = (spec.targets,) if isinstance(spec.targets, str) else spec.targets
    ranks = tuple(spec.ranks.items())
    pissa = settings.init_lora_weights == "pissa"
    return FinetuningMethod(
        "lora", spec.rank, spec.alpha, targets, ranks, spec.rslora, spec.dora, ends, rows, pissa=pissa
    )


def freeze(model: CausalLM, settings: FinetuneFreeze) -> None:
    """Only the last blocks, and embeddings and head if asked, train. Raises UserError if nothing would."""
    blocks = list(model.blocks)
    if settings.last_blocks > len(blocks):
        raise UserError(
            f"finetune_freeze.last_blocks must be at most {len(blocks)}, the model's blocks, "
            f"got {settings.last_blocks}. Lower it."
        )
    if not settings.last_blocks and not settings.train_embeddings:
        raise UserError("finetune_freeze leaves nothing to train. Raise last_blocks or set train_embeddings: true.")
    model.requires_grad_(False)
    for block in blocks[len(blocks) - settings.last_blocks :]:
        block.requires_grad_(True)
    for end in (model.embeddings, model.head):
        end.requires_grad_(settings.train_embeddings)


@one_budget()
def lora_spec(model: CausalLM, settings: FinetuneLora, new: tuple[int, ...]) -> AdapterSpec:
    """The settings, resolved against this model. Raises UserError for a target or pattern that means no layer."""
    rows = model.embedding_and_head[: 1 if model.shape.tied else 2]
    names = resolve(model, settings.target_modules)
    for key, patterns in (("rank_pattern", settings.rank_pattern), ("alpha_pattern", settings.alpha_pattern)):
        _refuse_patterns(key, list(patterns), names)
    return AdapterSpec(
        rank=settings.rank,
        alpha=settings.alpha,
        targets=short_targets(model, names),
        ranks=settings.rank_pattern,
        alphas=settings.alpha_pattern,
        rslora=settings.rslora,
        dora=settings.dora,
        saved=model.embedding_and_head if settings.train_embeddings == "all" else (),
        rows=dict.fromkeys(rows, new) if settings.train_embeddings == "new_rows" and new else {},
    )


def _refuse_patterns(key: str, patterns: Sequence[str], names: Sequence[str]) -> None:
    """One that means nothing would count for nothing; of two that mean one layer, PEFT takes another than is written
    first once it has sorted them."""
    for name in names:
        meant = [pattern for pattern in patterns if end_match(pattern, name, f"finetune_lora.{key}")]
        if len(meant) > 1:
            raise UserError(
                f"finetune_lora.{key}: {meant[0]!r} and {meant[1]!r} both mean {name}. Keep one of them for it, or "
                "write patterns that tell layers apart, such as layers.0.self_attn.q_proj."
            )
    for pattern in patterns:
        if not any(end_match(pattern, name, f"finetune_lora.{key}") for name in names):
            adapted = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in names}))
            raise UserError(
                f"finetune_lora.{key}: {pattern!r} means none of the layers that get LoRA, which are called {adapted}. "
                "Mend the pattern, or name the layer in finetune_lora.target_modules."
            )


def note_wide_rank(model: CausalLM) -> Iterator[Event]:
    """A rank above a matrix's smaller side costs parameters and expresses nothing more (§2.4)."""
    for name, layer in adapter_layers(model):
        rank, widest = len(layer.lora_A), min(layer.lora_A.shape[1], layer.lora_B.shape[0])
        if rank > widest:
            yield Note(f"finetune_lora.rank {rank} is more than {name} can use: its rank is at most {widest}")
            return


def new_rows(expanded: Path) -> tuple[int, ...]:
    """Ids of the rows that expand_vocab added."""
    start, stop = read_manifest(expanded).get("new_rows", (0, 0))
    return tuple(range(start, stop))


def save_files(out: Path, base: Base, spec: AdapterSpec, folder: Path, parameters: dict[str, int]) -> Facts:
    """Write the adapter and its tokenizer to `out`; returns what a manifest says of them, `folder` being the base's.

    Of PiSSA also what the files hold, which is not what trained.
    """
    model, tokenizer = base
    save_adapter(out, model, spec, f"artifacts/{folder.name}")
    tokenizer.save(out, model.shape.positions)
    facts: Facts = {"base": base_fingerprint(folder), "parameters": parameters}
    if (kept := stored_spec(model, spec)) is not spec:
        held = sum(prod(shape) for shape in shapes(out / WEIGHTS).values())
        facts |= {"stored": {"rank": kept.rank, "alpha": kept.alpha}, "parameters": {**parameters, "stored": held}}
    return facts
