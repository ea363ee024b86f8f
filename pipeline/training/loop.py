"""The training loop: a generator of plain records, and the generator that logs, checkpoints and resumes it."""

import math
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch

from pipeline.calc.settings import FinetuningMethod
from pipeline.errors import Interrupted, UserError, first_line, is_out_of_memory
from pipeline.models.base import CausalLM, Checkpointing
from pipeline.models.device import device_for
from pipeline.models.load import Base
from pipeline.project.logs.run_log import Peak, RunLog, Step, in_units
from pipeline.project.params.sections import FinetuneLora, Training
from pipeline.project.runner import Event, Facts, Job, Note, Progress, discard_checkpoints
from pipeline.training import checkpoint
from pipeline.training.batches import Batches
from pipeline.training.checkpoint import Checkpoint, HeldSignals
from pipeline.training.distributed.collectives import (
    CollectiveError,
    ProcessLost,
    WorkerFinished,
    all_reduce_max,
    broadcast_object,
    broadcast_tensors,
    is_lost,
    is_main_process,
    needs_shards,
    raise_on_all_ranks,
    shard,
)
from pipeline.training.memory.forecast import predict_peak_memory, smaller
from pipeline.training.memory.live_bytes import TensorMemoryMeter
from pipeline.training.optimizer import BatchedAdam, FlatAdam
from pipeline.training.schedule import rate
from pipeline.training.step import Gradient, gradient, to_model_device

if TYPE_CHECKING:  # a run without them does not import them
    from pipeline.training.evaluation import Evaluation
    from pipeline.training.retention import RetentionLoss

T = TypeVar("T")


@dataclass(frozen=True)
class TrainingTask:
    """What is trained, and on what. `method` says to the calculator what is trainable.

    `sharded`: whether several processes keep a share of the frozen weights each; None: where one device is too small.
    """

    model: CausalLM
    batches: Batches
    settings: Training
    method: FinetuningMethod
    evaluation: "Evaluation | None" = None
    retain: "RetentionLoss | None" = None
    sharded: bool | None = None

    @property
    def total(self) -> int:
        """Steps, if nothing ends it before."""
        return self.settings.epochs * len(self.batches)


class TrainingSetup(NamedTuple):
    """A model that is about to learn something, and what saves it then: it fills the job's folder."""

    base: Base
    task: TrainingTask
    save: Callable[[FlatAdam], Facts]


class Diverged(Exception):
    """A loss or gradient of step `number` (from 0) is not finite; the weights are still those before it."""

    def __init__(self, number: int, found: Gradient) -> None:
        super().__init__(number)
        self.number, self.found = number, found


class OutOfMemory(CollectiveError):
    """A step needs more memory than there is."""


class NotFinite(CollectiveError):
    """A run ended because its loss is not finite: a study may count it, and go on."""


def steps(task: TrainingTask, optimizer: FlatAdam, done: int = 0, tokens: int = 0) -> Iterator[Step]:
    """Train from after step `done`, with `tokens` learned from, to the last epoch's end: one record a step.

    Raises Diverged.
    """
    model, settings, evaluation = task.model, task.settings, task.evaluation
    for number in range(done, task.total):
        if evaluation is not None and evaluation.should_stop:  # also where a resumed run begins
            return
        batches = task.batches[number]
        found = gradient(model, batches, optimizer, task.retain, number)
        if not found.finite:
            raise Diverged(number, found)
        if settings.clip_norm:
            optimizer.clip(found.norm, settings.clip_norm)
        learning_rate = rate(settings, number + 1, task.total)
        optimizer.step(learning_rate)
        tokens += found.tokens
        held_out = None
        if evaluation is not None and evaluation.due(number + 1, task.total):
            held_out = evaluation.after_step(model, optimizer)
        epoch = number // len(task.batches) + 1
        yield Step(number + 1, epoch, found.loss, learning_rate, found.norm, tokens, held_out, found.divergence)


