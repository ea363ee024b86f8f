"""finetune_sweep: every combination of a grid as an adapter of its own, trained in one pass on one frozen base."""

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
    """The grid of finetune_sweep → an adapter folder for each combination, and sweep.json with how each ended.

    Raises UserError, and what `train_batched` does.
    """
    params = job.project.params
    settings, wanted = params.finetune_lora, variants(params.finetune_lora, params.finetune_sweep)
    if settings.precision == "fp16":
        raise UserError(
            "finetune_lora.precision fp16 trains one adapter at a time. Set it to bf16 or fp32 for a sweep."
        )
    folder = job.artifact("expand_vocab")
    base = load_base(folder, settings.precision, params.pretrain.trust_remote_code, settings.quantization)
    learned, held_out = yield from build_datasets(job, settings, base)
    strongest = max(own.retention_weight for own in wanted.values())
    texts = yield from load_retention_texts(job, replace(settings, retention_weight=strongest), base)
    specs = {}
    for name, own in wanted.items():
        with _named(name):
            specs[name] = lora_spec(base.model, own, new_rows(folder))
    notes: list[Event] = []
    ways = [_attaching(base, specs[name], name, own, notes) for name, own in wanted.items()]
    share = attach_many(base.model, ways)
    yield from dict.fromkeys(notes)
    together = tuple(_variant(name, own, learned, texts) for name, own in wanted.items())
    for each in together:
        with _named(each.name):
            refuse_long_warmup(each.settings, each.settings.epochs * len(each.batches), job.stage.section)
    every = settings.eval_every or len(together[0].batches)
    evaluation = None
    if held_out is not None:
        evaluation = BatchedEvaluation(held_out, settings.batch_size, every, settings.patience, len(wanted))
    standing = yield from train_batched(job, BatchedTrainingTask(base.model, share, together, evaluation))
    return _saved(job, base, wanted, specs, standing)


@contextmanager
def _named(adapter: str) -> Iterator[None]:
    """What is wrong with one of the adapters is said with its name: its value may be the grid's."""
    try:
        yield
    except UserError as error:
        raise UserError(f"finetune_sweep, {adapter}: {error}") from None


def _attaching(base: Base, spec: AdapterSpec, name: str, own: FinetuneLora, notes: list[Event]) -> Callable[[], None]:
    """Puts the adapter on the base just as where it trains alone; what is to be noted then goes to `notes`."""

    def attach_one() -> None:
        torch.manual_seed(own.seed)
        with _named(name):
            attach(base.model, spec, DTYPES[own.adapter_precision], own.init_lora_weights)
        notes.extend(note_wide_rank(base.model))

    return attach_one


def _variant(name: str, own: FinetuneLora, learned: Dataset, texts: Dataset | None) -> Variant:
    batches = Batches(learned, own.batch_size, own.seed, own.gradient_accumulation_steps)
    retained = Batches(texts, own.retention_batch_size, own.seed) if texts is not None and own.retains else None
    return Variant(name, own, batches, retained)


def _saved(
    job: Job,
    base: Base,
    wanted: Mapping[str, FinetuneLora],
    specs: Mapping[str, AdapterSpec],
    standing: AdapterProgress,
) -> Facts:
    """Each adapter that learned something finite in a folder of its own, sealed as finetune_lora seals its one."""
    folder = job.project.artifact("expand_vocab")
    total = count(skeleton(folder, job.project.params.pretrain.trust_remote_code))["total"]
    commit = provenance.commit(job.stage.module)
    rows: dict[str, Any] = {}
    for number, (name, own) in enumerate(wanted.items()):
        steps = read_steps(job.run / name / LOSS)
        held_out = [step.eval_loss for step in steps if step.eval_loss is not None]
        trained = trained_by(base.model, number)
        diverged = bool(standing.diverged[number])
        rows[name] = {
            "state": DIVERGED if diverged else STOPPED if standing.stopped[number] else DONE,
            "trainable": trained,
            "steps": len(steps),
            "final_loss": final_loss(steps),
            "eval_loss": min(held_out) if own.patience and held_out else held_out[-1] if held_out else None,
        }
        if diverged:
            continue
        out = job.out / name
        out.mkdir()
        with only_adapter(base.model, number):
            facts = save_files(out, base, specs[name], folder, {"total": total, "trainable": trained})
        copyfile(job.run / name / LOSS, out / LOSS)
        made = {"kind": "adapter", "method": "lora", "seed": own.seed, "params": asdict(own)}
        artifact.seal(out, {**job.known, **made, "commit": commit, **facts})
    artifact.write_json(job.out / TABLE, rows)
    trained = sum(row["trainable"] for row in rows.values())
    return {"adapters": rows, "parameters": {"total": total, "trainable": trained}}
