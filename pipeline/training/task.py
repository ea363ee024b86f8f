"""What a run trains, and its checkpoints: a killed run resumes and ends with the same bytes."""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from pipeline.calc.method import FinetuningMethod
from pipeline.errors import UserError
from pipeline.files import artifact
from pipeline.models.base import CausalLM, Checkpointing
from pipeline.models.device import device_for
from pipeline.models.kernels import uses_cpu_kernels
from pipeline.models.load import Base
from pipeline.models.save import load_tensors, save_tensors
from pipeline.project.logs.run_log import (
    LOSS,
    SAMPLES,
    RunLog,
    count_lines,
    read_steps,
    remove_other_logs,
)
from pipeline.project.params.sections import Training
from pipeline.project.runner import Event, Facts, Job, Note, checkpoints, discard_checkpoints
from pipeline.training.batches import Batches
from pipeline.training.optimizer import SGD, Adam, AdamW, AdamW8bit, FlatOptimizer, UpdateRule
from pipeline.training.parallel.collectives import (
    broadcast_object,
    broadcast_tensors,
    is_main_process,
)
from pipeline.training.step import Evaluation, Learner, LossPath

if TYPE_CHECKING:  # a run without it does not import it
    from pipeline.training.data import Prompts
    from pipeline.training.retention import RetentionLoss

STATE = "state.safetensors"
PROGRESS = ("tokens", "stopped", "diverged")  # a tensor each, of all learners; stopped -1: running


Saver = Callable[[Path, FlatOptimizer], Facts]


@dataclass(frozen=True)
class TrainingTask:
    """A model and its learners, which take equally many steps, each in its order of the data."""

    model: CausalLM
    learners: Sequence[Learner]
    path: LossPath
    evaluation: Evaluation | None = None
    # tells the memory calculator which parameters train; None: it does not know them
    method: FinetuningMethod | None = None
    # whether the frozen weights are sharded over the ranks; None: only if one device is too small
    sharded: bool | None = None
    # what to do when memory runs out; by default what the calculator suggests
    less_memory: str = ""
    # the optimizer's state at the end of the run that this one continues
    state: Mapping[str, Tensor] | None = None
    # name → outcome of the adapters of a sweep's earlier passes, whose logs stay
    earlier: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    # whether the run ends as usual where all learners diverge: others are trained elsewhere
    all_may_diverge: bool = False
    # what the learners answer while they train
    prompts: "Prompts | None" = None
    # held-out examples that they answer at each evaluation
    questions: "Prompts | None" = None
    # writes the model as it is to a folder and returns its manifest entries
    save: Saver | None = None
    # manifest entries that are measured after training
    facts: Callable[[], Facts] = dict

    @classmethod
    def of_one(
        cls,
        model: CausalLM,
        batches: Batches,
        settings: Training,
        method: FinetuningMethod | None,
        evaluation: Evaluation | None = None,
        retain: "RetentionLoss | None" = None,
        **more: Any,
    ) -> "TrainingTask":
        """The task of one learner: whatever parameters of `model` require a gradient."""
        learner = Learner(settings, batches, retain)
        return cls(model, [learner], LossPath(model), evaluation, method, **more)

    @property
    def settings(self) -> Training:
        """The first learner's: epochs, batches, evaluation and checkpointing are those of all."""
        return self.learners[0].settings

    @property
    def batches(self) -> Batches:
        return self.learners[0].batches

    @property
    def total(self) -> int:
        """Number of steps without early stopping."""
        return self.settings.total_steps(len(self.batches))

    def saves(self, step: int) -> bool:
        """Whether the artifact keeps the model after this step, beside the trained one."""
        every = self.settings.save_steps
        return self.save is not None and every > 0 and step % every == 0

    @property
    def live(self) -> list[int]:
        """The learners that were not stopped."""
        return [n for n, learner in enumerate(self.learners) if learner.stopped is None]


class TrainingSetup(NamedTuple):
    """A model that is ready to train."""

    base: Base
    task: TrainingTask


def build_optimizer(model: nn.Module, *settings: Training) -> FlatOptimizer:
    """The optimizer of a model's learners, given the settings of each."""
    ratios = [getattr(section, "loraplus_ratio", 1.0) for section in settings]
    decays = [section.weight_decay for section in settings]
    adams = [
        Adam(section.adam_beta1, section.adam_beta2, section.adam_epsilon) for section in settings
    ]
    scaled, rule = settings[0].precision == "fp16", rule_of(settings[0].optimizer)
    narrow = None
    # on a CPU casts cost less than a copy
    if isinstance(model, CausalLM) and not uses_cpu_kernels(model.device):
        narrow = model.dtype if model.dtype.itemsize == 2 else None
    return FlatOptimizer(model, scaled, ratios, rule, decays, adams, narrow)