def train(job: Job, task: TrainingTask) -> Generator[Event, None, FlatAdam]:
    """Train the model's trainable parameters in place; killed at any step, the next call goes on where it was.

    The calculator's prediction of the memory comes before the first step, what was measured after the last. Returns
    the optimizer, which has the trained weights in full precision.
    Raises Interrupted after a signal, with a checkpoint written, UserError if the loss is not finite or another process
    of the run is gone, and Helped at the end of what is not the first process.
    """
    raise_on_all_ranks()  # all processes have come so far
    try:
        optimizer = yield from _trained(job, task)
    except UserError as error:  # the others are not where they could be told: they see that this one is gone
        raise error if isinstance(error, CollectiveError) else CollectiveError(str(error)) from None
    except (RuntimeError, MemoryError) as error:  # before the first step: the model alone was too large
        if not is_out_of_memory(error):
            raise
        raise _too_large(job, task, error) from None
    if not is_main_process():
        raise WorkerFinished
    return optimizer


def _trained(job: Job, task: TrainingTask) -> Generator[Event, None, FlatAdam]:
    name, (device, sharded) = job.stage.name, _placed(task)
    if not task.model.supports_packing:
        yield Note(f"{name}: this model reads one sequence at a time; training is slower for it")
    optimizer = optimizer_of(task.model, task.settings)
    done, tokens = yield from _resumed(job, task, optimizer)
    largest = task.batches.largest(range(done + 1, min(done + 1 + len(task.batches), task.total)) or [done])
    predicted, live = 0 if sharded else _predicted(task, largest), TensorMemoryMeter()
    if predicted:
        yield Note(f"{name}: {in_units(predicted)} of tensors predicted at the peak of the largest step")
    log = RunLog(job.run, done, tokens, evaluated=task.evaluation is not None, retained=task.retain is not None)
    task.model.train()
    records = steps(task, optimizer, done, tokens)
    if not sharded:  # a share's bytes come and go out of torch's sight
        records = watched(live, largest - done, task.model, optimizer, records)
    with log, HeldSignals() as signals:
        try:
            for record in records:
                log.append(record, Peak(predicted, live.peak), device.type)
                done, tokens = record.step, record.tokens
                stop = all_reduce_max(signals.received or 0)
                if stop or record.step % job.checkpoint_every == 0:
                    _save(job, task, log, optimizer, record.step, record.tokens)
                if stop:
                    raise Interrupted(stop, f"{name}: stopped after step {record.step} of {task.total}")
                yield Progress(record.step, task.total, _said(record))
        except Diverged as diverged:
            optimizer.clear()
            _save(job, task, log, optimizer, done, tokens)
            raise _divergence(job, task, diverged) from None
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                raise _too_large(job, task, error, done, _kept(job, task, log, optimizer, done, tokens)) from None
            if not is_lost(error):
                raise
            raise ProcessLost.during(name, _kept(job, task, log, optimizer, done, tokens)) from None
        if signals.received:
            raise Interrupted(signals.received, f"{name}: stopped after the last step")
    yield from _ended(job, task, optimizer, done, live)
    return optimizer


def optimizer_of(model: CausalLM, settings: Training) -> FlatAdam:
    ratio = settings.loraplus_ratio if isinstance(settings, FinetuneLora) else 1.0
    return FlatAdam(model, settings.precision == "fp16", ratio)


def _placed(task: TrainingTask) -> tuple[torch.device, bool]:
    """The model is where it trains, and as it trains best there; whether its weights are shared out."""
    model, device = task.model, prepared(task.model, task.settings.checkpointing)
    sharded = needs_shards(model, device) if task.sharded is None else task.sharded
    if sharded:
        shard(model, device)
    model.to(device)
    return device, sharded


def prepared(model: CausalLM, checkpointing: Checkpointing) -> torch.device:
    """Where the model is to train; as it is best for that place, but not there yet."""
    device = device_for(model)
    model.checkpoint_blocks(checkpointing)
    if device.type == "cpu":
        model.prepare_cpu_training()
    return device


def _resumed(job: Job, task: TrainingTask, optimizer: FlatAdam) -> Generator[Event, None, tuple[int, int]]:
    """(Steps done, tokens learned from) of the checkpoint that the run goes on from."""
    found, refused = checkpoint.load(job.run, job.key)
    start, refused = broadcast_object((found and (found.step, found.tokens), refused))
    optimizer.broadcast_weights()
    if refused:
        yield Note(f"{job.stage.name}: the checkpoint is not used and training starts over: {refused}")
    if not start:
        discard_checkpoints(job.run)  # before their log is overwritten: without it they must never be used
        return 0, 0
    state = broadcast_tensors(found.state if found else {})
    optimizer.restore(state)
    if task.evaluation is not None:
        task.evaluation.restore(state)
    yield Note(f"{job.stage.name}: resumed after step {start[0]}")
    return start


