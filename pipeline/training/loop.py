"""The training loop as a generator of records, and a generator around it that logs, checkpoints and resumes."""

import math
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch

from pipeline.calc.method import FinetuningMethod
from pipeline.errors import Interrupted, UserError, first_line, is_out_of_memory
from pipeline.models.base import CausalLM, Checkpointing
from pipeline.models.device import device_for
from pipeline.models.load import Base
from pipeline.project.logs.run_log import Peak, RunLog, Step, in_units
from pipeline.project.params.sections import Training
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
from pipeline.training.memory.forecast import predict_peak_memory, suggest_less_memory
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
    """A model and the data to train it on. `method` tells the memory calculator which parameters are trainable.

    `sharded`: whether the frozen weights are sharded over the ranks; None: only if they do not fit on one device.
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
        """Number of steps without early stopping."""
        return self.settings.epochs * len(self.batches)


class TrainingSetup(NamedTuple):
    """A model that is ready to train; `save` then writes the artifact to the job's output folder."""

    base: Base
    task: TrainingTask
    save: Callable[[FlatAdam], Facts]


class Diverged(Exception):
    """The loss or gradient of step `number` (from 0) is not finite; the optimizer has not taken that step."""

    def __init__(self, number: int, gradient: Gradient) -> None:
        super().__init__(number)
        self.number, self.gradient = number, gradient


class OutOfMemory(CollectiveError):
    """A step ran out of memory."""


class NotFinite(CollectiveError):
    """Training stopped because the loss is not finite. A study may record this and continue with its next run."""


def steps(task: TrainingTask, optimizer: FlatAdam, done: int = 0, tokens: int = 0) -> Iterator[Step]:
    """Train to the end of the last epoch, starting after step `done` and `tokens` labelled tokens; a record per step.

    Raises Diverged.
    """
    model, settings, evaluation = task.model, task.settings, task.evaluation
    for number in range(done, task.total):
        if evaluation is not None and evaluation.should_stop:  # checked first: a resumed run may have stopped already
            return
        batches = task.batches[number]
        result = gradient(model, batches, optimizer, task.retain, number)
        if not result.finite:
            raise Diverged(number, result)
        if settings.max_grad_norm:
            optimizer.clip(result.norm, settings.max_grad_norm)
        learning_rate = rate(settings, number + 1, task.total)
        optimizer.step(learning_rate)
        tokens += result.tokens
        held_out = None
        if evaluation is not None and evaluation.due(number + 1, task.total):
            held_out = evaluation.after_step(model, optimizer)
        epoch = number // len(task.batches) + 1
        yield Step(number + 1, epoch, result.loss, learning_rate, result.norm, tokens, held_out, result.divergence)


def train(job: Job, task: TrainingTask) -> Generator[Event, None, FlatAdam]:
    """Train the model's trainable parameters in place. If killed at any step, the next call resumes.

    Notes the predicted peak memory before the first step and the measured one after the last. Returns the optimizer,
    which holds the trained weights in fp32.
    Raises Interrupted after a signal, once a checkpoint is written; UserError if the loss is not finite, memory runs
    out or another process of the run is gone; and WorkerFinished after the last step on ranks > 0.
    """
    raise_on_all_ranks()  # a rank that failed before training ends all of them here
    try:
        optimizer = yield from _train(job, task)
    except UserError as error:  # other ranks are inside the step: they notice only that this one is gone
        raise error if isinstance(error, CollectiveError) else CollectiveError(str(error)) from None
    except (RuntimeError, MemoryError) as error:  # before the first step: the model alone did not fit
        if not is_out_of_memory(error):
            raise
        raise _out_of_memory(job, task, error) from None
    if not is_main_process():
        raise WorkerFinished
    return optimizer


