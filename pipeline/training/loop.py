"""The training loop as a generator of records, and a generator around it that logs, checkpoints and
resumes.

One learner is the case N = 1: the same loop trains a model's own weights, one adapter, or the
adapters of a sweep.
"""

import gc
import math
import shutil
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from time import monotonic
from types import FrameType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from pipeline.calc.method import FinetuningMethod
from pipeline.errors import Interrupted, UserError, first_line, is_out_of_memory
from pipeline.files import artifact
from pipeline.files.text import in_units
from pipeline.models.base import CausalLM, Checkpointing
from pipeline.models.device import device_for, multiplies_bf16
from pipeline.models.kernels import uses_cpu_kernels
from pipeline.models.load import Base
from pipeline.models.save import load_tensors, save_tensors
from pipeline.project.logs.run_log import (
    DIVERGED,
    LOSS,
    SAMPLES,
    STOPPED,
    Peak,
    RunLog,
    Sample,
    Step,
    count_lines,
    read_steps,
    write_run_outcomes,
)
from pipeline.project.params.sections import Training
from pipeline.project.process import hangs_up
from pipeline.project.runner import (
    Event,
    Facts,
    Job,
    Note,
    Progress,
    checkpoints,
    discard_checkpoints,
)
from pipeline.training.batches import Batches
from pipeline.training.memory.prediction import (
    MemoryMeter,
    memory_meter,
    predict_peak_memory,
    suggest_less_memory,
)
from pipeline.training.optimizer import FlatOptimizer, rate
from pipeline.training.parallel.collectives import (
    SLOWEST_STEP,
    CollectiveError,
    ProcessLost,
    all_reduce_max,
    broadcast_object,
    broadcast_tensors,
    is_distributed,
    is_lost,
    is_main_process,
    limit_waiting,
    raise_on_all_ranks,
)
from pipeline.training.step import (
    NO_BETTER,
    Evaluation,
    Gradient,
    Learner,
    LossPath,
    OneLearner,
    gradients,
    to_model_device,
)
from pipeline.training.update_rules import rule_of

if TYPE_CHECKING:  # a run without it does not import it
    from pipeline.training.data import Prompts
    from pipeline.training.retention import RetentionLoss

T = TypeVar("T")
MOST_LOST = 600.0  # seconds of work that a kill may cost, where save_steps take longer
STATE = "state.safetensors"  # a checkpoint's tensors
PROGRESS = ("tokens", "stopped", "diverged")  # of the learners in a checkpoint; stopped -1: running


@dataclass(frozen=True)
class TrainingTask:
    """A model and its learners, which differ in settings and order of the data but not in the
    number of steps.

    `method` tells the memory calculator which parameters are trainable; None: it does not know
    them. `sharded`: whether the frozen weights are sharded over the ranks; None: only if they do
    not fit on one device. `less_memory`: what to do when memory runs out; by default what the
    calculator suggests. `state`: the optimizer's, of the run that this one continues. `earlier`:
    name → outcome of the adapters of a sweep's earlier passes, whose logs stay. `prompts`: what the
    learners answer while they train. `questions`: held-out examples that they answer at each
    evaluation.
    """

    model: CausalLM
    learners: Sequence[Learner]
    path: LossPath
    evaluation: Evaluation | None = None
    method: FinetuningMethod | None = None
    sharded: bool | None = None
    less_memory: str = ""
    state: Mapping[str, Tensor] | None = None
    earlier: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    prompts: "Prompts | None" = None
    questions: "Prompts | None" = None

    @classmethod
    def of_one(
        cls,
        model: CausalLM,
        batches: Batches,
        settings: Training,
        method: FinetuningMethod | None,
        evaluation: Evaluation | None = None,
        retain: "RetentionLoss | None" = None,
        sharded: bool | None = None,
        prompts: "Prompts | None" = None,
        questions: "Prompts | None" = None,
    ) -> "TrainingTask":
        """The task of one learner: whatever parameters of `model` require a gradient."""
        learner = Learner(settings, batches, retain)
        return cls(
            model,
            [learner],
            OneLearner(model),
            evaluation,
            method,
            sharded,
            prompts=prompts,
            questions=questions,
        )

    @property
    def settings(self) -> Training:
        """Those of the first learner; epochs, batches, evaluation and checkpointing are the same
        for all.
        """
        return self.learners[0].settings

    @property
    def batches(self) -> Batches:
        return self.learners[0].batches

    @property
    def total(self) -> int:
        """Number of steps without early stopping."""
        return self.settings.total_steps(len(self.batches))

    @property
    def live(self) -> list[int]:
        """The learners that were not stopped."""
        return [n for n, learner in enumerate(self.learners) if learner.stopped is None]