def rule_of(name: str) -> UpdateRule:
    """The update rule of params.yaml's `optimizer`."""
    if name == "sgd":
        return SGD()
    if name == "muon":
        from pipeline.training.optimizer.muon import Muon  # few runs load it

        return Muon()
    return AdamW() if name == "adamw" else AdamW8bit(paged=name.startswith("paged"))


def prepare_model(
    model: CausalLM, checkpointing: Checkpointing, compiles: bool = False
) -> torch.device:
    """Apply checkpointing and faster kernels. Returns the device that the model is to train on."""
    device = device_for(model)
    model.checkpoint_blocks(checkpointing)
    if uses_cpu_kernels(device):
        model.prepare_cpu_training()
    elif not compiles:  # the compiler fuses the same parts
        model.prepare_for_accelerator(device)
    if compiles:
        # torch's compiler takes 1.4 seconds to import
        from pipeline.models.kernels.compiled import compile_blocks

        compile_blocks(model)
    return device


def write_checkpoint(
    job: Job, task: TrainingTask, logs: Sequence[RunLog], optimizer: FlatOptimizer, done: int
) -> None:
    """Write the state of optimizer, learners and evaluation after step `done`, on rank 0 only.

    A resumed run goes on in the logs, so a checkpoint is unusable without as many of their lines.
    """
    if not is_main_process():
        return
    for log in logs:  # first: a log that ends before its checkpoint makes it unusable
        log.sync()

    steps = [-1 if learner.stopped is None else learner.stopped for learner in task.learners]
    tokens = [learner.tokens for learner in task.learners]
    diverged = [int(learner.diverged) for learner in task.learners]
    progress = dict(zip(PROGRESS, torch.tensor([tokens, steps, diverged]), strict=True))
    evaluation = task.evaluation.state() if task.evaluation is not None else {}

    lines = {}
    for learner in task.learners:
        folder = Path(learner.name)
        lines[(folder / LOSS).as_posix()] = done if learner.stopped is None else learner.stopped
        if task.prompts is not None or task.questions is not None:
            lines[(folder / SAMPLES).as_posix()] = count_lines(job.run / folder / SAMPLES)

    target = job.run / f"checkpoint-{done:09d}"
    with artifact.writing(target) as out:
        save_tensors(out / STATE, {**optimizer.state(), **progress, **evaluation})
        artifact.seal(out, {"key": job.key, "step": done, "logs": lines})
    discard_checkpoints(job.run, keep=target)  # last, so that a complete one exists at any moment


def resume(job: Job, task: TrainingTask, optimizer: FlatOptimizer) -> Generator[Event, None, int]:
    """Restore the newest checkpoint; returns the number of steps done, 0 if there is none."""
    step, stored, reason = _load_checkpoint(job)
    done, reason = broadcast_object((step, reason))  # only rank 0 has checkpoints
    optimizer.broadcast_weights()
    if reason:
        yield Note(
            f"{job.stage.name}: the checkpoint is not used and training starts over: {reason}"
        )
    if not done:
        yield from _start_over(job, task, optimizer)
        return 0
    state = broadcast_tensors(stored)
    optimizer.restore(state)
    progress = zip(task.learners, *(state[name].tolist() for name in PROGRESS), strict=True)
    for learner, tokens, stopped, diverged in progress:
        learner.tokens, learner.diverged = tokens, bool(diverged)
        learner.stopped = None if stopped < 0 else stopped
    if task.evaluation is not None:
        task.evaluation.restore(state)
    yield Note(f"{job.stage.name}: resumed after step {done}")
    return done


def _start_over(job: Job, task: TrainingTask, optimizer: FlatOptimizer) -> Iterator[Event]:
    # before the logs are overwritten: a checkpoint is unusable without them
    discard_checkpoints(job.run)
    if task.learners[0].name:
        remove_other_logs(job.run, task.earlier)
    if task.state is not None and not optimizer.take_over(task.state):
        yield Note(f"{job.stage.name}: the optimizer's state is of other settings and is not used")


def _load_checkpoint(job: Job) -> tuple[int, dict[str, Tensor], str | None]:
    """Step and state of the newest usable checkpoint; without one 0, {} and the oldest's reason."""
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
