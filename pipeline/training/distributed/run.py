"""One run in several processes: each learns from a share of every step, the first looks in the cache and writes."""

import shutil
import signal
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist

from pipeline.errors import Interrupted, UserError
from pipeline.project.process_rank import world
from pipeline.project.runner import Event, Facts, Job, Work, run
from pipeline.project.stage_graph import Project, Stage
from pipeline.training.distributed.collectives import (
    CollectiveError,
    ProcessLost,
    WorkerFinished,
    broadcast_object,
    is_lost,
    is_main_process,
    raise_on_all_ranks,
)

PATIENCE = timedelta(days=7)  # the first may wait for another run's lock; a process that is gone is noticed at once


def together(
    project: Project, stage: Stage, work: Work, *, force: bool = False, checkpoint_every: int = 100
) -> Generator[Event, None, Facts]:
    """`run` in every process of the world; returns the manifest, or nothing where this is not the first process."""
    with _joined():
        if not is_main_process():
            with suppress(UserError, Interrupted, WorkerFinished):
                _help(project, stage, work, checkpoint_every)
            return {}
        asked = False

        def leading(job: Job) -> Generator[Event, None, Facts]:
            nonlocal asked
            asked = True
            broadcast_object(job.key)
            return (yield from _agreeing(work, job))

        try:
            return (yield from run(project, stage, leading, force=force, checkpoint_every=checkpoint_every))
        except ProcessLost:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # from torchrun, to all that are left: this one still speaks
            raise
        finally:
            if not asked:
                broadcast_object("")


def _help(project: Project, stage: Stage, work: Work, checkpoint_every: int) -> None:
    """The same work, its files thrown away, if the first process has to do it."""
    scratch = project.run_folder(stage.name) / f".rank-{dist.get_rank()}"
    try:
        if key := broadcast_object(""):
            shutil.rmtree(scratch, ignore_errors=True)  # of a run that was killed
            (scratch / "out").mkdir(parents=True)
            for _ in _agreeing(work, Job(project, stage, scratch / "out", scratch, key, checkpoint_every)):
                pass
    except RuntimeError as error:
        if not is_lost(error):
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _agreeing(work: Work, job: Job) -> Generator[Event, None, Facts]:
    try:
        return (yield from work(job))
    except CollectiveError:
        raise
    except UserError as error:
        _tell(error)
    except RuntimeError as error:
        if not is_lost(error):
            raise
        raise ProcessLost.during(job.stage.name) from None


def _tell(error: UserError) -> NoReturn:
    with suppress(RuntimeError):  # the others are gone already
        raise_on_all_ranks(str(error))
    raise error


@contextmanager
def _joined() -> Iterator[None]:
    here = world()
    if torch.cuda.is_available():
        if here.local_size > torch.cuda.device_count():
            raise UserError(f"{here.local_size} processes need as many GPUs; here are {torch.cuda.device_count()}.")
        torch.cuda.set_device(here.local_rank)
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)
    try:
        yield
    finally:
        dist.destroy_process_group()
