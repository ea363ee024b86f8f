"""The work of studies and figures, and the runs of other stages inside it: the stages' own code,
with other settings.

Each run has its own folder below the study's run folder, so a study that was killed resumes at the
run it was in. The stages themselves are imported where a run starts, since the declarations in a
study's file are read without torch.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from inspect import isgenerator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from msgspec import structs

from lab.report import PRINT, REPORT, Findings, figure_section, save, write_study
from pipeline.errors import UserError
from pipeline.files import artifact
from pipeline.project.params.load import Params
from pipeline.project.params.sections import Evaluate, Pretrain, change_paths
from pipeline.project.runner import Event, Facts, Job, Note, Progress
from pipeline.project.stage_graph import Project
from pipeline.stages.methods.full import FinetuneFull
from pipeline.stages.methods.lora import FinetuneLora
from pipeline.stages.methods.sweep import FinetuneSweep, variants
from pipeline.stages.registry import GRAPH

if TYPE_CHECKING:
    from pipeline.inference.engine import LoadedModel
    from pipeline.models.base import CausalLM
    from pipeline.training.task import TrainingTask

Key = TypeVar("Key")
Result = TypeVar("Result")

PARTS = "parts"
DOCUMENT = FinetuneLora()  # the document's settings (§9.2)


def run(job: Job) -> Generator[Event, None, Facts]:
    """The work of a study's stage, and of the figures'."""
    return run_figures(job) if job.stage.kind == "figures" else run_study(job)


def run_study(job: Job) -> Generator[Event, None, Facts]:
    """The work of each study's stage: measure, then write tables, picture and report. Raises
    UserError.
    """
    module = import_module(job.stage.module)
    findings = yield from module.measure(job, job.project.section(job.stage))
    # all is measured, and the runs' checkpoints are larger than the artifacts of all studies
    delete_runs(job)
    return write_study(job, module.PLACE, findings)


def run_figures(job: Job) -> Generator[Event, None, Facts]:
    """Write every figure as PNG and SVG, its numbers as CSV, and a report. Raises UserError."""
    for stage in job.stage.needs:
        job.artifact(stage)
    every: Mapping[str, Any] = import_module(job.stage.module).modules()
    sections, facts = ["# Figures, drawn from this project's artifacts\n"], {}
    for number, (name, module) in enumerate(every.items(), 1):
        findings = yield from render(job, module)
        for table in findings.tables:
            table.write(job.out)
        save(job.out / name, findings.draw, findings.size, (".png", ".svg"), PRINT)
        sections.append(figure_section(name, module.PLACE, findings))
        files = [f"{name}.png", f"{name}.svg", *(f"{table.name}.csv" for table in findings.tables)]
        facts[name] = {
            "place": module.PLACE,
            "title": findings.title,
            "shows": findings.shows,
            "files": files,
        }
        yield Progress(number, len(every), name)
    (job.out / REPORT).write_text("\n".join(sections), encoding="utf-8")
    return {"figures": facts}


def render(job: Job, figure: Any) -> Generator[Event, None, Findings]:
    """The findings of a figure's module. Only a figure that trains has events. Raises UserError."""
    findings: Any = figure.render(job)
    return (yield from findings) if isgenerator(findings) else findings  # type: ignore[no-any-return]


def describe_window(window: int) -> str:
    """What a run with this window trains on: "windows of 4 tokens" or "whole sentences"."""
    return f"windows of {window} tokens" if window else "whole sentences"


@dataclass(frozen=True)
class Run:
    """A stage's work with `sections` instead of the project's. `name` is unique in the study."""

    name: str
    stage: str
    sections: Mapping[str, Any]


def sweep_run(name: str, base: FinetuneLora, *grids: Mapping[str, Iterable[Any]]) -> Run:
    """A run that trains an adapter for each combination of a grid's values in one pass, each in a
    subfolder.

    A study measures its adapters itself, so their divergence on the project's `evaluate.old_data`
    is not.
    """
    values = FinetuneSweep(
        grid=tuple({key: tuple(options) for key, options in grid.items()} for grid in grids)
    )
    sections = {"finetune_lora": base, "finetune_sweep": values, "evaluate": Evaluate()}
    return Run(name, "finetune_sweep", sections)


def full_runs(name: str, settings: FinetuneFull, seeds: Sequence[int]) -> list[Run]:
    """Full fine-tuning with each seed."""
    return [
        Run(
            f"{name}, seed {n}",
            "finetune_full",
            {"finetune_full": structs.replace(settings, seed=n)},
        )
        for n in seeds
    ]