class TrainingSetup(NamedTuple):
    """A model that is ready to train; `save` then writes the artifact to the job's output
    folder.
    """

    base: Base
    task: TrainingTask
    save: Callable[[FlatOptimizer], Facts]


class Diverged(Exception):
    """In step `number` (from 0) the last learners' losses or gradients are not finite; that step is
    not taken.
    """

    def __init__(self, number: int, gradients: Mapping[int, Gradient]) -> None:
        super().__init__(number)
        self.number, self.gradients = number, gradients


class NotFinite(CollectiveError):
    """Training stopped because the loss is not finite. A study may record this and continue with
    its next run.
    """


def steps(task: TrainingTask, optimizer: FlatOptimizer, done: int = 0) -> Iterator[dict[int, Step]]:
    """Train to the end of the last epoch, starting after step `done`; yields a record per learner
    that took the step.

    A learner whose loss or gradient is not finite is stopped before the step, one that no longer
    improves after it. The others continue as if it were not there. Raises Diverged if that leaves
    none, and all diverged.
    """
    settings = [learner.settings for learner in task.learners]
    if not any(getattr(each, "lora_dropout", 0) or each.neftune_alpha for each in settings):
        yield from _steps(task, optimizer, done)
        return
    from pipeline.training.noise import training_noise  # a run without noise does not need it

    with training_noise(task.model, settings) as noises:
        for learner, noise in zip(task.learners, noises, strict=False):
            learner.noise = noise
        yield from _steps(task, optimizer, done)


def _steps(task: TrainingTask, optimizer: FlatOptimizer, done: int) -> Iterator[dict[int, Step]]:
    learners, evaluation = task.learners, task.evaluation
    best_by_answers = task.settings.metric_for_best_model == "eval_answers"
    for number in range(done, task.total):
        # first: a resumed run may have stopped already
        for n in task.live if evaluation is not None else ():
            if evaluation is not None and (why := evaluation.why_stop(n)):
                name = learners[n].name
                what = f"{name} stopped after step {number}: its"
                if not name:
                    what = f"stopped at step {number} of {task.total}: the"
                judged = best_by_answers and why == NO_BETTER
                learners[n].stop(
                    number,
                    f"{what} {'share of expected answers' if judged else 'evaluation loss'} {why}",
                )
        results = _finite_gradients(task, optimizer, number)
        if not results:
            return
        rates = {n: rate(learners[n].settings, number + 1, task.total) for n in results}
        for n, result in results.items():
            if largest := learners[n].settings.max_grad_norm:
                optimizer.clip(n, result.norm, largest)
            learners[n].tokens += result.tokens
        # a learner without a rate keeps weights and moments
        optimizer.step(*map(rates.get, range(len(learners))))
        rewards, held_out = dict[str, Any](task.path.measured()), dict[int, float]()
        shares: Mapping[int, float] = {}
        if evaluation is not None and evaluation.due(number + 1, task.total):
            shares = _answer_questions(task, [*results], number + 1)
            held_out = evaluation.after_step(
                task.path, optimizer, [*results], number + 1, shares if best_by_answers else None
            )
            if task.path.rewards:
                rewards["eval_accuracy"] = task.path.measured()["reward_accuracy"]
        epoch = number // len(task.batches) + 1
        yield {
            n: Step(
                *(
                    number + 1,
                    epoch,
                    r.loss,
                    rates[n],
                    r.norm,
                    learners[n].tokens,
                    held_out.get(n),
                    r.divergence,
                ),
                **rewards,
                eval_answers=shares.get(n),
            )
            for n, r in results.items()
        }


