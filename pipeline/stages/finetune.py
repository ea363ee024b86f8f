"""What the fine-tuning methods share: load the expanded base, attach what trains, train it, save it
(§7 and §9).
"""

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
from pipeline.training.loop import TrainingSetup, TrainingTask, train
from pipeline.training.optimizer import FlatOptimizer
from pipeline.training.parallel.collectives import is_main_process
from pipeline.training.step import Evaluation, Learner, LossPath, OneLearner

if TYPE_CHECKING:
    from pipeline.training.retention import RetentionLoss


@dataclass(frozen=True)
class Attached:
    """What a method made of the base.

    `counted`: the method as the calculator's settings. `save`: writes an adapter's own files into a
    folder and returns its entries of the manifest; None where the whole model is the artifact.
    `retain`: a loss on other texts. `shardable`: whether what is frozen may be split over devices.
    `continued`: what goes on of an earlier run. `prepare(job, settings, base, first)`: the data
    where it is not examples to predict, after `first` steps.
    """

    counted: FinetuningMethod
    save: Callable[[Path], Facts] | None = None
    retain: "RetentionLoss | None" = None
    shardable: bool = False
    continued: Continued = field(default_factory=Continued)
    prepare: "Callable[[Job, Any, Base, int], Generator[Event, None, Prepared]] | None" = None


class Prepared(NamedTuple):
    """The batches of a run, what it is evaluated on, and how its losses are computed.

    `facts`: entries of the manifest that are measured on the data after training.
    """

    batches: Batches
    evaluation: Evaluation | None
    path: LossPath
    facts: Callable[[], Facts] = dict


def run(job: Job) -> Generator[Event, None, Facts]:
    """Train the expanded base with the stage's method, and save it as a checkpoint or an adapter.

    Raises UserError, and whatever `train` raises.
    """
    learner = yield from prepare(job)
    optimizer = yield from train(job, learner.task)
    return learner.save(optimizer) if is_main_process() else {}


def prepare(job: Job) -> Generator[Event, None, TrainingSetup]:
    """Load the expanded base and the data, and attach what the stage's method trains. Raises
    UserError.
    """
    settings = job.project.section(job.stage)
    folder, trust = job.artifact("expand_vocab"), job.project.params.origin.trust_remote_code
    quantization = settings.quantization if isinstance(settings, AdapterTraining) else "none"
    base = load_base(folder, settings.precision, trust, quantization)
    # after the base: first values depend on the seed, not on how it is loaded
    torch.manual_seed(settings.seed)
    # before the data: virtual tokens take positions from it
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
            # trained in another precision: what changed is added to the base as it is stored
            stored = (
                None
                if stored_precision(folder) == settings.precision
                else load_base(folder, None, trust).model
            )
            return save_checkpoint(job, base, optimizer, trained_from=stored)
        save_logs(job.run, job.out)
        state = (
            save_state(job, optimizer, continued.seen)
            if getattr(settings, "save_optimizer", False)
            else {}
        )
        return {
            **save_adapter_of(job, base, attached.save, job.out, trainable),
            **state,
            **data.facts(),
        }

    return TrainingSetup(base, task, save)


def _prepare(
    job: Job, settings: Training, base: Base, first: int
) -> Generator[Event, None, Prepared]:
    batches, evaluation = yield from prepare_data(job, settings, base, first)
    return Prepared(batches, evaluation, OneLearner(base.model))


def attach_virtual(
    job: Job, settings: Any, base: Base, counted: FinetuningMethod
) -> Generator[Event, None, Attached]:
    """Put virtual tokens of the stage's kind before every sequence; they are saved in PEFT's
    format.
    """
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
    """Write an adapter and its tokenizer to `out`. Returns its entries of the manifest.

    The total is that of the unquantized model, whose weights are parameters.
    """
    folder = job.project.artifact("expand_vocab")
    facts = save(out)
    base.tokenizer.save(out, base.model.max_length)
    total = count(skeleton(folder, job.project.params.origin.trust_remote_code))["total"]
    parameters = {"total": total, "trainable": trainable, **facts.pop("parameters", {})}
    return {"base": base_fingerprint(folder), "parameters": parameters, **facts}