@dataclass(frozen=True)
class Method:
    """A method of the document's §7 or §10: a stage with changed settings.

    `color`: the key of its color in COLORS. `faster`: factor on the section's learning rate.
    """

    stage: str
    changes: Mapping[str, Any]
    color: str
    faster: float = 1.0

    def run(self, name: str, params: Params, seed: int, **more: Any) -> Run:
        """The stage's training with one seed; `more` overrides further keys of its section."""
        base = params.section(self.stage)
        changes = {"learning_rate": base.learning_rate * self.faster, **self.changes, **more}
        return Run(
            f"{name}, seed {seed}",
            self.stage,
            {self.stage: structs.replace(base, seed=seed, **changes)},
        )


LORA = "finetune_lora"
METHODS = {
    "training from scratch": Method("train_from_scratch", {}, "scratch"),
    "full fine-tuning": Method("finetune_full", {}, "full"),
    "layer freezing": Method("finetune_freeze", {}, "freeze"),
    "LoRA": Method(LORA, {}, "lora"),
    "LoRA, new rows": Method(LORA, {"train_embeddings": "new_rows"}, "lora"),
    "LoRA, matrices alone": Method(LORA, {"train_embeddings": "none"}, "lora"),
    "QLoRA": Method(LORA, {"quantization": "nf4-dq"}, "lora"),
    "DoRA": Method(LORA, {"dora": True}, "lora"),
    # B has the higher rate, as in the paper
    "LoRA+": Method(LORA, {"loraplus_ratio": 16.0}, "lora"),
    # B has the lower rate, as in the document
    "LoRA+, A faster": Method(LORA, {"loraplus_ratio": 1 / 16}, "lora"),
    # B has LoRA's rate, all else 16 ×
    "LoRA+, A 16 × faster": Method(LORA, {"loraplus_ratio": 1 / 16}, "lora", 16.0),
    "prefix tuning": Method("finetune_prefix", {}, "prefix"),
    "prompt tuning": Method("finetune_prompt", {}, "prompt"),
}


class Trained(NamedTuple):
    """A checkpoint or an adapter in `folder`, the name of its run, and the section it was trained
    with.
    """

    run: str
    settings: Any
    folder: Path

    def load(self, base: Path, trust_remote_code: bool = False) -> "LoadedModel":
        """The model; an adapter on `base`."""
        from pipeline.inference import engine

        if artifact.read_manifest(self.folder)["kind"] == "adapter":
            return engine.load(base, self.folder, trust_remote_code=trust_remote_code)
        return engine.load(self.folder, trust_remote_code=trust_remote_code)


