"""finetune_sweep: one adapter per combination of a grid, all trained in one pass on one frozen base."""

from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from shutil import copyfile
from typing import Any

import torch

from pipeline.adapters.attach import attach
from pipeline.adapters.batched import attach_many, only_adapter, trained_by
from pipeline.adapters.config import AdapterSpec
from pipeline.data.windows import Dataset
from pipeline.errors import UserError
from pipeline.files import artifact
from pipeline.models.load import DTYPES, Base, count, load_base, skeleton
from pipeline.project import provenance
from pipeline.project.logs.run_log import LOSS, final_loss, read_steps
from pipeline.project.params.grid import DIVERGED, DONE, STOPPED, TABLE, variants
from pipeline.project.params.sections import FinetuneLora
from pipeline.project.runner import Event, Facts, Job
from pipeline.stages.finetune import lora_spec, new_rows, note_wide_rank, save_files
from pipeline.training.batched.evaluation import BatchedEvaluation
from pipeline.training.batched.loop import AdapterProgress
from pipeline.training.batched.run import train_batched
from pipeline.training.batched.step import BatchedTrainingTask, Variant
from pipeline.training.batches import Batches
from pipeline.training.data import build_datasets
from pipeline.training.retention import load_retention_texts
from pipeline.training.schedule import refuse_long_warmup


def sweep(job: Job) -> Generator[Event, None, Facts]:
    """Train the grid → an adapter folder for each combination, and sweep.json with the outcome of each.

    Raises UserError, and whatever `train_batched` raises.
    """
    params = job.project.params
    settings, grid = params.finetune_lora, variants(params.finetune_lora, params.finetune_sweep)
    if settings.precision == "fp16":
        raise UserError(
            "finetune_lora.precision fp16 trains one adapter at a time. Set it to bf16 or fp32 for a sweep."
        )
    folder = job.artifact("expand_vocab")
    base = load_base(folder, settings.precision, params.pretrain.trust_remote_code, settings.quantization)
    dataset, held_out = yield from build_datasets(job, settings, base)
    max_weight = max(lora.retention_weight for lora in grid.values())
    texts = yield from load_retention_texts(job, replace(settings, retention_weight=max_weight), base)
    specs = {}
    for name, lora in grid.items():
        with _add_name_to_error(name):
            specs[name] = lora_spec(base.model, lora, new_rows(folder))
    notes: list[Event] = []
    attach_each = [_attach_function(base, specs[name], name, lora, notes) for name, lora in grid.items()]
    share = attach_many(base.model, attach_each)
    yield from dict.fromkeys(notes)
    adapters = tuple(_variant(name, lora, dataset, texts) for name, lora in grid.items())
    for adapter in adapters:
        with _add_name_to_error(adapter.name):
            refuse_long_warmup(adapter.settings, adapter.settings.epochs * len(adapter.batches), job.stage.section)
    every = settings.eval_every or len(adapters[0].batches)
    evaluation = None
    if held_out is not None:
        evaluation = BatchedEvaluation(held_out, settings.batch_size, every, settings.patience, len(grid))
    progress = yield from train_batched(job, BatchedTrainingTask(base.model, share, adapters, evaluation))
    return _save_adapters(job, base, grid, specs, progress)


@contextmanager
def _add_name_to_error(adapter: str) -> Iterator[None]:
    """Prefix a UserError with the adapter's name, as the wrong value may come from the grid."""
    try:
        yield
    except UserError as error:
        raise UserError(f"finetune_sweep, {adapter}: {error}") from None


def _attach_function(
    base: Base, spec: AdapterSpec, name: str, lora: FinetuneLora, notes: list[Event]
) -> Callable[[], None]:
    """A function that attaches the adapter exactly as finetune_lora does, and appends notes to `notes`."""

    def attach_one() -> None:
        torch.manual_seed(lora.seed)
        with _add_name_to_error(name):
            attach(base.model, spec, DTYPES[lora.adapter_precision], lora.init_lora_weights)
        notes.extend(note_wide_rank(base.model))

    return attach_one


def _variant(name: str, own: FinetuneLora, learned: Dataset, texts: Dataset | None) -> Variant:
    batches = Batches(learned, own.batch_size, own.seed, own.gradient_accumulation_steps)
    retained = Batches(texts, own.retention_batch_size, own.seed) if texts is not None and own.retains else None
    return Variant(name, own, batches, retained)


def _save_adapters(
    job: Job,
    base: Base,
    grid: Mapping[str, FinetuneLora],
    specs: Mapping[str, AdapterSpec],
    progress: AdapterProgress,
) -> Facts:
    """Save each adapter that did not diverge in its own folder, sealed like finetune_lora's artifact."""
    folder = job.project.artifact("expand_vocab")
    total = count(skeleton(folder, job.project.params.pretrain.trust_remote_code))["total"]
    commit = provenance.commit(job.stage.module)
    rows: dict[str, Any] = {}
    for number, (name, lora) in enumerate(grid.items()):
        steps = read_steps(job.run / name / LOSS)
        held_out = [step.eval_loss for step in steps if step.eval_loss is not None]
        trained = trained_by(base.model, number)
        diverged = bool(progress.diverged[number])
        rows[name] = {
            "state": DIVERGED if diverged else STOPPED if progress.stopped[number] else DONE,
            "trainable": trained,
            "steps": len(steps),
            "final_loss": final_loss(steps),
            "eval_loss": min(held_out) if lora.patience and held_out else held_out[-1] if held_out else None,
        }
        if diverged:
            continue
        out = job.out / name
        out.mkdir()
        with only_adapter(base.model, number):
            facts = save_files(out, base, specs[name], folder, {"total": total, "trainable": trained})
        copyfile(job.run / name / LOSS, out / LOSS)
        facts_of_adapter = {"kind": "adapter", "method": "lora", "seed": lora.seed, "params": asdict(lora)}
        artifact.seal(out, {**job.input_facts, **facts_of_adapter, "commit": commit, **facts})
    artifact.write_json(job.out / TABLE, rows)
    trained = sum(row["trainable"] for row in rows.values())
    return {"adapters": rows, "parameters": {"total": total, "trainable": trained}}