def _answer_questions(task: TrainingTask, learners: Sequence[int], step: int) -> dict[int, float]:
    """Learner → the mean score of its answers to the held-out questions, which it keeps; empty
    without questions.
    """
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
    """The gradients of step `number`, once the learners that make them non-finite are stopped; none
    if all are.
    """
    while live := task.live:
        results = gradients(task.path, task.learners, live, optimizer, number)
        suspects = [n for n, result in results.items() if not result.finite]
        if not suspects:
            return results
        # NaN can spread to other learners in the batch: running each alone shows whose it is
        if len(live) > 1:
            alone = {
                n: gradients(task.path, task.learners, [n], optimizer, number)[n] for n in suspects
            }
            results = {n: result for n, result in alone.items() if not result.finite} or alone
        for n, result in results.items():
            learner = task.learners[n]
            where = _shorten(learner.batches.locations(number), 4)
            learner.stop(
                number,
                f"{learner.name} is stopped: at step {number + 1}, on {where}, its loss is "
                f"{result.loss:.4g} and its "
                f"gradient norm {result.norm:.4g}. Lower its learning_rate.",
                diverged=True,
            )
        optimizer.clear()
        if all(learner.diverged for learner in task.learners):
            raise Diverged(number, results)
    return {}


def _shorten(locations: Sequence[str], most: int) -> str:
    return ", ".join(locations[:most]) + (
        f" and {len(locations) - most} more" if len(locations) > most else ""
    )


