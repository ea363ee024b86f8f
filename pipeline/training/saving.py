"""What a training leaves: the trained model and its logs, and the models of chosen steps.

Such a model lies in a folder checkpoint-N of the artifact, whole like an artifact: any command that
takes an adapter's or a model's folder takes it. Until the artifact has it, it is in the run folder,
so that a run that is killed and resumes still has it.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from pipeline.files import artifact
from pipeline.files.base_model import base_fingerprint
from pipeline.models.base import CausalLM
from pipeline.models.load import Base, count, save_base
from pipeline.models.save import save_tensors
from pipeline.project import provenance
from pipeline.project.cache import copy_contents, remove
from pipeline.project.logs.run_log import LOSS, SAMPLES, Step, best_step, read_steps
from pipeline.project.runner import SAVED, Facts, Job
from pipeline.training.optimizer import FlatOptimizer
from pipeline.training.parallel.collectives import is_main_process
from pipeline.training.task import TrainingTask

STATE = "optimizer.safetensors"  # beside the adapter, with save_optimizer


def finish(job: Job, task: TrainingTask, optimizer: FlatOptimizer) -> Facts:
    """Write the artifact: the trained model, its logs and the models of its saved steps.

    Returns the manifest entries; of a process that writes nothing, none.
    """
    if not is_main_process():
        return {}
    save_logs(job.run, job.out)
    saved = task.save(job.out, optimizer) if task.save else {}
    return {**saved, **task.facts(), **_collect(job, task)}


def save_logs(run: Path, out: Path) -> None:
    """Copy the logs that are equal in every run to the artifact: loss.csv, samples.jsonl if any."""
    shutil.copyfile(run / LOSS, out / LOSS)
    if (run / SAMPLES).exists():
        shutil.copyfile(run / SAMPLES, out / SAMPLES)


@torch.no_grad()
def save_checkpoint(
    out: Path,
    optimizer: FlatOptimizer,
    base: Base,
    trained_from: Callable[[], CausalLM] | None = None,
) -> Facts:
    """Write the trained model to the folder `out`; returns its facts for the manifest.

    `trained_from` loads the base in its stored precision, if training ran in another one. The fp32
    difference of each trained parameter is then added to it, so that frozen parameters and unused
    embedding rows stay bit for bit.
    """
    parameters = count(base.model)  # of the model that trained: it knows what was frozen
    model = base.model
    if trained_from is not None:
        names = {id(p): name for name, p in model.named_parameters()}
        trained = {names[id(p)]: (p.dtype, weights.cpu()) for p, weights in optimizer.trained()}
        model = trained_from()
        for name, (dtype, weights) in trained.items():
            stored = model.get_parameter(name)
            stored.copy_(stored.float() + (weights - stored.to(dtype).float()))
    save_base(out, Base(model, base.tokenizer))
    return {"parameters": parameters, "fingerprint": base_fingerprint(out)}


def save_state(out: Path, optimizer: FlatOptimizer, seen: int) -> Facts:
    """Write the optimizer's state beside the adapter and its log. Returns the manifest entry.

    `seen`: the steps of the runs that this one continues.
    """
    save_tensors(out / STATE, optimizer.state())
    return {"optimizer": {"steps": seen + read_steps(out / LOSS)[-1].step}}


def save_step(job: Job, task: TrainingTask, optimizer: FlatOptimizer, step: Step) -> None:
    """Write the model after a step, and remove earlier ones that exceed `save_total_limit`."""
    if task.save is None or not is_main_process():
        return
    with artifact.writing(job.run / SAVED / f"checkpoint-{step.step}") as out:
        save_logs(job.run, out)
        facts = task.save(out, optimizer)
        facts |= {"commit": provenance.commit(*job.stage.code), "checkpoint": {"step": step.step}}
        artifact.seal(out, {**job.input_facts, **facts})
    limit = task.settings.save_total_limit
    if limit:
        steps = _saved_steps(job)
        best = best_step(steps, task.settings.metric_for_best_model)
        for earlier in steps[:-limit]:
            if earlier != best:
                remove(job.run / SAVED / f"checkpoint-{earlier.step}")


def _saved_steps(job: Job) -> list[Step]:
    """The steps after which the run's model is there."""
    names = {folder.name for folder in (job.run / SAVED).glob("checkpoint-*")}
    return [step for step in read_steps(job.run / LOSS) if f"checkpoint-{step.step}" in names]


def _collect(job: Job, task: TrainingTask) -> Facts:
    """Copy the models of the saved steps into the artifact. Returns the manifest entries."""
    steps = _saved_steps(job)
    for step in steps:
        folder = job.out / f"checkpoint-{step.step}"
        folder.mkdir()
        copy_contents(job.run / SAVED / folder.name, folder)
    facts = {}
    if best := best_step(steps, task.settings.metric_for_best_model):
        facts["best_checkpoint"] = best.step
    if task.evaluation is not None and task.settings.takes_best:
        facts["best_step"] = task.evaluation.best_step
    return facts