def by(key: Callable[[Result], Key], items: Sequence[Result]) -> dict[Key, list[Result]]:
    """The items in groups with the same key, such as one setting's runs over the seeds, in the
    order of the items.
    """
    groups: dict[Key, list[Result]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def train(
    job: Job, runs: Sequence[Run], resume: bool = True, diverging: bool = False
) -> Generator[Event, None, list[Trained]]:
    """Train the runs. Returns a checkpoint or adapter for each, and one for each combination of a
    sweep's grid.

    Without `resume` an unfinished run starts from the beginning, so that its telemetry covers all
    steps. With `diverging` a run with a non-finite loss is omitted instead of raising NotFinite; so
    is an adapter of a sweep, always. Raises UserError as the stages do.
    """
    from pipeline.training.loop import NotFinite

    made: list[Trained] = []
    for number, run in enumerate(runs):
        part = _part(job, run)
        if not _is_finished(part):
            if not resume:
                shutil.rmtree(part.run, ignore_errors=True)
            try:
                with _add_run_to_error(job, run):
                    yield from _train_run(part, run, number, len(runs))
            except NotFinite:
                if not diverging:
                    raise
                continue
        if run.stage == "finetune_sweep":
            each = variants(run.sections["finetune_lora"], run.sections["finetune_sweep"]).items()
            made += [
                Trained(run.name, lora, part.out / name)
                for name, lora in each
                if (part.out / name).is_dir()
            ]
        else:
            made.append(Trained(run.name, run.sections[run.stage], part.out))
    return made


def wider_base(job: Job, shape: Pretrain) -> Generator[Event, None, Job]:
    """Pretrain and expand a base of another shape. Returns a job whose runs start from it. Raises
    UserError.

    It is a project of its own in the run's folder, so what is finished there is not made again
    after a kill.
    """
    from pipeline.project.runner import run

    expand = job.project.params.expand_vocab
    words, audit = (
        tuple(str(job.path(name)) for name in expand.data),
        str(job.path(expand.audit_data)),
    )
    sections = {
        "pretrain": structs.replace(
            shape, data=change_paths(shape.data, lambda name: str(job.path(name)))
        ),
        "expand_vocab": structs.replace(expand, data=words, audit_data=audit),
    }
    project = Project(job.run / PARTS / "wider base", job.project.params.replaced(sections), GRAPH)
    for name in sections:
        for event in run(project, GRAPH.stages[name], checkpoint_every=job.checkpoint_every):
            if isinstance(event, Progress):
                yield Progress(event.done, event.total, f"wider base  {event.text}")
    return replace(job, project=project)


def checkpoints(
    job: Job,
    run: Run,
    steps_of: "Callable[[TrainingTask], Collection[int]]",
    measure: "Callable[[LoadedModel], Result]",
    begin: "Callable[[CausalLM], None] | None" = None,
) -> Generator[Event, None, dict[int, Result]]:
    """Train and measure the model after some steps. Returns step → result of `measure`; step 0 is
    before training.

    `steps_of` gives the steps; training ends after the last. `begin` changes the model before all
    steps. It never resumes, since results of earlier steps would be lost. Raises UserError as the
    stage does.
    """
    from pipeline.training.loop import train as train_steps

    # none: it starts from the beginning each time
    part = replace(_part(job, run), checkpoint_every=2**31)
    shutil.rmtree(part.run, ignore_errors=True)
    part.out.mkdir(parents=True)
    with _add_run_to_error(job, run):
        task, loaded = yield from _prepare(part, run)
        model, last = loaded.model, max(wanted := steps_of(task))
        if begin is not None:
            begin(model)
        results = {0: measure(loaded)} if 0 in wanted else {}
        for event in train_steps(part, task) if last else ():
            if isinstance(event, Progress):
                # one step further, so that a signal during the last measurement is handled
                if event.done > last:
                    break
                if event.done in wanted:
                    model.eval()
                    results[event.done] = measure(loaded)
                    model.train()
    return results


def train_with(
    job: Job, run: Run, optimizer_of: "Callable[[Any, Any], Any]"
) -> Generator[Event, None, "LoadedModel"]:
    """Train a run with another optimizer: `optimizer_of(model, settings)` → a FlatOptimizer.
    Nothing is saved.

    Raises UserError as the stage does.
    """
    from pipeline.training.loop import Diverged, NotFinite, steps

    with _add_run_to_error(job, run):
        task, loaded = yield from _prepare(_part(job, run), run)
        loaded.model.train()
        try:
            for _ in steps(task, optimizer_of(loaded.model, task.settings)):
                pass
        except Diverged as diverged:
            raise NotFinite(
                f"the loss is not finite at step {diverged.number + 1}. Lower "
                f"{job.stage.name}.learning_rate."
            ) from None
    loaded.model.eval()
    return loaded


def _prepare(part: Job, run: Run) -> "Generator[Event, None, tuple[TrainingTask, LoadedModel]]":
    """The run's training task before its first step, and its model, to be measured at any step."""
    from pipeline.inference.engine import LoadedModel
    from pipeline.models.device import move_for_inference
    from pipeline.stages.finetune import prepare

    base, task = yield from prepare(part)
    move_for_inference(base.model)  # it is measured before its first step too
    return task, LoadedModel(
        run.name, base.model, base.tokenizer, part.project.artifact("expand_vocab")
    )


def drain(events: Generator[Event, None, Result]) -> Result:
    """The generator's return value; its events are discarded."""
    while True:
        try:
            next(events)
        except StopIteration as stop:
            result: Result = stop.value
            return result


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
    """The run as a job of its stage."""
    stage = GRAPH.stages[run.stage]
    project = replace(job.project, params=job.project.params.replaced(run.sections))
    folder = job.run / PARTS / run.name
    own = {
        "kind": stage.kind,
        "method": stage.method,
        "stage": stage.name,
        "params": project.stage_params(stage),
    }
    # so a run is made again if code, inputs or settings changed after a kill
    facts = {**job.input_facts, **own}
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return Job(project, stage, folder / "made", folder, key, job.checkpoint_every, facts)


def _is_finished(part: Job) -> bool:
    """Whether the run's artifact exists, is intact and was made with the same settings."""
    try:
        return bool(artifact.verify(part.out).get("key") == part.key)
    except UserError:
        return False


def _train_run(part: Job, run: Run, number: int, count: int) -> Generator[Event, None, None]:
    """Run the stage and seal its artifact. Progress is scaled to the study; only notes on resuming
    are kept.
    """
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
            # As if each run of the study had as many steps as this one: the others' numbers are not
            # known yet.
            yield Progress(
                number * event.total + event.done, count * event.total, f"{run.name}  {event.text}"
            )
        elif "resumed" in event.text:
            yield Note(f"{run.name}, {event.text}")
