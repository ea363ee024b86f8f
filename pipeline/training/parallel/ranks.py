"""A distributed run: every rank trains on its share of each batch; rank 0 uses the cache and writes the artifact."""

import shutil
import signal
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
import torch.distributed as dist

from pipeline.errors import Interrupted, UserError
from pipeline.models.device import best_device
from pipeline.project.process_rank import world
from pipeline.project.runner import Event, Facts, Job, Work, run
from pipeline.project.stage_graph import Project, Stage
from pipeline.training.parallel.collectives import (
    CollectiveError,
    ProcessLost,
    broadcast_object,
    is_lost,
    is_main_process,
    raise_on_all_ranks,
)

PATIENCE = timedelta(days=7)  # rank 0 may wait for another run's lock; a rank that died is noticed at once


def run_distributed(
    project: Project, stage: Stage, work: Work, *, force: bool = False, checkpoint_every: int | None = None
) -> Generator[Event, None, Facts]:
    """`run` on every rank; returns the manifest on rank 0 and {} on the others."""
    with _process_group():
        if not is_main_process():
            with suppress(UserError, Interrupted):  # rank 0 reports it
                _run_as_worker(project, stage, work, checkpoint_every)
            return {}
        started = False

        def lead(job: Job) -> Generator[Event, None, Facts]:
            nonlocal started
            started = True
            broadcast_object(job.key)
            return (yield from _report_errors(work, job))

        try:
            return (yield from run(project, stage, lead, force=force, checkpoint_every=checkpoint_every))
        except ProcessLost:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # sent by torchrun; this rank still has to report the error
            raise
        finally:
            if not started:  # the artifact came from the cache: the other ranks wait for a key
                broadcast_object("")


def _run_as_worker(project: Project, stage: Stage, work: Work, checkpoint_every: int | None) -> None:
    """Do the same work as rank 0, in a folder that is deleted; nothing if rank 0 takes the result from the cache."""
    scratch = project.run_folder(stage.name) / f".rank-{dist.get_rank()}"
    try:
        if key := broadcast_object(""):  # empty: the artifact came from the cache
            shutil.rmtree(scratch, ignore_errors=True)  # left by a killed run
            (scratch / "out").mkdir(parents=True)
            for _ in _report_errors(work, Job(project, stage, scratch / "out", scratch, key, checkpoint_every)):
                pass
    except RuntimeError as error:
        if not is_lost(error):
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _report_errors(work: Work, job: Job) -> Generator[Event, None, Facts]:
    """The work; an error of this rank alone is raised on all ranks."""
    try:
        return (yield from work(job))
    except CollectiveError:
        raise
    except UserError as error:
        with suppress(RuntimeError):  # the other ranks have already exited
            raise_on_all_ranks(str(error))
        raise
    except RuntimeError as error:
        if not is_lost(error):
            raise
        raise ProcessLost.during(job.stage.name) from None


@contextmanager
def _process_group() -> Iterator[None]:
    rank = world()
    on_gpus = best_device().type == "cuda"
    if on_gpus:
        if rank.local_world_size > torch.cuda.device_count():
            raise UserError(
                f"{rank.local_world_size} processes need as many GPUs, got {torch.cuda.device_count()}. Start fewer."
            )
        torch.cuda.set_device(rank.local_rank)
    # both on a GPU: numbers and messages travel as CPU tensors
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpus else "gloo", timeout=PATIENCE)
    try:
        yield
    finally:
        dist.destroy_process_group()
