"""Runs of other stages inside a study: the same code as `lora finetune …`, with other settings.

Each run has its own folder below the study's run folder, so a study that was killed resumes at the run it was in.
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
from pipeline.project.params.sections import Training
from pipeline.project.runner import Event, Job, Note, Progress
from pipeline.stages.finetune import prepare
from pipeline.stages.methods.lora import FinetuneLora
from pipeline.stages.methods.sweep import FinetuneSweep, variants
from pipeline.stages.registry import STAGES
from pipeline.training.loop import Diverged, NotFinite, TrainingTask, steps, train
from pipeline.training.optimizer import FlatAdam

Result = TypeVar("Result")

PARTS = "parts"
DOCUMENT = FinetuneLora()  # the document's settings (§9.2)


def describe_window(window: int) -> str:
    """What a run with this window trains on: "windows of 4 tokens" or "whole sentences"."""
    return f"windows of {window} tokens" if window else "whole sentences"


@dataclass(frozen=True)
class Run:
    """A stage's work with `sections` instead of the project's. `name` is unique in the study."""

    name: str
    stage: str
    sections: Mapping[str, Any]


def sweep_run(name: str, base: FinetuneLora, **grid: Sequence[object]) -> Run:
    """A run that trains an adapter for each combination of the grid's values in one pass, each in a subfolder."""
    values = FinetuneSweep(grid={key: tuple(options) for key, options in grid.items()})
    return Run(name, "finetune_sweep", {"finetune_lora": base, "finetune_sweep": values})


def adapters(run: Run, folder: Path) -> Iterator[tuple[Path, FinetuneLora]]:
    """The folder and settings of each adapter of a `sweep_run`, except those that diverged."""
    base, sweep = run.sections["finetune_lora"], run.sections["finetune_sweep"]
    assert isinstance(base, FinetuneLora) and isinstance(sweep, FinetuneSweep)
    for name, settings in variants(base, sweep).items():
        if (folder / name).is_dir():
            yield folder / name, settings


def run_stage(
    job: Job, runs: Sequence[Run], resume: bool = True, diverging: bool = False
) -> Generator[Event, None, dict[str, Path]]:
    """Train the runs. Returns name → artifact folder.

    Without `resume` an unfinished run starts from the beginning, so that its telemetry covers all steps. With
    `diverging` a run with a non-finite loss is omitted instead of raising NotFinite. Raises UserError as the stages do.
    """
    folders = {}
    for number, run in enumerate(runs):
        part = _part(job, run)
        if not _is_finished(part):
            if not resume:
                shutil.rmtree(part.run, ignore_errors=True)
            try:
                with _add_run_to_error(job, run):
                    yield from _run_stage(part, run, number, len(runs))
            except NotFinite:
                if not diverging:
                    raise
                continue
        folders[run.name] = part.out
    return folders


def evaluate_checkpoints(
    job: Job, run: Run, steps_of: Callable[[TrainingTask], Collection[int]], evaluate: Callable[[LoadedModel], Result]
) -> Generator[Event, None, dict[int, Result]]:
    """Train and evaluate the model after some steps. Returns step → result of `evaluate`; step 0 is before training.

    `steps_of` gives the steps; training ends after the last. It never resumes, since results of earlier steps would be
    lost. Raises UserError as the stage does.
    """
    part = replace(_part(job, run), checkpoint_every=2**31)  # none: it starts from the beginning each time
    shutil.rmtree(part.run, ignore_errors=True)
    part.out.mkdir(parents=True)
    with _add_run_to_error(job, run):
        learner = yield from prepare(part)
        wanted = steps_of(learner.task)
        loaded = LoadedModel(run.name, learner.base.model, learner.base.tokenizer, job.project.artifact("expand_vocab"))
        results = {0: evaluate(loaded)} if 0 in wanted else {}
        for event in train(part, learner.task) if max(wanted) else ():
            if isinstance(event, Progress):
                if event.done > max(wanted):  # one step further, so that a signal during the last evaluation is handled
                    break
                if event.done in wanted:
                    learner.base.model.eval()
                    results[event.done] = evaluate(loaded)
                    learner.base.model.train()
    return results


def drain(events: Generator[Event, None, Result]) -> Result:
    """The generator's return value; its events are discarded."""
    while True:
        try:
            next(events)
        except StopIteration as stop:
            result: Result = stop.value
            return result


def train_variant(
    job: Job, run: Run, optimizer_of: Callable[[CausalLM, Training], FlatAdam]
) -> Generator[Event, None, LoadedModel]:
    """Train a run with another optimizer. Returns the model; nothing is saved. Raises UserError as the stage does."""
    with _add_run_to_error(job, run):
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
    """Remove the runs' folders after measuring."""
    shutil.rmtree(job.run / PARTS, ignore_errors=True)


@contextmanager
def _add_run_to_error(job: Job, run: Run) -> Iterator[None]:
    """Prefix a UserError with the names of the study and of the run."""
    try:
        yield
    except UserError as error:
        raise type(error)(f"{job.stage.name}, {run.name}: {error}") from None


def _part(job: Job, run: Run) -> Job:
    stage = STAGES[run.stage]
    project = replace(job.project, params=job.project.params.replaced(run.sections))
    folder = job.run / PARTS / run.name
    facts = {
        **job.input_facts,
        **{"kind": stage.kind, "method": stage.method, "stage": stage.name, "params": project.stage_params(stage)},
    }
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return Job(project, stage, folder / "made", folder, key, job.checkpoint_every, facts)


def _is_finished(part: Job) -> bool:
    """Whether the run's artifact exists, is intact and was made with the same settings."""
    try:
        return bool(artifact.verify(part.out).get("key") == part.key)
    except UserError:
        return False


def _run_stage(part: Job, run: Run, number: int, count: int) -> Generator[Event, None, None]:
    """Run the stage and seal its artifact. Progress is scaled to the study; only notes on resuming are kept."""
    shutil.rmtree(part.out, ignore_errors=True)
    part.out.mkdir(parents=True)
    work = part.stage.run(part)
    while True:
        try:
            event = next(work)
        except StopIteration as stop:
            artifact.seal(part.out, {**part.input_facts, "key": part.key, **stop.value})
            return
        if isinstance(event, Progress):
            yield Progress(number * event.total + event.done, count * event.total, f"{run.name}  {event.text}")
        elif "resumed" in event.text:
            yield Note(f"{run.name}, {event.text}")
