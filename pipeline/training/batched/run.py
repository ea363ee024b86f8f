"""A run of many adapters: logged, checkpointed and resumed as one, with a loss curve for each."""

import shutil
from collections.abc import Generator, Iterator, Mapping
from contextlib import ExitStack

import torch

from pipeline.errors import Interrupted, first_line, is_out_of_memory
from pipeline.project.logs.run_log import LOSS, Peak, RunLog, Step, in_units
from pipeline.project.params.grid import DIVERGED, STOPPED, tell_ends
from pipeline.project.runner import Event, Job, Note, Progress, discard_checkpoints
from pipeline.training import checkpoint
from pipeline.training.batched.loop import AdapterProgress, steps
from pipeline.training.batched.step import BatchedTrainingTask
from pipeline.training.checkpoint import Checkpoint, HeldSignals
from pipeline.training.loop import NotFinite, OutOfMemory, prepared, watched
from pipeline.training.memory.live_bytes import TensorMemoryMeter
from pipeline.training.optimizer import BatchedAdam


def train_batched(job: Job, task: BatchedTrainingTask) -> Generator[Event, None, AdapterProgress]:
    """Train all adapters in place; killed at any step, the next call goes on where it was.

    Returns how each of them ended. Raises Interrupted after a signal, with a checkpoint written, and NotFinite where
    none is left.
    """
    name, settings = job.stage.name, task.variants[0].settings
    task.model.to(prepared(task.model, settings.checkpointing))
    if not task.learned.supports_packing:
        yield Note(f"{name}: this model reads one sequence at a time; training is slower for it")
    optimizer, standing = _optimizer(task), AdapterProgress.of(len(task.variants))
    done = yield from _resumed(job, task, optimizer, standing)
    live = TensorMemoryMeter()
    task.model.train()
    records = watched(live, _largest(task, done) - done, task.model, optimizer, steps(task, optimizer, standing, done))
    yield from _logged(job, task, optimizer, standing, done, live, records)
    yield from _ended(job, task, optimizer, standing, live)
    return standing


def _ended(
    job: Job, task: BatchedTrainingTask, optimizer: BatchedAdam, standing: AdapterProgress, live: TensorMemoryMeter
) -> Iterator[Event]:
    """The best weights in place where they were looked for. Raises NotFinite where no adapter is left."""
    name = job.stage.name
    yield from _news(job, task, standing)
    if all(standing.diverged):
        raise NotFinite(f"{name}: no adapter is left: the loss of each is not finite. Lower learning_rate.")
    if task.evaluation is not None:
        task.evaluation.restore_best(optimizer)
    task.model.eval()
    if live.peak:
        yield Note(f"{name}: {in_units(live.peak)} of tensors measured at the peak of the largest step")


def _logged(
    job: Job,
    task: BatchedTrainingTask,
    optimizer: BatchedAdam,
    standing: AdapterProgress,
    done: int,
    live: TensorMemoryMeter,
    records: Iterator[dict[int, Step]],
) -> Iterator[Event]:
    """Every record in its adapter's log, a checkpoint from time to time; after a signal the step is the last."""
    name = job.stage.name
    with ExitStack() as stack:
        _tell_ends(job, task, standing)
        logs = [stack.enter_context(_log(job, task, standing, n, done)) for n in range(len(task.variants))]
        signals = stack.enter_context(HeldSignals())
        try:
            for each in records:
                for n, record in each.items():
                    logs[n].append(record, Peak(0, live.peak), task.model.device.type)
                    done = record.step
                yield from _news(job, task, standing)
                stop = signals.received or 0
                if stop or done % job.checkpoint_every == 0:
                    _save(job, task, logs, optimizer, standing, done)
                if stop:
                    raise Interrupted(stop, f"{name}: stopped after step {done} of {task.total}")
                yield Progress(done, task.total, _said(each))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if optimizer.steps == done:  # else it was while the step was evaluated, and the weights are those after it
                _save(job, task, logs, optimizer, standing, done)
            raise OutOfMemory(
                f"{name}: out of memory in step {done + 1} ({first_line(error)}). Train fewer at once: shorten "
                f"{name}.grid, or lower finetune_lora.batch_size. The last checkpoint is kept."
            ) from None
        if signals.received:
            raise Interrupted(signals.received, f"{name}: stopped after the last step")


def _largest(task: BatchedTrainingTask, done: int) -> int:
    """The step, of those in an epoch from the one after the next on, with the most tokens."""
    batches = task.variants[0].batches
    return batches.largest(range(done + 1, min(done + 1 + len(batches), task.total)) or [done])


def _optimizer(task: BatchedTrainingTask) -> BatchedAdam:
    trained = {name: p for name, p in task.model.named_parameters() if p.requires_grad}
    faster = torch.tensor([variant.settings.loraplus_ratio for variant in task.variants])
    return BatchedAdam(trained.values(), [faster if name.endswith(".lora_B") else 1.0 for name in trained])


def _resumed(
    job: Job, task: BatchedTrainingTask, optimizer: BatchedAdam, standing: AdapterProgress
) -> Generator[Event, None, int]:
    found, refused = checkpoint.load(job.run, job.key)
    if refused:
        yield Note(f"{job.stage.name}: the checkpoint is not used and training starts over: {refused}")
    if found is None:
        discard_checkpoints(job.run)  # before their logs are overwritten: without them they must never be used
        for log in job.run.glob(f"*/{LOSS}"):  # also those of a sweep whose adapters were others
            shutil.rmtree(log.parent)
        return 0
    optimizer.restore(found.state)
    standing.restore(found.state)
    if task.evaluation is not None:
        task.evaluation.restore(found.state)
    yield Note(f"{job.stage.name}: resumed after step {found.step}")
    return found.step


def _log(job: Job, task: BatchedTrainingTask, standing: AdapterProgress, number: int, done: int) -> RunLog:
    variant = task.variants[number]
    folder = job.run / variant.name
    folder.mkdir(exist_ok=True)
    evaluated, retained = task.evaluation is not None, variant.retained is not None
    return RunLog(folder, min(done, standing.last(number, done)), standing.tokens[number], evaluated, retained)


def _save(
    job: Job,
    task: BatchedTrainingTask,
    logs: list[RunLog],
    optimizer: BatchedAdam,
    standing: AdapterProgress,
    done: int,
) -> None:
    for log in logs:
        log.sync()
    evaluation = task.evaluation.state() if task.evaluation is not None else {}
    lines = {f"{variant.name}/{LOSS}": standing.last(n, done) for n, variant in enumerate(task.variants)}
    state = {**optimizer.state(), **standing.state(), **evaluation}
    checkpoint.save(job.run, job.key, Checkpoint(done, sum(standing.tokens), state, lines))


def _news(job: Job, task: BatchedTrainingTask, standing: AdapterProgress) -> Iterator[Event]:
    if standing.news:
        _tell_ends(job, task, standing)
    yield from (Note(f"{job.stage.name}: {text}") for text in standing.news)
    standing.news.clear()


def _tell_ends(job: Job, task: BatchedTrainingTask, standing: AdapterProgress) -> None:
    """Which adapters have ended before the others, for whoever watches from another process."""
    ended = {n: DIVERGED if standing.diverged[n] else STOPPED for n in standing.ended}
    tell_ends(
        job.run, {task.variants[n].name: {"state": end, "steps": standing.last(n, 0)} for n, end in ended.items()}
    )


def _said(records: Mapping[int, Step]) -> str:
    losses = [record.loss for record in records.values()]
    return f"{len(losses)} adapters, loss {min(losses):.3f} to {max(losses):.3f}"
