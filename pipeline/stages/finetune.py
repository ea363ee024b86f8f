"""finetune_full, _freeze, _lora, _prefix and _prompt: five methods on the same sentences (the document's §7 and §9)."""

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
from pipeline.training.distributed import is_main_process
from pipeline.training.loop import TrainingSetup, TrainingTask, train
from pipeline.training.optimizer import FlatAdam


def finetune(job: Job, sharded: bool | None = None) -> Generator[Event, None, Facts]:
    """Train the expanded base with the stage's method, and save it as a checkpoint or an adapter.

    `sharded`: as in `TrainingTask`. Raises UserError, and whatever `train` raises.
    """
    learner = yield from prepare(job, sharded)
    optimizer = yield from train(job, learner.task)
    return learner.save(optimizer) if is_main_process() else {}


def prepare(job: Job, sharded: bool | None = None) -> Generator[Event, None, TrainingSetup]:
    """Load the expanded base and the data, and set up the stage's method. Raises UserError."""
    settings = job.project.section(job.stage)
    assert isinstance(settings, FinetuneFull | FinetuneFreeze | FinetuneLora | FinetuneVirtual)
    folder = job.artifact("expand_vocab")
    trust = job.project.params.pretrain.trust_remote_code
    quantization = settings.quantization if isinstance(settings, FinetuneLora | FinetuneVirtual) else "none"
    base = load_base(folder, settings.precision, trust, quantization)
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
    task = TrainingTask.of_one(
        model, batches, settings, method_of(settings, spec), evaluation, retain, sharded if spec else False
    )

    def save(optimizer: FlatAdam) -> Facts:
        if spec is None:
            stored = None if stored_precision(folder) == settings.precision else load_base(folder, None, trust).model
            return save_checkpoint(job, base, optimizer, trained_from=stored)
        total = count(skeleton(folder, trust))["total"]  # of the unquantized model: quantized weights are no parameters
        save_curve(job)
        return save_files(job.out, base, spec, folder, {"total": total, "trainable": trainable})

    return TrainingSetup(base, task, save)


def method_of(settings: FinetuneFull | FinetuneFreeze | FinetuneLora, spec: AdapterSpec | None) -> FinetuningMethod:
    """The method as the calculator's settings."""
    if isinstance(settings, FinetuneFreeze):
        return FinetuningMethod("freeze", last_blocks=settings.last_blocks, train_embeddings=settings.train_embeddings)
    if spec is None or isinstance(settings, FinetuneFull):
        return FULL
    rows = max((len(ids) for ids in spec.rows.values()), default=0)
    train_embeddings = "all" if spec.saved else "new_rows" if rows else "none"
    targets = (spec.targets,) if isinstance(spec.targets, str) else spec.targets
    ranks = tuple(spec.ranks.items())
    pissa = settings.init_lora_weights == "pissa"
    return FinetuningMethod(
        "lora", spec.rank, spec.alpha, targets, ranks, spec.rslora, spec.dora, train_embeddings, rows, pissa=pissa
    )


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


@one_budget()
def lora_spec(model: CausalLM, settings: FinetuneLora, new: tuple[int, ...]) -> AdapterSpec:
    """Resolve the settings against the model. Raises UserError for a target or pattern that matches no layer."""
    rows = model.embedding_and_head[: 1 if model.shape.tied else 2]
    names = resolve(model, settings.target_modules)
    for key, patterns in (("rank_pattern", settings.rank_pattern), ("alpha_pattern", settings.alpha_pattern)):
        _check_patterns(key, list(patterns), names)
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


def _check_patterns(key: str, patterns: Sequence[str], names: Sequence[str]) -> None:
    """Raises UserError for a pattern that matches no layer, and for two that match the same one.

    PEFT sorts patterns before matching, so that which of two applies would depend on their names.
    """
    for name in names:
        matches = [pattern for pattern in patterns if end_match(pattern, name, f"finetune_lora.{key}")]
        if len(matches) > 1:
            raise UserError(
                f"finetune_lora.{key}: {matches[0]!r} and {matches[1]!r} both match {name}. Remove one, or use more "
                "specific patterns, such as layers.0.self_attn.q_proj."
            )
    for pattern in patterns:
        if not any(end_match(pattern, name, f"finetune_lora.{key}") for name in names):
            adapted = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in names}))
            raise UserError(
                f"finetune_lora.{key}: {pattern!r} matches no layer that gets LoRA ({adapted}). "
                "Fix the pattern, or add the layer to finetune_lora.target_modules."
            )


def note_wide_rank(model: CausalLM) -> Iterator[Event]:
    """Yields a note if the rank exceeds a matrix's smaller side: more parameters, but no more expressiveness (§2.4)."""
    for name, layer in adapter_layers(model):
        rank, max_rank = len(layer.lora_A), min(layer.lora_A.shape[1], layer.lora_B.shape[0])
        if rank > max_rank:
            yield Note(f"finetune_lora.rank {rank} is more than {name} can use; its rank is at most {max_rank}")
            return


def new_rows(expanded: Path) -> tuple[int, ...]:
    """The token ids of the rows that expand_vocab added."""
    start, stop = read_manifest(expanded).get("new_rows", (0, 0))
    return tuple(range(start, stop))


def save_files(out: Path, base: Base, spec: AdapterSpec, folder: Path, parameters: dict[str, int]) -> Facts:
    """Write the adapter and its tokenizer to `out`; `folder` is the base's. Returns the manifest's entries.

    For PiSSA they include `stored`: rank and alpha of the files, which differ from those that trained.
    """
    model, tokenizer = base
    save_adapter(out, model, spec, f"artifacts/{folder.name}")
    tokenizer.save(out, model.shape.positions)
    facts: Facts = {"base": base_fingerprint(folder), "parameters": parameters}
    if (saved := stored_spec(model, spec)) is not spec:
        size = sum(prod(shape) for shape in shapes(out / WEIGHTS).values())
        facts |= {"stored": {"rank": saved.rank, "alpha": saved.alpha}, "parameters": {**parameters, "stored": size}}
    return facts
