"""A run of many adapters: one checkpoint for all, a loss curve for each."""

import shutil
from collections.abc import Generator, Iterator, Mapping
from contextlib import ExitStack

import torch

from pipeline.errors import Interrupted, first_line, is_out_of_memory
from pipeline.project.logs.outcomes import DIVERGED, STOPPED, write_run_outcomes
from pipeline.project.logs.run_log import LOSS, Peak, RunLog, Step, in_units
from pipeline.project.runner import Event, Job, Note, Progress, discard_checkpoints
from pipeline.training import checkpoint
from pipeline.training.batched.loop import AdapterProgress, steps
from pipeline.training.batched.step import BatchedTrainingTask
from pipeline.training.checkpoint import Checkpoint, HeldSignals
from pipeline.training.loop import NotFinite, OutOfMemory, measure_memory, prepare_model
from pipeline.training.memory.live_bytes import TensorMemoryMeter
from pipeline.training.optimizer import BatchedAdam


def train_batched(job: Job, task: BatchedTrainingTask) -> Generator[Event, None, AdapterProgress]:
    """Train all adapters in place. If killed at any step, the next call resumes.

    Returns how each adapter ended. Raises Interrupted after a signal, once a checkpoint is written, OutOfMemory, and
    NotFinite if all adapters diverged.
    """
    name, settings = job.stage.name, task.variants[0].settings
    task.model.to(prepare_model(task.model, settings.gradient_checkpointing))
    if not task.training_reader.supports_packing:
        yield Note(f"{name}: this model reads one sequence at a time; training is slower for it")
    optimizer, progress = _build_optimizer(task), AdapterProgress.of(len(task.variants))
    done = yield from _resume(job, task, optimizer, progress)
    live = TensorMemoryMeter()
    task.model.train()
    records = steps(task, optimizer, progress, done)
    records = measure_memory(live, _largest(task, done) - done, task.model, optimizer, records)
    yield from _log_and_checkpoint(job, task, optimizer, progress, done, live, records)
    yield from _finish(job, task, optimizer, progress, live)
    return progress


def _finish(
    job: Job, task: BatchedTrainingTask, optimizer: BatchedAdam, progress: AdapterProgress, live: TensorMemoryMeter
) -> Iterator[Event]:
    """Restore the best weights if there is an evaluation. Raises NotFinite if all adapters diverged."""
    name = job.stage.name
    yield from _show_messages(job, task, progress)
    if all(progress.diverged):
        raise NotFinite(f"{name}: all adapters diverged: none has a finite loss. Lower learning_rate.")
    if task.evaluation is not None:
        task.evaluation.restore_best(optimizer)
    task.model.eval()
    if live.peak:
        yield Note(f"{name}: {in_units(live.peak)} of tensors measured at the peak of the largest step", routine=True)


def _log_and_checkpoint(
    job: Job,
    task: BatchedTrainingTask,
    optimizer: BatchedAdam,
    progress: AdapterProgress,
    done: int,
    live: TensorMemoryMeter,
    records: Iterator[dict[int, Step]],
) -> Iterator[Event]:
    """Log every record to its adapter's loss.csv and checkpoint regularly; stop after the step of a signal."""
    name = job.stage.name
    with ExitStack() as stack:
        _write_outcomes(job, task, progress)
        logs = [stack.enter_context(_open_log(job, task, progress, n, done)) for n in range(len(task.variants))]
        signals = stack.enter_context(HeldSignals())
        try:
            for step_records in records:
                for n, record in step_records.items():
                    logs[n].append(record, Peak(0, live.peak), task.model.device.type)
                    done = record.step
                yield from _show_messages(job, task, progress)
                stop = signals.received or 0
                if stop or done % job.checkpoint_every == 0:
                    _save(job, task, logs, optimizer, progress, done)
                if stop:
                    raise Interrupted(stop, f"{name}: stopped after step {done} of {task.total}")
                yield Progress(done, task.total, _format_losses(step_records))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if optimizer.steps == done:  # otherwise evaluation failed, after a step that is not logged yet
                _save(job, task, logs, optimizer, progress, done)
            raise OutOfMemory(
                f"{name}: out of memory in step {done + 1} ({first_line(error)}). Train fewer adapters at "
                f"once: shorten {name}.grid, or lower finetune_lora.batch_size. The last checkpoint is kept."
            ) from None
        if signals.received:
            raise Interrupted(signals.received, f"{name}: stopped after the last step")


