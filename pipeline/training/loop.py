"""The training loop: `steps` is a generator of records, `train` a run around it.

`train` logs the records, writes checkpoints and resumes from them. One learner is the case N = 1:
the same loop trains a model's own weights, one adapter, or the adapters of a sweep.
"""

import math
import signal
import threading
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from time import monotonic
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch

from pipeline.errors import Interrupted, OutOfMemory, UserError, is_out_of_memory
from pipeline.files.text import in_units
from pipeline.models.device import fast_precision
from pipeline.project.logs.run_log import (
    DIVERGED,
    STOPPED,
    Peak,
    RunLog,
    Sample,
    Step,
    write_run_outcomes,
)
from pipeline.project.process import hangs_up
from pipeline.project.runner import Event, Job, Note, Progress
from pipeline.training.memory.prediction import (
    measure_memory,
    memory_meter,
    predicted_peak,
    release,
    suggest_less_memory,
)
from pipeline.training.optimizer import FlatOptimizer, rate
from pipeline.training.parallel.collectives import (
    SLOWEST_STEP,
    CollectiveError,
    ProcessLost,
    all_reduce_max,
    broadcast_object,
    is_distributed,
    is_lost,
    limit_waiting,
    raise_on_all_ranks,
)
from pipeline.training.saving import save_step
from pipeline.training.step import NO_BETTER, Gradient, gradients
from pipeline.training.task import (
    TrainingTask,
    build_optimizer,
    prepare_model,
    resume,
    write_checkpoint,
)

if TYPE_CHECKING:  # a run without it does not import it
    from pipeline.training.data import Prompts

# steps, and seconds of work where these take longer, that a kill may cost
RESUME_EVERY, MOST_LOST = 100, 600.0


class Diverged(Exception):
    """In step `number` (from 0) the last learners' gradients are not finite; it is not taken."""

    def __init__(self, number: int, gradients: Mapping[int, Gradient]) -> None:
        super().__init__(number)
        self.number, self.gradients = number, gradients


class TrainingOutOfMemory(CollectiveError, OutOfMemory):
    """Memory ran out on this rank."""


class NotFinite(CollectiveError):
    """Training stopped because the loss is not finite. A study may go on with its next run."""


def steps(task: TrainingTask, optimizer: FlatOptimizer, done: int = 0) -> Iterator[dict[int, Step]]:
    """Train from step `done` to the last; yields a record per learner that took the step.

    A learner whose loss or gradient is not finite is stopped before the step, one that no longer
    improves after it. The others continue as if it were not there. Raises Diverged if that leaves
    none, and all diverged.
    """
    settings = [learner.settings for learner in task.learners]
    if not any(
        section.neftune_alpha or getattr(section, "lora_dropout", 0) for section in settings
    ):
        yield from _steps(task, optimizer, done)
        return
    from pipeline.training.noise import training_noise  # a run without noise does not load it

    with training_noise(task.model, settings) as noises:
        for learner, noise in zip(task.learners, noises, strict=True):
            learner.noise = noise
        yield from _steps(task, optimizer, done)


def _steps(task: TrainingTask, optimizer: FlatOptimizer, done: int) -> Iterator[dict[int, Step]]:
    learners, evaluation = task.learners, task.evaluation
    best_by_answers = task.settings.metric_for_best_model == "eval_answers"

    for number in range(done, task.total):
        # first: a resumed run may have stopped already
        _stop_early(task, number)

        results = _finite_gradients(task, optimizer, number)
        if not results:
            return

        # a learner without a rate keeps weights and moments
        rates = {n: rate(learners[n].settings, number + 1, task.total) for n in results}
        for n, result in results.items():
            if largest := learners[n].settings.max_grad_norm:
                optimizer.clip(n, result.norm, largest)
            learners[n].tokens += result.tokens
        optimizer.step(*map(rates.get, range(len(learners))))

        rewards: dict[str, Any] = {**task.path.measured()}
        held_out: Mapping[int, float] = {}
        shares: Mapping[int, float] = {}
        if evaluation is not None and evaluation.due(number + 1, task.total):
            shares = _answer_questions(task, [*results], number + 1)
            judged = shares if best_by_answers else None
            held_out = evaluation.after_step(task.path, optimizer, [*results], number + 1, judged)
            if task.path.rewards:
                rewards["eval_accuracy"] = task.path.measured()["reward_accuracy"]

        records = {}
        for n, result in results.items():
            records[n] = Step(
                step=number + 1,
                epoch=number // len(task.batches) + 1,
                loss=result.loss,
                learning_rate=rates[n],
                grad_norm=result.norm,
                tokens=learners[n].tokens,
                eval_loss=held_out.get(n),
                divergence=result.divergence,
                eval_answers=shares.get(n),
                **rewards,
            )
        yield records


