"""Runs of other stages inside a study: trained by the code that `lora finetune …` runs, with other settings.

Each is a folder of its own below the study's run: a study that was killed goes on with the run that it was in.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from pipeline.errors import UserError
from pipeline.files import artifact
from pipeline.inference.engine import LoadedModel
from pipeline.models.base import CausalLM
from pipeline.project.params.grid import variants
from pipeline.project.params.sections import FinetuneLora, FinetuneSweep, Training
from pipeline.project.runner import Event, Job, Note, Progress, Work
from pipeline.project.stage_graph import STAGES
from pipeline.stages.finetune import prepare
from pipeline.stages.sweep import sweep
from pipeline.training.loop import Diverged, NotFinite, TrainingTask, steps, train
from pipeline.training.optimizer import FlatAdam

Found = TypeVar("Found")

PARTS = "parts"
DOCUMENT = FinetuneLora()  # the document's settings (§9.2)


def named(window: int) -> str:
    """What a run with this window trains on, in words."""
    return f"windows of {window} tokens" if window else "whole sentences"


@dataclass(frozen=True)
class Run:
    """A stage's work with these sections in place of the project's; `name` is its own in the study."""

    name: str
    stage: str
    work: Work
    sections: Mapping[str, Any]


def together(name: str, base: FinetuneLora, **grid: Sequence[object]) -> Run:
    """Adapters for each combination of the grid's values, all in one pass; their folders lie in the run's."""
    values = FinetuneSweep({key: tuple(of) for key, of in grid.items()})
    return Run(name, "finetune_sweep", sweep, {"finetune_lora": base, "finetune_sweep": values})


def adapters(run: Run, folder: Path) -> Iterator[tuple[Path, FinetuneLora]]:
    """Folder and settings of each adapter that a run of `together` made; those that diverged have none."""
    base, sweep = run.sections["finetune_lora"], run.sections["finetune_sweep"]
    assert isinstance(base, FinetuneLora) and isinstance(sweep, FinetuneSweep)
    for name, own in variants(base, sweep).items():
        if (folder / name).is_dir():
            yield folder / name, own


def run_stage(
    job: Job, runs: Sequence[Run], resume: bool = True, diverging: bool = False
) -> Generator[Event, None, dict[str, Path]]:
    """Name → folder of what each run made: an artifact as its stage makes it.

    Without `resume` a run that was not finished begins anew: its telemetry is then of all its steps. With `diverging`
    one whose loss is not finite is left out. Raises UserError as the stages do.
    """
    found = {}
    for number, run in enumerate(runs):
        part = _part(job, run)
        if not _is_there(part):
            if not resume:
                shutil.rmtree(part.run, ignore_errors=True)
            try:
                with _named(job, run):
                    yield from _work(part, run, number, len(runs))
            except NotFinite:
                if not diverging:
                    raise
                continue
        found[run.name] = part.out
    return found


def evaluate_checkpoints(
    job: Job, run: Run, when: Callable[[TrainingTask], Collection[int]], look: Callable[[LoadedModel], Found]
) -> Generator[Event, None, dict[int, Found]]:
    """Step → what `look` finds in the model after it; 0 is before the first. It ends after the last of `when`.

    It begins anew each time: what was seen before a kill is gone. Raises UserError as the stage does.
    """
    part = replace(_part(job, run), checkpoint_every=2**31)
    shutil.rmtree(part.run, ignore_errors=True)
    part.out.mkdir(parents=True)
    with _named(job, run):
        learner = yield from prepare(part)
        wanted = when(learner.task)
        loaded = LoadedModel(run.name, learner.base.model, learner.base.tokenizer, job.project.artifact("expand_vocab"))
        found = {0: look(loaded)} if 0 in wanted else {}
        for event in train(part, learner.task) if max(wanted) else ():
            if isinstance(event, Progress):
                if event.done > max(wanted):  # a signal during the last look is acted on after one more step
                    break
                if event.done in wanted:
                    learner.base.model.eval()
                    found[event.done] = look(loaded)
                    learner.base.model.train()
    return found


def drain(events: Generator[Event, None, Found]) -> Found:
    """What work returns, without a word of how it goes."""
    while True:
        try:
            next(events)
        except StopIteration as stop:
            found: Found = stop.value
            return found


def train_variant(
    job: Job, run: Run, optimizer_of: Callable[[CausalLM, Training], FlatAdam]
) -> Generator[Event, None, LoadedModel]:
    """The model after a run that another optimizer does; nothing is saved. Raises UserError as the stage does."""
    with _named(job, run):
        learner = yield from prepare(_part(job, run))
        model, settings = learner.base.model, learner.task.settings
        model.train()
        try:
            for _ in steps(learner.task, optimizer_of(model, settings)):
                pass
        except Diverged as diverged:
            raise NotFinite(
                f"the loss is not finite at step {diverged.number + 1}. Lower {job.stage.name}.learning_rate."
            ) from None
    return LoadedModel(run.name, model.eval(), learner.base.tokenizer, job.project.artifact("expand_vocab"))


def delete_runs(job: Job) -> None:
    """Remove what the runs made, once it is measured."""
    shutil.rmtree(job.run / PARTS, ignore_errors=True)


@contextmanager
def _named(job: Job, run: Run) -> Iterator[None]:
    """What is wrong in a run is said with the study's name and its own: of many runs it is one."""
    try:
        yield
    except UserError as error:
        raise type(error)(f"{job.stage.name}, {run.name}: {error}") from None


def _part(job: Job, run: Run) -> Job:
    stage = STAGES[run.stage]
    project = replace(job.project, params=job.project.params.replaced(run.sections))
    folder = job.run / PARTS / run.name
    known = {
        **job.known,
        **{"kind": stage.kind, "method": stage.method, "stage": stage.name, "params": project.stage_params(stage)},
    }
    key = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()
    return Job(project, stage, folder / "made", folder, key, job.checkpoint_every, known)


def _is_there(part: Job) -> bool:
    """Whether the run was finished before, with the same settings, and what it made is whole."""
    try:
        return bool(artifact.verify(part.out).get("key") == part.key)
    except UserError:
        return False


def _work(part: Job, run: Run, number: int, of: int) -> Generator[Event, None, None]:
    """Its progress is a part of the study's; of its notes, only that it goes on where it was."""
    shutil.rmtree(part.out, ignore_errors=True)
    part.out.mkdir(parents=True)
    work = run.work(part)
    while True:
        try:
            event = next(work)
        except StopIteration as stop:
            artifact.seal(part.out, {**part.known, "key": part.key, **stop.value})
            return
        if isinstance(event, Progress):
            yield Progress(number * event.total + event.done, of * event.total, f"{run.name}  {event.text}")
        elif "resumed" in event.text:
            yield Note(f"{run.name}, {event.text}")
