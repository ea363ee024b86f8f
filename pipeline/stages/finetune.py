"""Every fine-tuning method: load the expanded base, attach what trains, train it, save it."""

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from pipeline.calc.method import FinetuningMethod
from pipeline.files.base_model import base_fingerprint
from pipeline.models.device import placed_for_inference
from pipeline.models.load import DTYPES, Base, count, load_base, skeleton, stored_precision
from pipeline.project.params.sections import AdapterTraining, Training
from pipeline.project.runner import Event, Facts, Job
from pipeline.training.batches import Batches
from pipeline.training.data import asked_while_training, prepare_data
from pipeline.training.loop import train
from pipeline.training.optimizer import FlatOptimizer
from pipeline.training.saving import finish, save_checkpoint, save_state
from pipeline.training.step import Evaluation, Learner, LossPath
from pipeline.training.task import Saver, TrainingSetup, TrainingTask

if TYPE_CHECKING:
    from pipeline.training.retention import RetentionLoss


class Continued(NamedTuple):
    """What a run takes over from the run that made its first adapter."""

    state: Mapping[str, Tensor] | None = None  # the optimizer's, if it was kept
    # the steps of that run, if this one reads the same data in the same order and starts after it
    seen: int = 0


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
    task = (yield from prepare(job)).task
    optimizer = yield from train(job, task)
    return finish(job, task, optimizer)


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
    if attached.save is not None:
        save = _adapter_saver(job, base, attached.save, continued.seen)
    else:
        # trained in another precision, the change is added to the base as it is stored
        converted = stored_precision(folder) != settings.precision
        as_stored = (lambda: load_base(folder, None, trust).model) if converted else None
        save = partial(save_checkpoint, base=base, trained_from=as_stored)
    task = TrainingTask(
        base.model,
        [Learner(settings, data.batches, attached.retain)],
        data.path,
        data.evaluation,
        attached.counted,
        sharded=job.sharded if attached.shardable else False,
        state=continued.state,
        save=save,
        facts=data.facts,
        **asked_while_training(job, settings, base),
    )
    return TrainingSetup(base, task)


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


def _adapter_saver(job: Job, base: Base, save: Callable[[Path], Facts], seen: int) -> Saver:
    """`seen`: the steps of the runs that this one continues."""
    keeps_state = getattr(job.project.section(job.stage), "save_optimizer", False)
    trainable = count(base.model)["trainable"]
    trained_on = cache(partial(facts_of_base, job))

    def save_all(out: Path, optimizer: FlatOptimizer) -> Facts:
        state = save_state(out, optimizer, seen) if keeps_state else {}
        return {**save_adapter_of(trained_on(), base, save, out, trainable), **state}

    return save_all


class BaseFacts(NamedTuple):
    """What an adapter's manifest says of its base."""

    fingerprint: Mapping[str, str]
    total: int  # parameters, of the unquantized model: quantized weights are no parameters


def facts_of_base(job: Job) -> BaseFacts:
    """Reads all of the base's weights: of a large one it takes many seconds."""
    folder = job.project.artifact("expand_vocab")
    model = skeleton(folder, job.project.params.origin.trust_remote_code)
    return BaseFacts(base_fingerprint(folder), count(model)["total"])


def save_adapter_of(
    trained_on: BaseFacts, base: Base, save: Callable[[Path], Facts], out: Path, trainable: int
) -> Facts:
    """Write an adapter and its tokenizer to `out`. Returns the manifest entries."""
    facts = save(out)
    base.tokenizer.save(out, base.model.max_length)
    parameters = {
        "total": trained_on.total,
        "trainable": trainable,
        **facts.pop("parameters", {}),
    }
    return {"base": trained_on.fingerprint, "parameters": parameters, **facts}