def _stop_early(task: TrainingTask, number: int) -> None:
    """Stop the learners that their evaluations end before step `number`."""
    if task.evaluation is None:
        return
    for n in task.live:
        reason = task.evaluation.why_stop(n)
        if not reason:
            continue
        measure = "evaluation loss"
        if reason == NO_BETTER and task.settings.metric_for_best_model == "eval_answers":
            measure = "share of expected answers"
        learner = task.learners[n]
        what = f"stopped at step {number} of {task.total}: the"
        if learner.name:
            what = f"{learner.name} stopped after step {number}: its"
        learner.stop(number, f"{what} {measure} {reason}")


def _answer_questions(task: TrainingTask, learners: Sequence[int], step: int) -> dict[int, float]:
    """Learner → mean score of its answers to the held-out questions, which it keeps; or empty."""
    if task.questions is None:
        return {}
    from pipeline.data.answers.match import match  # a run without them does not load it

    shares = {}
    for n in learners:
        answers = task.learners[n].answers = _answers(task, task.questions, n, step)
        scores = [match(answer.answer or "", answer.expected or "").score for answer in answers]
        shares[n] = math.fsum(scores) / len(scores)
    # all ranks stop after the same step
    return broadcast_object(shares) if is_distributed() else shares


def _answers(task: TrainingTask, prompts: "Prompts", learner: int, step: int) -> list[Sample]:
    """What a learner answers, alone where others train on the same base."""
    if not task.learners[learner].name:
        return prompts.answers(step)
    from pipeline.adapters.batched import only_adapter

    with only_adapter(task.model, learner):
        return prompts.answers(step)


def _finite_gradients(
    task: TrainingTask, optimizer: FlatOptimizer, number: int
) -> dict[int, Gradient]:
    """The gradients of step `number` of those whose gradients are finite; the others stop."""
    while live := task.live:
        results = gradients(task.path, task.learners, live, optimizer, number)
        suspects = [n for n, result in results.items() if not result.finite]
        if not suspects:
            return results
        # NaN can spread to other learners in the batch: running each alone shows whose it is
        if len(live) > 1:
            alone: dict[int, Gradient] = {}
            for n in suspects:
                alone |= gradients(task.path, task.learners, [n], optimizer, number)
            results = {n: result for n, result in alone.items() if not result.finite} or alone
        for n, result in results.items():
            learner = task.learners[n]
            where = _shorten(learner.batches.locations(number), 4)
            learner.stop(
                number,
                f"{learner.name} is stopped: at step {number + 1}, on {where}, its loss is "
                f"{result.loss:.4g} and its gradient norm {result.norm:.4g}. Lower its "
                "learning_rate.",
                diverged=True,
            )
        optimizer.clear()
        if not task.all_may_diverge and all(learner.diverged for learner in task.learners):
            raise Diverged(number, results)
    return {}


def _shorten(locations: Sequence[str], most: int) -> str:
    more = f" and {len(locations) - most} more" if len(locations) > most else ""
    return ", ".join(locations[:most]) + more


def train(job: Job, task: TrainingTask) -> Generator[Event, None, FlatOptimizer]:
    """Train the model's trainable parameters in place; a killed run resumes at the next call.

    Notes the predicted peak memory before the first step and the measured one after the last.
    Returns the optimizer, which holds the trained weights in fp32; the artifact is then written by
    rank 0 alone (`is_main_process`). Raises Interrupted after a signal, once a checkpoint is
    written; UserError if no learner's loss is finite, memory runs out or another process of the run
    is gone.
    """
    raise_on_all_ranks()  # a rank that failed before training ends all of them here
    limit_waiting(SLOWEST_STEP)
    try:
        return (yield from _train(job, task))
    # other ranks are inside the step: they notice only that this one is gone
    except UserError as error:
        raise error if isinstance(error, CollectiveError) else CollectiveError(str(error)) from None
    # before the first step: the model alone did not fit
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise _out_of_memory(job, task, release(error)) from None