def _train(job: Job, task: TrainingTask) -> Generator[Event, None, FlatAdam]:
    name, (device, sharded) = job.stage.name, _place_model(task)
    if not task.model.supports_packing:
        yield Note(f"{name}: this model reads one sequence at a time; training is slower for it")
    optimizer = build_optimizer(task.model, task.settings)
    done, tokens = yield from _resume(job, task, optimizer)
    largest_step = task.batches.largest_step(range(done + 1, min(done + 1 + len(task.batches), task.total)) or [done])
    predicted, live = 0 if sharded else _predict_peak(task, largest_step), TensorMemoryMeter()
    if predicted:
        yield Note(f"{name}: {in_units(predicted)} of tensors predicted at the peak of the largest step", routine=True)
    log = RunLog(job.run, done, tokens, evaluated=task.evaluation is not None, retained=task.retain is not None)
    task.model.train()
    records = steps(task, optimizer, done, tokens)
    if not sharded:  # FSDP allocates and frees gathered weights unseen by the meter
        records = measure_memory(live, largest_step - done, task.model, optimizer, records)
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
                yield Progress(record.step, task.total, _format_losses(record))
        except Diverged as diverged:
            optimizer.clear()
            _save(job, task, log, optimizer, done, tokens)
            raise _not_finite(job, task, diverged) from None
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                checkpoint_note = _save_after_failure(job, task, log, optimizer, done, tokens)
                raise _out_of_memory(job, task, error, done, checkpoint_note) from None
            if not is_lost(error):
                raise
            raise ProcessLost.during(name, _save_after_failure(job, task, log, optimizer, done, tokens)) from None
        if signals.received:
            raise Interrupted(signals.received, f"{name}: stopped after the last step")
    yield from _finish(job, task, optimizer, done, live)
    return optimizer


def build_optimizer(model: CausalLM, settings: Training) -> FlatAdam:
    ratio = getattr(settings, "loraplus_ratio", 1.0)
    return FlatAdam(model, settings.precision == "fp16", ratio)


def _place_model(task: TrainingTask) -> tuple[torch.device, bool]:
    """Move the model to its device, prepared for training; returns the device and whether its weights are sharded."""
    model, device = task.model, prepare_model(task.model, task.settings.gradient_checkpointing)
    sharded = needs_shards(model, device) if task.sharded is None else task.sharded
    if sharded:
        shard(model, device)
    model.to(device)
    return device, sharded


def prepare_model(model: CausalLM, checkpointing: Checkpointing) -> torch.device:
    """Apply checkpointing and, on the CPU, faster kernels; returns the device to train on. Does not move the model."""
    device = device_for(model)
    model.checkpoint_blocks(checkpointing)
    if device.type == "cpu":
        model.prepare_cpu_training()
    return device


def _resume(job: Job, task: TrainingTask, optimizer: FlatAdam) -> Generator[Event, None, tuple[int, int]]:
    """Restore the newest checkpoint; returns (steps done, labelled tokens seen), (0, 0) if there is none."""
    stored, reason = checkpoint.load(job.run, job.key)
    progress, reason = broadcast_object((stored and (stored.step, stored.tokens), reason))
    optimizer.broadcast_weights()
    if reason:
        yield Note(f"{job.stage.name}: the checkpoint is not used and training starts over: {reason}")
    if not progress:
        discard_checkpoints(job.run)  # before loss.csv is overwritten: a checkpoint is unusable without its log
        return 0, 0
    state = broadcast_tensors(stored.state if stored else {})
    optimizer.restore(state)
    if task.evaluation is not None:
        task.evaluation.restore(state)
    yield Note(f"{job.stage.name}: resumed after step {progress[0]}")
    return progress


def _save_after_failure(job: Job, task: TrainingTask, log: RunLog, optimizer: FlatAdam, done: int, tokens: int) -> str:
    """Write a checkpoint of the last complete step after a failure; returns a sentence about it for the error."""
    if optimizer.steps != done:  # failed during evaluation: the optimizer has taken a step that is not logged yet
        return "The last periodic checkpoint is kept. "
    optimizer.clear()
    _save(job, task, log, optimizer, done, tokens)
    return f"A checkpoint after step {done} of {task.total} is kept. "