def train(job: Job, task: TrainingTask) -> Generator[Event, None, FlatOptimizer]:
    """Train the model's trainable parameters in place. If killed at any step, the next call
    resumes.

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
    name, model, evaluation = job.stage.name, task.model, task.evaluation
    if task.settings.compile and (task.learners[0].name or not model.compiles):
        raise UserError(
            f"{name}: compile is true, but only an imported model with one adapter is compiled. "
            "Set compile to false."
        )
    with task.path.base():
        device = prepare_model(model, task.settings.gradient_checkpointing, task.settings.compile)
    if device.type == "cuda" and task.settings.precision == "bf16" and not multiplies_bf16(device):
        yield Note(
            f"{name}: this GPU has no bf16 instructions and is slow with it. Set "
            f"{name}.precision=fp16."
        )
    sharded = False
    if is_distributed():
        # a run in one process does not import it
        from pipeline.training.parallel.sharding import needs_shards, shard

        longest = task.batches.largest_step(range(len(task.batches)))
        peak = partial(predicted_peak, task, longest, device)
        sharded = needs_shards(model, device, peak) if task.sharded is None else task.sharded
        if sharded:  # before the move: the whole model does not fit on one device
            shard(model, device)
    model.to(device)  # before the optimizer, whose weights are the model's own storage
    if not task.path.supports_packing:
        yield Note(f"{name}: this model reads one sequence at a time; training is slower for it")
    optimizer = build_optimizer(model, *(learner.settings for learner in task.learners))
    # into the optimizer, whose state a checkpoint is
    done = yield from _resume(job, task, optimizer)
    before = optimizer.steps - done  # of the run that this one continues
    # an epoch's largest step, but not the next one, which `measure_memory` never measures
    epoch = range(done + 1, min(done + 1 + len(task.batches), task.total))
    largest_step = task.batches.largest_step(epoch or [done])
    predicted, live = 0 if sharded else predicted_peak(task, largest_step), memory_meter(device)
    if predicted:
        yield Note(
            f"{name}: {in_units(predicted)} of tensors predicted at the peak of the largest step",
            routine=True,
        )
    model.train()
    records = steps(task, optimizer, done)
    # FSDP allocates and frees gathered weights unseen by a meter of tensors
    if not sharded or device.type == "cuda":
        records = measure_memory(live, largest_step - done, model, optimizer, records)
    with ExitStack() as stack:
        _write_outcomes(job, task)
        logs = []
        for learner in task.learners:
            # lines after the checkpoint are from steps that a killed run took and this one takes
            # again
            folder, at_step = (
                job.run / learner.name,
                done if learner.stopped is None else learner.stopped,
            )
            folder.mkdir(exist_ok=True)
            columns = {
                "evaluated": evaluation is not None,
                "retained": learner.retain is not None,
                "rewarded": task.path.rewards,
                "sampled": task.prompts is not None,
                "answered": task.questions is not None,
            }
            logs.append(stack.enter_context(RunLog(folder, at_step, learner.tokens, **columns)))
        signals = stack.enter_context(_held_signals())
        save_steps, saved_at = job.checkpoint_every or task.settings.save_steps, monotonic()
        try:
            # Steps after the last checkpoint are lost when the run is killed. The next run takes
            # them again with the same data and weights, so that its log and its result are those of
            # an uninterrupted run.
            for by_learner in records:
                for n, record in by_learner.items():
                    logs[n].append(record, Peak(predicted, live.peak), device.type)
                    done = record.step
                yield from _tell_stops(job, task)
                _append_samples(task, logs, [*by_learner], done)
                # all ranks stop after the same step
                stop = all_reduce_max(signals[-1] if signals else 0)
                if stop or done % save_steps == 0 or monotonic() - saved_at > MOST_LOST:
                    _save(job, task, logs, optimizer, done)
                    saved_at = monotonic()
                if stop:
                    raise Interrupted(stop, f"{name}: stopped after step {done} of {task.total}")
                losses = [record.loss for record in by_learner.values()]
                shown = f"{len(losses)} adapters, loss {min(losses):.3f} to {max(losses):.3f}"
                if not task.learners[0].name:
                    held_out = by_learner[0].eval_loss
                    shown = f"loss {losses[0]:.3f}{'' if held_out is None else f'  eval loss {held_out:.3f}'}"
                yield Progress(done, task.total, shown)
        except Diverged as diverged:
            yield from _tell_stops(job, task)
            # the checkpoint is of before: a run with it meets the same step again
            for n in diverged.gradients:
                task.learners[n].resume()
            _save(job, task, logs, optimizer, done)
            raise NotFinite(_describe_divergence(job, task, diverged)) from None
        # torch tells a lack of memory and a lost rank as RuntimeError
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) and not is_lost(error):
                raise
            reason = release(error)
            # failed during evaluation: a step was taken that is not logged
            if optimizer.steps != before + done:
                checkpoint_note = "The last periodic checkpoint is kept. "
            else:
                optimizer.clear()
                _save(job, task, logs, optimizer, done)
                checkpoint_note = f"A checkpoint after step {done} of {task.total} is kept. "
            if is_out_of_memory(error):
                raise _out_of_memory(job, task, reason, done, checkpoint_note) from None
            raise ProcessLost.during(name, checkpoint_note) from None
        if signals:  # after the last record was handled
            raise Interrupted(signals[-1], f"{name}: stopped after the last step")
    yield from _tell_stops(job, task)
    # after the last checkpoint, which keeps the newest weights and the best ones
    if evaluation is not None:
        evaluation.restore_best(optimizer)
    model.eval()
    if live.peak:
        measured = (
            f"{in_units(live.peak)} of tensors measured at the peak of the largest "
            f"step{live.beside}"
        )
        yield Note(f"{name}: {measured}", routine=True)
    if task.settings.compile:
        from pipeline.models.kernels.compiled import seconds_compiling

        yield Note(f"{name}: compiling took {seconds_compiling():.0f} s of the run")
    return optimizer


def build_optimizer(model: nn.Module, *settings: Training) -> FlatOptimizer:
    """The optimizer of a model's learners, given the settings of each."""
    ratios = [getattr(one, "loraplus_ratio", 1.0) for one in settings]
    rule, decays = rule_of(settings[0].optimizer), [one.weight_decay for one in settings]
    return FlatOptimizer(model, settings[0].precision == "fp16", ratios, rule, decays)


def prepare_model(
    model: CausalLM, checkpointing: Checkpointing, compiles: bool = False
) -> torch.device:
    """Apply checkpointing and faster kernels; returns the device to train on. Does not move the
    model.
    """
    device = device_for(model)
    model.checkpoint_blocks(checkpointing)
    if uses_cpu_kernels(device):
        model.prepare_cpu_training()
    elif not compiles:  # the compiler fuses the same parts
        model.prepare_accelerator_training(device)
    if compiles:
        # torch's compiler takes 1.4 seconds to import
        from pipeline.models.kernels.compiled import compile_blocks

        compile_blocks(model)
    return device