def _train(job: Job, task: TrainingTask) -> Generator[Event, None, FlatOptimizer]:
    name, model = job.stage.name, task.model
    device, sharded = yield from _place_model(name, task)
    for computation in job.deferred:
        yield from computation
    optimizer = build_optimizer(model, *(learner.settings for learner in task.learners))
    done = yield from resume(job, task, optimizer)
    continued_steps = optimizer.steps - done  # of the run that this one continues

    # an epoch's largest step, but not the next one, which `measure_memory` never measures
    epoch = range(done + 1, min(done + 1 + len(task.batches), task.total))
    largest = task.batches.largest_step(epoch or [done])
    predicted = 0 if sharded else predicted_peak(task, largest)
    if predicted:
        yield Note(
            f"{name}: {in_units(predicted)} of tensors predicted at the peak of the largest step",
            routine=True,
        )
    model.train()
    records, meter = steps(task, optimizer, done), memory_meter(device)
    # FSDP allocates and frees gathered weights unseen by a meter of tensors
    if not sharded or device.type == "cuda":
        records = measure_memory(meter, largest - done, model, optimizer, records)

    with ExitStack() as stack:
        _write_outcomes(job, task)
        logs = [stack.enter_context(log) for log in _open_logs(job, task, done)]
        signals = stack.enter_context(_held_signals())
        save = partial(write_checkpoint, job, task, logs, optimizer)
        every, saved_at = job.checkpoint_every or RESUME_EVERY, monotonic()
        try:
            # Steps after the last checkpoint are lost when the run is killed. The next run takes
            # them again with the same data and weights, so that its log and its result are those of
            # an uninterrupted run.
            for by_learner in records:
                for n, record in by_learner.items():
                    logs[n].append(record, Peak(predicted, meter.peak), device.type)
                    done = record.step
                yield from _tell_stops(job, task)
                _append_samples(task, logs, [*by_learner], done)
                if task.saves(done):
                    # before the checkpoint, from which a resumed run would not come by here again
                    save_step(job, task, optimizer, by_learner[0])
                # all ranks stop after the same step
                stop = all_reduce_max(signals[-1] if signals else 0)
                if stop or done % every == 0 or monotonic() - saved_at > MOST_LOST:
                    save(done)
                    saved_at = monotonic()
                if stop:
                    raise Interrupted(stop, f"{name}: stopped after step {done} of {task.total}")
                yield Progress(done, task.total, _describe_losses(task, by_learner))
        except Diverged as diverged:
            yield from _tell_stops(job, task)
            # the checkpoint is of the state before this step: a run with it meets the step again
            for n in diverged.gradients:
                task.learners[n].resume()
            save(done)
            raise NotFinite(_describe_divergence(job, task, diverged)) from None
        # torch tells a lack of memory and a lost rank as RuntimeError
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) and not is_lost(error):
                raise
            reason = release(error)
            # failed during evaluation: a step was taken that is not logged
            if optimizer.steps != continued_steps + done:
                checkpoint_note = "The last periodic checkpoint is kept. "
            else:
                optimizer.clear()
                save(done)
                checkpoint_note = f"A checkpoint after step {done} of {task.total} is kept. "
            if is_out_of_memory(error):
                raise _out_of_memory(job, task, reason, done, checkpoint_note) from None
            raise ProcessLost.during(name, checkpoint_note) from None
        if signals:  # after the last record was handled
            raise Interrupted(signals[-1], f"{name}: stopped after the last step")

    yield from _tell_stops(job, task)
    # after the last checkpoint, which keeps the newest weights and the best ones
    if task.evaluation is not None:
        task.evaluation.restore_best(optimizer)
        best = task.evaluation.best_step
        if task.settings.takes_best and best != done and not task.learners[0].name:
            yield Note(f"{name}: takes the weights after step {best}, its best evaluation")
    model.eval()
    if meter.peak:
        yield Note(
            f"{name}: {in_units(meter.peak)} of tensors measured at the peak of the largest "
            f"step{meter.beside}",
            routine=True,
        )
    if task.settings.compile:
        from pipeline.models.kernels.compiled import seconds_compiling

        yield Note(f"{name}: compiling took {seconds_compiling():.0f} s of the run")
    return optimizer


def _place_model(
    name: str, task: TrainingTask
) -> Generator[Event, None, tuple[torch.device, bool]]:
    """Move the model to its device, ready to train; returns the device and whether it is sharded.

    Raises UserError if it cannot be compiled.
    """
    model, settings = task.model, task.settings
    if settings.compile and (task.learners[0].name or not model.compiles):
        raise UserError(
            f"{name}: compile is true, but only an imported model with one adapter is compiled. "
            "Set compile to false."
        )
    with task.path.base():
        device = prepare_model(model, settings.gradient_checkpointing, settings.compile)
    if settings.precision == "bf16" and fast_precision(device) == "fp16":
        yield Note(
            f"{name}: this GPU has no bf16 instructions and is slow with it. Set "
            f"{name}.precision=fp16."
        )
    sharded = False
    if is_distributed():
        # most runs in one process do not import it
        from pipeline.training.parallel.sharding import needs_shards, shard

        longest = task.batches.largest_step(range(len(task.batches)))
        peak = partial(predicted_peak, task, longest, device)
        sharded = needs_shards(model, device, peak) if task.sharded is None else task.sharded
        if sharded:  # before the move: the whole model does not fit on one device
            shard(model, device)
    model.to(device)  # before the optimizer, whose weights are the model's own storage
    if not task.path.supports_packing:
        yield Note(f"{name}: this model reads one sequence at a time; training is slower for it")
    return device, sharded


