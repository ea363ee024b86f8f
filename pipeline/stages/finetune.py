"""Every fine-tuning method: load the expanded base, attach what trains, train it, save it."""

from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from pipeline.calc.method import FinetuningMethod
from pipeline.files.base_model import base_fingerprint
from pipeline.models.device import placed_for_inference
from pipeline.models.load import DTYPES, Base, count, load_base, skeleton, stored_precision
from pipeline.project.params.sections import AdapterTraining, Training
from pipeline.project.runner import Event, Facts, Job
from pipeline.stages.init_from import Continued, save_state
from pipeline.training.batches import Batches
from pipeline.training.data import asked_while_training, prepare_data, save_checkpoint, save_logs
from pipeline.training.loop import train
from pipeline.training.optimizer import FlatOptimizer
from pipeline.training.parallel.collectives import is_main_process
from pipeline.training.step import Evaluation, Learner, LossPath
from pipeline.training.task import TrainingSetup, TrainingTask

if TYPE_CHECKING:
    from pipeline.training.retention import RetentionLoss


@dataclass(frozen=True)
class Attached:
    """What a method returns after it has changed the base model in place."""

    # the method as `lora calc` counts it, to predict the memory of the run
    counted: FinetuningMethod
    # writes an adapter's files to a folder and returns its manifest entries;
    # None: the whole model is saved, as a checkpoint
    save: Callable[[Path], Facts] | None = None
    # a second loss, on texts whose answers must stay the base's
    retain: "RetentionLoss | None" = None
    # whether the frozen weights may be split over devices
    shardable: bool = False
    # the run that this one continues (`init_from`)
    continued: Continued = field(default_factory=Continued)
    # (job, settings, base, first): loads the data, from step `first` on, for a loss of the
    # method's own; None: examples and cross-entropy
    prepare: "Callable[[Job, Any, Base, int], Generator[Event, None, Prepared]] | None" = None


class Prepared(NamedTuple):
    """The data of a run, and how its loss is computed."""

    batches: Batches
    evaluation: Evaluation | None
    path: LossPath
    # manifest entries that are measured on the data after training
    facts: Callable[[], Facts] = dict


def run(job: Job) -> Generator[Event, None, Facts]:
    """Train the expanded base with the stage's method, and save it as a checkpoint or an adapter.

    Raises UserError, and whatever `train` raises.
    """
    learner = yield from prepare(job)
    optimizer = yield from train(job, learner.task)
    return learner.save(optimizer) if is_main_process() else {}


def prepare(job: Job) -> Generator[Event, None, TrainingSetup]:
    """Load base and data, and attach what the stage's method trains. Raises UserError."""
    settings = job.project.section(job.stage)
    folder, trust = job.artifact("expand_vocab"), job.project.params.origin.trust_remote_code
    quantization = settings.quantization if isinstance(settings, AdapterTraining) else "none"
    base = load_base(folder, settings.precision, trust, quantization)
    # after the base is loaded, which may draw random numbers too
    torch.manual_seed(settings.seed)
    # before the data is loaded, as virtual tokens leave it fewer positions
    attached: Attached = yield from import_module(job.stage.module).attach(job, settings, base)
    continued = attached.continued
    data = yield from (attached.prepare or _prepare)(job, settings, base, continued.seen)
    trainable = count(base.model)["trainable"]
    task = TrainingTask(
        base.model,
        [Learner(settings, data.batches, attached.retain)],
        data.path,
        data.evaluation,
        attached.counted,
        sharded=job.sharded if attached.shardable else False,
        state=continued.state,
        **asked_while_training(job, settings, base),
    )

    def save(optimizer: FlatOptimizer) -> Facts:
        if attached.save is None:
            stored = None
            if stored_precision(folder) != settings.precision:
                # trained in another precision: the change is added to the base as it is stored
                stored = load_base(folder, None, trust).model
            return save_checkpoint(job, base, optimizer, trained_from=stored)
        save_logs(job.run, job.out)
        facts: Facts = {}
        if getattr(settings, "save_optimizer", False):
            facts = save_state(job, optimizer, continued.seen)
        saved = save_adapter_of(job, base, attached.save, job.out, trainable)
        return {**saved, **facts, **data.facts()}

    return TrainingSetup(base, task, save)


def _prepare(
    job: Job, settings: Training, base: Base, first: int
) -> Generator[Event, None, Prepared]:
    batches, evaluation = yield from prepare_data(job, settings, base, first)
    return Prepared(batches, evaluation, LossPath(base.model))


def attach_virtual(
    job: Job, settings: Any, base: Base, counted: FinetuningMethod
) -> Generator[Event, None, Attached]:
    """Put virtual tokens, prefix or prompt by the stage's method, before every sequence."""
    from pipeline.adapters.virtual import attach_virtual_tokens, save_virtual

    yield from ()
    model, dtype = base.model, DTYPES[settings.adapter_precision]
    with placed_for_inference(model):  # it computes their first keys and values
        attach_virtual_tokens(
            model,
            job.stage.method,
            settings.virtual_tokens,
            len(base.tokenizer),
            settings.seed,
            dtype,
        )

    def save(out: Path) -> Facts:
        save_virtual(out, model, "artifacts/expanded")
        return {}

    return Attached(counted, save)


def save_adapter_of(
    job: Job, base: Base, save: Callable[[Path], Facts], out: Path, trainable: int
) -> Facts:
    """Write an adapter and its tokenizer to `out`. Returns the manifest entries."""
    folder = job.project.artifact("expand_vocab")
    facts = save(out)
    base.tokenizer.save(out, base.model.max_length)
    # of the unquantized model: quantized weights are no parameters
    total = count(skeleton(folder, job.project.params.origin.trust_remote_code))["total"]
    parameters = {"total": total, "trainable": trainable, **facts.pop("parameters", {})}
    return {"base": base_fingerprint(folder), "parameters": parameters, **facts}