def _kept(job: Job, task: TrainingTask, log: RunLog, optimizer: FlatAdam, done: int, tokens: int) -> str:
    """A checkpoint of the last whole step, where another process is gone; what to say of it."""
    if optimizer.steps != done:  # it was while the step was evaluated: the weights are those after it already
        return "The last periodic checkpoint stands. "
    optimizer.clear()
    _save(job, task, log, optimizer, done, tokens)
    return f"A checkpoint after step {done} of {task.total} is kept. "


def _too_large(job: Job, task: TrainingTask, error: BaseException, done: int = 0, kept: str = "") -> OutOfMemory:
    """What to lower, and what was kept: the memory may have been another program's."""
    batch = task.batches[min(done, task.total - 1)][0]
    less = smaller(task.model, task.method, task.settings, batch, job.stage.name)
    return OutOfMemory(
        f"{job.stage.name}: out of memory in step {done + 1} ({first_line(error)}). {less} {kept}".rstrip()
    )


def _predicted(task: TrainingTask, number: int) -> int:
    """Bytes of tensors at the peak of step `number`; 0 where the calculator does not know the model."""
    model, method, settings = task.model, task.method, task.settings
    found = [
        predict_peak_memory(model, method, settings, batch) for batch in to_model_device(model, task.batches[number])
    ]
    if task.retain is not None:
        kept = to_model_device(model, task.retain.batches(number))
        found += [predict_peak_memory(model, method, settings, batch, retained=True) for batch in kept]
    return max((size for size in found if size), default=0)


def _save(job: Job, task: TrainingTask, log: RunLog, optimizer: FlatAdam, step: int, tokens: int) -> None:
    if not is_main_process():
        return
    log.sync()
    evaluation = task.evaluation.state() if task.evaluation is not None else {}
    checkpoint.save(job.run, job.key, Checkpoint(step, tokens, {**optimizer.state(), **evaluation}))


def _said(record: Step) -> str:
    parts = [f"loss {record.loss:.3f}"]
    parts += [f"held out {record.eval_loss:.3f}"] if record.eval_loss is not None else []
    return "  ".join(parts)


def _ended(job: Job, task: TrainingTask, optimizer: FlatAdam, done: int, live: TensorMemoryMeter) -> Iterator[Event]:
    name = job.stage.name
    if task.evaluation is not None:
        if task.evaluation.should_stop:
            yield Note(f"{name}: stopped at step {done} of {task.total}: no better loss on what is held out")
        task.evaluation.restore_best(optimizer)
    task.model.eval()
    if live.peak:
        yield Note(f"{name}: {in_units(live.peak)} of tensors measured at the peak of the largest step")


def watched(
    live: TensorMemoryMeter, which: int, model: CausalLM, optimizer: FlatAdam | BatchedAdam, records: Iterator[T]
) -> Iterator[T]:
    """The same records; record number `which`, after the first, which makes the optimizer's state, is counted."""
    yield from islice(records, max(1, which))
    live.watch([*model.parameters(), *model.buffers(), *optimizer.tensors()])
    with live:
        watched = list(islice(records, 1))
    yield from watched
    yield from records


def _divergence(job: Job, task: TrainingTask, diverged: Diverged) -> NotFinite:
    name, found, number = job.stage.name, diverged.found, diverged.number
    only_retained = math.isfinite(found.loss) and not math.isfinite(found.divergence or 0)
    retain = task.retain if only_retained else None
    places = (retain or task.batches).places(number)
    shown = ", ".join(places[:8]) + (f" and {len(places) - 8} more" if len(places) > 8 else "")
    return NotFinite(
        f"{name}: the loss is {found.loss}{f', the divergence from the base {found.divergence}' if retain else ''} "
        f"and the gradient's norm {found.norm} at step {number + 1}, on {shown}. Lower {name}.learning_rate, "
        f"or look at these examples. The weights before that step are kept in "
        f"{job.run.parent.name}/{job.run.name}."
    )