def _resume(job: Job, task: TrainingTask, optimizer: FlatOptimizer) -> Generator[Event, None, int]:
    """Restore the newest checkpoint; returns the number of steps done, 0 if there is none."""
    step, stored, reason = _load_checkpoint(job)
    done, reason = broadcast_object((step, reason))  # only rank 0 has checkpoints
    optimizer.broadcast_weights()
    if reason:
        yield Note(
            f"{job.stage.name}: the checkpoint is not used and training starts over: {reason}"
        )
    if not done:
        # before the logs are overwritten: a checkpoint is unusable without them
        discard_checkpoints(job.run)
        if task.learners[0].name:  # logs of adapters that are no longer in the sweep
            for log in job.run.glob(f"*/{LOSS}"):
                if log.parent.name not in task.earlier:
                    shutil.rmtree(log.parent)
        if task.state is not None and not optimizer.take_over(task.state):
            yield Note(
                f"{job.stage.name}: the optimizer's state is of other settings and is not used"
            )
        return 0
    state = broadcast_tensors(stored)
    optimizer.restore(state)
    progress = zip(task.learners, *(state[name].tolist() for name in PROGRESS), strict=True)
    for learner, tokens, stopped, diverged in progress:
        learner.tokens, learner.stopped, learner.diverged = (
            tokens,
            None if stopped < 0 else stopped,
            bool(diverged),
        )
    if task.evaluation is not None:
        task.evaluation.restore(state)
    yield Note(f"{job.stage.name}: resumed after step {done}")
    return done


def _load_checkpoint(job: Job) -> tuple[int, dict[str, Tensor], str | None]:
    """Step and state of the newest usable checkpoint; 0 if there is none, and why those that exist
    are unusable.
    """
    reason = None
    for folder in checkpoints(job.run):
        try:
            meta = artifact.verify(folder)
            if meta["key"] != job.key:
                reason = "it was made with other params, data or code"
                continue
            logs = {job.run / name: lines for name, lines in meta["logs"].items()}
            if short := [path for path, lines in logs.items() if _lines(path) < lines]:
                reason = f"{short[0]} has fewer than {logs[short[0]]} lines"
                continue
            return meta["step"], load_tensors(folder / STATE), None
        except (UserError, KeyError) as error:
            reason = str(error)
    return 0, {}, reason


def _lines(path: Path) -> int:
    """The number of a log's valid lines."""
    return count_lines(path) if path.name == SAMPLES else len(read_steps(path))


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


def _save(
    job: Job, task: TrainingTask, logs: Sequence[RunLog], optimizer: FlatOptimizer, done: int
) -> None:
    """Write a checkpoint after step `done`, on rank 0 only: the state of optimizer, learners and
    evaluation.

    It also holds each log's number of lines: a resumed run goes on in the logs, so without them it
    is unusable.
    """
    if not is_main_process():
        return
    for log in logs:  # first: a log that ends before its checkpoint makes it unusable
        log.sync()
    learners = task.learners
    values = ([x.tokens, -1 if x.stopped is None else x.stopped, int(x.diverged)] for x in learners)
    progress = dict(zip(PROGRESS, torch.tensor([*values]).T.contiguous(), strict=True))
    evaluation = task.evaluation.state() if task.evaluation is not None else {}
    lines = {
        (Path(x.name) / LOSS).as_posix(): done if x.stopped is None else x.stopped for x in learners
    }
    if task.prompts is not None or task.questions is not None:
        lines |= {
            path: count_lines(job.run / path)
            for x in learners
            for path in [(Path(x.name) / SAMPLES).as_posix()]
        }
    target = job.run / f"checkpoint-{done:09d}"
    with artifact.writing(target) as folder:
        save_tensors(folder / STATE, {**optimizer.state(), **progress, **evaluation})
        artifact.seal(folder, {"key": job.key, "step": done, "logs": lines})
    discard_checkpoints(job.run, keep=target)  # last, so that a complete one exists at any moment


