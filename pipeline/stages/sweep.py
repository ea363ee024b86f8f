"""finetune_sweep: one adapter per combination of a grid, all trained in one pass on one frozen base."""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from shutil import copyfile
from typing import Any

import torch

from pipeline.adapters.attach import attach
from pipeline.adapters.batched import AdapterRouting, attach_many, only_adapter, trained_by
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
from pipeline.training.batched import ManyAdapters
from pipeline.training.batches import Batches
from pipeline.training.data import build_datasets
from pipeline.training.loop import TrainingTask, train
from pipeline.training.optimizer import refuse_long_warmup
from pipeline.training.retention import RetentionLoss, load_retention_texts
from pipeline.training.step import Evaluation, Learner


def sweep(job: Job) -> Generator[Event, None, Facts]:
    """Train the grid → an adapter folder for each combination, and sweep.json with the outcome of each.

    Raises UserError, and whatever `train` raises.
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
    routing = attach_many(base.model, attach_each)
    yield from dict.fromkeys(notes)
    learners = [_learner(base, routing, name, lora, dataset, texts) for name, lora in grid.items()]
    for learner in learners:
        with _add_name_to_error(learner.name):
            refuse_long_warmup(learner.settings, learner.settings.epochs * len(learner.batches), job.stage.section)
    evaluation = None
    if held_out is not None:
        every = settings.eval_every or len(learners[0].batches)
        evaluation = Evaluation(held_out, settings.batch_size, every, settings.patience, len(learners))
    less = f"Train fewer adapters at once: shorten {job.stage.name}.grid, or lower finetune_lora.batch_size."
    path = ManyAdapters(base.model, routing)
    yield from train(job, TrainingTask(base.model, learners, path, evaluation, less_memory=less))
    return _save_adapters(job, base, specs, learners)


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


def _learner(
    base: Base, routing: AdapterRouting, name: str, own: FinetuneLora, learned: Dataset, texts: Dataset | None
) -> Learner:
    batches = Batches(learned, own.batch_size, own.seed, own.gradient_accumulation_steps)
    retain = None
    if texts is not None and own.retains:
        retain = RetentionLoss(base.model, texts, own, routing.base)
    return Learner(own, batches, retain, name)


def _save_adapters(job: Job, base: Base, specs: Mapping[str, AdapterSpec], learners: Sequence[Learner]) -> Facts:
    """Save each adapter that did not diverge in its own folder, sealed like finetune_lora's artifact."""
    folder = job.project.artifact("expand_vocab")
    total = count(skeleton(folder, job.project.params.pretrain.trust_remote_code))["total"]
    commit = provenance.commit(job.stage.module)
    rows: dict[str, Any] = {}
    for number, learner in enumerate(learners):
        name, lora = learner.name, learner.settings
        steps = read_steps(job.run / name / LOSS)
        held_out = [step.eval_loss for step in steps if step.eval_loss is not None]
        trained = trained_by(base.model, number)
        rows[name] = {
            "state": DIVERGED if learner.diverged else DONE if learner.stopped is None else STOPPED,
            "trainable": trained,
            "steps": len(steps),
            "final_loss": final_loss(steps),
            "eval_loss": min(held_out) if lora.patience and held_out else held_out[-1] if held_out else None,
        }
        if learner.diverged:
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