def _open_logs(job: Job, task: TrainingTask, done: int) -> Iterator[RunLog]:
    """Each learner's log, without the lines after step `done`, whose steps are taken again."""
    for learner in task.learners:
        folder = job.run / learner.name
        folder.mkdir(exist_ok=True)
        yield RunLog(
            folder,
            done if learner.stopped is None else learner.stopped,
            learner.tokens,
            evaluated=task.evaluation is not None,
            retained=learner.retain is not None,
            rewarded=task.path.rewards,
            sampled=task.prompts is not None,
            answered=task.questions is not None,
        )


def _append_samples(
    task: TrainingTask, logs: Sequence[RunLog], learners: Sequence[int], step: int
) -> None:
    """The answers of the learners that took the step, if it is one after which they answer."""
    for n in learners:
        logs[n].append_samples(task.learners[n].answers)
        task.learners[n].answers = ()
    if task.prompts is None:
        return
    every = task.prompts.every or task.settings.eval_steps or len(task.batches)
    if step % every and step != task.total:
        return
    for n in learners:
        logs[n].append_samples(_answers(task, task.prompts, n, step))


def _describe_losses(task: TrainingTask, records: Mapping[int, Step]) -> str:
    losses = [record.loss for record in records.values()]
    if task.learners[0].name:
        return f"{len(losses)} adapters, loss {min(losses):.3f} to {max(losses):.3f}"
    held_out = records[0].eval_loss
    return f"loss {losses[0]:.3f}" + ("" if held_out is None else f"  eval loss {held_out:.3f}")


@contextmanager
def _held_signals() -> Iterator[list[int]]:
    """Defer Ctrl-C, SIGTERM and a closed terminal to the end of a step; yields those received.

    So a checkpoint never holds half a step. Only the first of these signals is held; the second is
    handled as usual.
    """
    received, previous = list[int](), dict[int, Any]()

    def hold(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        signal.signal(number, previous[number])

    if threading.current_thread() is threading.main_thread():  # no other thread may set a handler
        for number in (signal.SIGINT, signal.SIGTERM, *[signal.SIGHUP] * hangs_up()):
            # before `hold` is there, which needs it
            previous[number] = signal.getsignal(number)
            signal.signal(number, hold)
    try:
        yield received
    finally:
        for held, handler in previous.items():
            signal.signal(held, handler)


def _tell_stops(job: Job, task: TrainingTask) -> Iterator[Event]:
    """A note for each learner that was stopped since the last call.

    A single learner that diverged has no note: an error follows.
    """
    stopped = [learner for learner in task.learners if learner.message]
    if stopped:
        _write_outcomes(job, task)
    for learner in stopped:
        if learner.name or not learner.diverged:
            yield Note(f"{job.stage.name}: {learner.message}")
        learner.message = ""


def _write_outcomes(job: Job, task: TrainingTask) -> None:
    """Write which adapters of a sweep ended early, for other processes that show the run."""
    if not task.learners[0].name:
        return
    outcomes = {**task.earlier}
    for learner in task.learners:
        if learner.stopped is not None:
            state = DIVERGED if learner.diverged else STOPPED
            outcomes[learner.name] = {"state": state, "steps": learner.stopped}
    write_run_outcomes(job.run, outcomes)


def _out_of_memory(
    job: Job, task: TrainingTask, reason: str, done: int = 0, checkpoint_note: str = ""
) -> TrainingOutOfMemory:
    """The error, with what to lower and which checkpoint is kept.

    The run may fit when it is resumed: another program may have used the memory.
    """
    step = min(done, task.total - 1)
    advice = task.less_memory or suggest_less_memory(
        task.model,
        task.method,
        task.settings,
        task.batches[step][0],
        task.batches.longest_alone(step),
        job.stage.name,
    )
    return TrainingOutOfMemory(
        f"{job.stage.name}: out of memory in step {done + 1} ({reason}). {advice} "
        f"{checkpoint_note}".rstrip()
    )


def _describe_divergence(job: Job, task: TrainingTask, diverged: Diverged) -> str:
    name, learner = job.stage.name, task.learners[0]
    if learner.name:
        return f"{name}: all adapters diverged: none has a finite loss. Lower learning_rate."
    result, batches, also = diverged.gradients[0], learner.batches, ""
    if (
        learner.retain is not None
        and math.isfinite(result.loss)
        and not math.isfinite(result.divergence or 0)
    ):
        batches = learner.retain.batches
        also = f", the divergence from the base {result.divergence}"
    where = _shorten(batches.locations(diverged.number), 8)
    return (
        f"{name}: the loss is {result.loss}{also} and the gradient norm {result.norm} at step "
        f"{diverged.number + 1}, on {where}. Lower {name}.learning_rate, or check these examples. "
        f"The weights before that step are kept in {job.run.parent.name}/{job.run.name}."
    )