@contextmanager
def _held_signals() -> Iterator[list[int]]:
    """Defers Ctrl-C, SIGTERM and a closed terminal to the end of a step: a checkpoint never holds
    half a step.

    Inside the block, the first of these signals is only added to the list; the second is handled as
    usual.
    """
    received, previous = list[int](), dict[int, Any]()

    def hold(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        signal.signal(number, previous[number])

    if threading.current_thread() is threading.main_thread():  # no other thread may set a handler
        for number in (signal.SIGINT, signal.SIGTERM, *[signal.SIGHUP] * hangs_up()):
            previous[number] = signal.signal(number, hold)
    try:
        yield received
    finally:
        for held, handler in previous.items():
            signal.signal(held, handler)


def _tell_stops(job: Job, task: TrainingTask) -> Iterator[Event]:
    """A note for each learner that was stopped since the last call. A diverged only one gets an
    error instead.
    """
    told = [learner for learner in task.learners if learner.message]
    if told:
        _write_outcomes(job, task)
    for learner in told:
        if learner.name or not learner.diverged:
            yield Note(f"{job.stage.name}: {learner.message}")
        learner.message = ""


def _write_outcomes(job: Job, task: TrainingTask) -> None:
    """Write which adapters of a sweep ended early, for other processes that show the run."""
    if task.learners[0].name:
        ended = [learner for learner in task.learners if learner.stopped is not None]
        states = {
            x.name: {"state": DIVERGED if x.diverged else STOPPED, "steps": x.stopped}
            for x in ended
        }
        write_run_outcomes(job.run, {**task.earlier, **states})


def predicted_peak(task: TrainingTask, number: int, device: torch.device | None = None) -> int:
    """Predicted peak of step `number` in bytes of tensors; 0 if the calculator does not know
    architecture or method.

    `device`: where the model will be; default: where it is.
    """
    model, retain = task.model, task.learners[0].retain
    read = [(batch, False) for batch in to_model_device(model, task.batches[number])]
    if retain is not None:
        read += [(batch, True) for batch in to_model_device(model, retain.batches[number])]
    sizes = (predict_peak_memory(model, task.method, task.settings, *each, device) for each in read)
    return max((size for size in sizes if size), default=0)


def measure_memory(
    live: MemoryMeter, number: int, model: CausalLM, optimizer: FlatOptimizer, records: Iterator[T]
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


def release(error: BaseException) -> str:
    """Free the tensors of the step that failed; returns the error's first line.

    The frames of its traceback hold them, and a GPU has no room for the checkpoint until they are
    gone.
    """
    reason, link = first_line(error), error.__context__
    error.__traceback__ = None
    while link is not None:
        link.__traceback__, link = None, link.__context__
    gc.collect()  # frames and autograd's contexts refer to each other
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return reason


def _out_of_memory(
    job: Job, task: TrainingTask, reason: str, done: int = 0, checkpoint_note: str = ""
) -> CollectiveError:
    """What to lower, and which checkpoint is kept: another program may have used the memory."""
    batch = task.batches[min(done, task.total - 1)][0]
    advice = task.less_memory or suggest_less_memory(
        task.model, task.method, task.settings, batch, job.stage.name
    )
    return CollectiveError(
        f"{job.stage.name}: out of memory in step {done + 1} ({reason}). {advice} "
        f"{checkpoint_note}".rstrip()
    )


def _describe_divergence(job: Job, task: TrainingTask, diverged: Diverged) -> str:
    name, learner = job.stage.name, task.learners[0]
    if learner.name:
        return f"{name}: all adapters diverged: none has a finite loss. Lower learning_rate."
    result, number = diverged.gradients[0], diverged.number
    only_retained = math.isfinite(result.loss) and not math.isfinite(result.divergence or 0)
    retain = learner.retain if only_retained else None
    locations = (learner.batches if retain is None else retain.batches).locations(number)
    return (
        f"{name}: the loss is "
        f"{result.loss}{f', the divergence from the base {result.divergence}' if retain else ''} "
        f"and the gradient norm {result.norm} at step {number + 1}, on {_shorten(locations, 8)}. "
        f"Lower {name}.learning_rate, or check these examples. The weights before that step are "
        "kept in "
        f"{job.run.parent.name}/{job.run.name}."
    )
