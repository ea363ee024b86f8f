"""Runs a stage with all that belongs to it: checks, advice, trackers, several processes."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import replace
from time import monotonic
from typing import TYPE_CHECKING, Any

from pipeline.errors import UserError
from pipeline.project.process import world

if TYPE_CHECKING:
    from pipeline.project.logs.follower import Follower
    from pipeline.project.runner import Event, Facts, Job
    from pipeline.project.stage_graph import Project

FINISHING = 5.0  # seconds that a finished run waits for its trackers, which then go on alone


def run_stage(
    project: Project,
    name: str,
    force: bool = False,
    checkpoint_every: int | None = None,
    shard: bool | None = None,
) -> Generator[Event, None, dict[str, Any]]:
    """Run a stage and return its artifact's manifest; of a process that does not write it, {}.

    Raises UserError, and Interrupted after a signal.
    """
    from lora_workbench.advice import advice_notes
    from pipeline.project.runner import run

    stage = project.stage(name)
    if stage.check:  # before anything runs
        stage.check(project)

    followers: list[Follower] = []
    if project.params.report_to:
        from pipeline.project.logs.follower import check

        check(project.params.report_to)

    def work(job: Job) -> Generator[Event, None, Facts]:
        yield from advice_notes(project, stage)  # not before `run`: a cached result needs no advice
        if project.params.report_to and stage.trains and world().is_main_process:
            followers.extend((yield from _start_trackers(job)))
        return (yield from stage.run(replace(job, sharded=shard)))

    if world().world_size == 1:
        events = run(project, stage, work, force=force, checkpoint_every=checkpoint_every)
    else:
        if not name.startswith("finetune_") or stage.kind == "adapters":
            raise UserError(f"{name} runs in one process. Call it without torchrun.")
        from pipeline.training.parallel.ranks import run_distributed

        events = run_distributed(
            project, stage, work, force=force, checkpoint_every=checkpoint_every
        )
    manifest = yield from events
    yield from _finish_trackers(followers)
    return manifest


def _start_trackers(job: Job) -> Generator[Event, None, list[Follower]]:
    """A process for each tracker of `report_to`; a note on each that is not installed."""
    from pipeline.project.logs import run_state
    from pipeline.project.logs.follower import Followed, Follower, missing
    from pipeline.project.runner import Note

    project, stage = job.project, job.stage
    started: list[Follower] = []
    journal = run_state.read(job.run)
    if journal is None:
        return started
    for name in project.params.report_to:
        if why := missing(name):
            yield Note(
                f"{stage.name}: report_to: {why}, and send the run with `lora runs export --to "
                f"{name}`"
            )
            continue
        followed = Followed(
            root=str(project.root),
            stage=stage.name,
            sweeps=stage.kind == "adapters",
            key=job.key,
            params=job.input_facts["params"],
            artifact=str(project.cache / stage.name / job.key),
            run=str(job.run),
            started=journal.started,
        )
        try:
            started.append(Follower(name, followed))
        except OSError as error:  # no process, no folder: not the training's concern
            yield Note(f"{stage.name}: report_to: {name} cannot be started: {error.strerror}")
            continue
        yield Note(f"{stage.name}: {name} follows the run: {started[-1].view}", routine=True)
    return started


def _finish_trackers(followers: list[Follower]) -> Iterator[Event]:
    """Wait a moment for the trackers; a note on each that failed or is still reading."""
    from pipeline.project.runner import Note

    until = monotonic() + FINISHING
    for follower in followers:
        if not follower.wait(max(0.0, until - monotonic())):
            yield Note(f"{follower.name} is still reading the run's log, and ends by itself.")
        elif problem := follower.problem():
            again = f"Send the run with `lora runs export --to {follower.name}`"
            yield Note(
                f"{follower.name} did not get all of the run: {problem}. {again}; "
                f"{follower.log} has more."
            )