def _out_of_memory(
    job: Job, task: TrainingTask, error: BaseException, done: int = 0, checkpoint_note: str = ""
) -> OutOfMemory:
    """What to lower, and which checkpoint is kept: another program may have used the memory."""
    batch = task.batches[min(done, task.total - 1)][0]
    advice = suggest_less_memory(task.model, task.method, task.settings, batch, job.stage.name)
    return OutOfMemory(
        f"{job.stage.name}: out of memory in step {done + 1} ({first_line(error)}). {advice} {checkpoint_note}".rstrip()
    )


def _predict_peak(task: TrainingTask, number: int) -> int:
    """Predicted peak of step `number` in bytes of tensors; 0 if the calculator does not know the architecture."""
    model, method, settings = task.model, task.method, task.settings
    sizes = [
        predict_peak_memory(model, method, settings, batch) for batch in to_model_device(model, task.batches[number])
    ]
    if task.retain is not None:
        batches = to_model_device(model, task.retain.batches(number))
        sizes += [predict_peak_memory(model, method, settings, batch, retained=True) for batch in batches]
    return max((size for size in sizes if size), default=0)


def _save(job: Job, task: TrainingTask, log: RunLog, optimizer: FlatAdam, step: int, tokens: int) -> None:
    if not is_main_process():
        return
    log.sync()
    evaluation = task.evaluation.state() if task.evaluation is not None else {}
    checkpoint.save(job.run, job.key, Checkpoint(step, tokens, {**optimizer.state(), **evaluation}))


def _format_losses(record: Step) -> str:
    parts = [f"loss {record.loss:.3f}"]
    parts += [f"eval loss {record.eval_loss:.3f}"] if record.eval_loss is not None else []
    return "  ".join(parts)


def _finish(job: Job, task: TrainingTask, optimizer: FlatAdam, done: int, live: TensorMemoryMeter) -> Iterator[Event]:
    name = job.stage.name
    if task.evaluation is not None:
        if task.evaluation.should_stop:
            yield Note(f"{name}: stopped at step {done} of {task.total}: the evaluation loss no longer improves")
        task.evaluation.restore_best(optimizer)
    task.model.eval()
    if live.peak:
        yield Note(f"{name}: {in_units(live.peak)} of tensors measured at the peak of the largest step", routine=True)


def measure_memory(
    live: TensorMemoryMeter, number: int, model: CausalLM, optimizer: FlatAdam | BatchedAdam, records: Iterator[T]
) -> Iterator[T]:
    """The same records; `live` measures the step of record `number`, counted from 0.

    The first is never measured: it allocates the optimizer's state.
    """
    yield from islice(records, max(1, number))
    live.watch([*model.parameters(), *model.buffers(), *optimizer.tensors()])
    with live:
        measured = list(islice(records, 1))
    yield from measured
    yield from records


def _not_finite(job: Job, task: TrainingTask, diverged: Diverged) -> NotFinite:
    name, result, number = job.stage.name, diverged.gradient, diverged.number
    only_retained = math.isfinite(result.loss) and not math.isfinite(result.divergence or 0)
    retain = task.retain if only_retained else None
    locations = (retain or task.batches).locations(number)
    shown = ", ".join(locations[:8]) + (f" and {len(locations) - 8} more" if len(locations) > 8 else "")
    return NotFinite(
        f"{name}: the loss is {result.loss}{f', the divergence from the base {result.divergence}' if retain else ''} "
        f"and the gradient norm {result.norm} at step {number + 1}, on {shown}. Lower {name}.learning_rate, "
        f"or check these examples. The weights before that step are kept in "
        f"{job.run.parent.name}/{job.run.name}."
    )