def _largest(task: BatchedTrainingTask, done: int) -> int:
    """The index of an epoch's largest step; not the next one, which `measure_memory` never measures."""
    batches = task.variants[0].batches
    return batches.largest_step(range(done + 1, min(done + 1 + len(batches), task.total)) or [done])


def _build_optimizer(task: BatchedTrainingTask) -> BatchedAdam:
    trained = {name: p for name, p in task.model.named_parameters() if p.requires_grad}
    faster = torch.tensor([variant.settings.loraplus_ratio for variant in task.variants])
    return BatchedAdam(trained.values(), [faster if name.endswith(".lora_B") else 1.0 for name in trained])


def _resume(
    job: Job, task: BatchedTrainingTask, optimizer: BatchedAdam, progress: AdapterProgress
) -> Generator[Event, None, int]:
    stored, reason = checkpoint.load(job.run, job.key)
    if reason:
        yield Note(f"{job.stage.name}: the checkpoint is not used and training starts over: {reason}")
    if stored is None:
        discard_checkpoints(job.run)  # before the logs are overwritten: a checkpoint is unusable without them
        for log in job.run.glob(f"*/{LOSS}"):  # also of adapters that are no longer in the sweep
            shutil.rmtree(log.parent)
        return 0
    optimizer.restore(stored.state)
    progress.restore(stored.state)
    if task.evaluation is not None:
        task.evaluation.restore(stored.state)
    yield Note(f"{job.stage.name}: resumed after step {stored.step}")
    return stored.step


def _open_log(job: Job, task: BatchedTrainingTask, progress: AdapterProgress, number: int, done: int) -> RunLog:
    variant = task.variants[number]
    folder = job.run / variant.name
    folder.mkdir(exist_ok=True)
    evaluated, retained = task.evaluation is not None, variant.retained is not None
    return RunLog(folder, min(done, progress.last(number, done)), progress.tokens[number], evaluated, retained)


def _save(
    job: Job,
    task: BatchedTrainingTask,
    logs: list[RunLog],
    optimizer: BatchedAdam,
    progress: AdapterProgress,
    done: int,
) -> None:
    for log in logs:
        log.sync()
    evaluation = task.evaluation.state() if task.evaluation is not None else {}
    lines = {f"{variant.name}/{LOSS}": progress.last(n, done) for n, variant in enumerate(task.variants)}
    state = {**optimizer.state(), **progress.state(), **evaluation}
    checkpoint.save(job.run, job.key, Checkpoint(done, sum(progress.tokens), state, lines))


def _show_messages(job: Job, task: BatchedTrainingTask, progress: AdapterProgress) -> Iterator[Event]:
    if progress.messages:
        _write_outcomes(job, task, progress)
    yield from (Note(f"{job.stage.name}: {text}") for text in progress.messages)
    progress.messages.clear()


def _write_outcomes(job: Job, task: BatchedTrainingTask, progress: AdapterProgress) -> None:
    """Write which adapters ended early, for other processes that show the run."""
    ended = {n: DIVERGED if progress.diverged[n] else STOPPED for n in progress.ended}
    write_run_outcomes(
        job.run, {task.variants[n].name: {"state": end, "steps": progress.last(n, 0)} for n, end in ended.items()}
    )


def _format_losses(records: Mapping[int, Step]) -> str:
    losses = [record.loss for record in records.values()]
    return f"{len(losses)} adapters, loss {min(losses):.3f} to {max(losses):.3f}"
