"""A distributed run: every rank trains on its share of each batch; rank 0 uses the cache and writes the artifact."""

import shutil
import signal
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
import torch.distributed as dist

from pipeline.errors import UserError, first_line
from pipeline.models.device import best_device
from pipeline.project.process import world
from pipeline.project.runner import Event, Facts, Job, Note, Work, run
from pipeline.project.stage_graph import Project, Stage
from pipeline.training.parallel.collectives import (
    CollectiveError,
    ProcessLost,
    broadcast_object,
    is_lost,
    is_main_process,
    limit_waiting,
    meet_neighbours,
    notice_lost_machines,
    raise_on_all_ranks,
)

MEET = timedelta(minutes=10)  # for the processes to start; without an answer they would wait for each other
PATIENCE = timedelta(days=7)  # rank 0 may wait for another run's lock, or its machine may read a base slowly


def run_distributed(
    project: Project, stage: Stage, work: Work, *, force: bool = False, checkpoint_every: int | None = None
) -> Generator[Event, None, Facts]:
    """`run` on every rank; returns the manifest on rank 0 and {} on the others."""
    with _process_group():
        try:
            if is_main_process():
                return (yield from _lead(project, stage, work, force, checkpoint_every))
            if _run_as_worker(project, stage, work, checkpoint_every) and world().reports_errors:
                yield Note(f"{stage.name}: done; rank 0 writes {project.artifact_name(stage.name)} on its machine")
            return {}
        except (RuntimeError, ProcessLost) as error:
            if isinstance(error, RuntimeError) and not is_lost(error):
                raise
            if world().reports_errors:
                signal.signal(signal.SIGTERM, signal.SIG_IGN)  # sent by torchrun; this rank has to report the error
            raise (ProcessLost.during(stage.name) if isinstance(error, RuntimeError) else error) from None


def _lead(
    project: Project, stage: Stage, work: Work, force: bool, checkpoint_every: int | None
) -> Generator[Event, None, Facts]:
    """Rank 0: tell the others the key once the cache has missed."""
    started = False

    def lead(job: Job) -> Generator[Event, None, Facts]:
        nonlocal started
        started = True
        broadcast_object(job.key)
        return (yield from _report_errors(work, job))

    try:
        return (yield from run(project, stage, lead, force=force, checkpoint_every=checkpoint_every))
    finally:
        if not started:  # the artifact came from the cache: the other ranks wait for a key
            broadcast_object("")


def _run_as_worker(project: Project, stage: Stage, work: Work, checkpoint_every: int | None) -> bool:
    """Do the same work as rank 0, in a folder that is deleted; False if rank 0 takes the result from the cache."""
    scratch = project.run_folder(stage.name) / f".rank-{dist.get_rank()}"
    try:
        key = broadcast_object("")  # empty: the artifact came from the cache
        if key:
            shutil.rmtree(scratch, ignore_errors=True)  # left by a killed run
            (scratch / "out").mkdir(parents=True)
            for _ in _report_errors(work, Job(project, stage, scratch / "out", scratch, key, checkpoint_every)):
                pass
        return bool(key)
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
    backend = "cpu:gloo,cuda:nccl" if on_gpus else "gloo"
    device = torch.device("cuda", rank.local_rank) if on_gpus else None  # NCCL connects here at once
    try:
        dist.init_process_group(backend, timeout=MEET, device_id=device)
    except ValueError as error:
        raise UserError(
            f"the environment does not say how the processes meet ({first_line(error)}). Start them with torchrun or "
            "--devices, or unset RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT."
        ) from None
    except RuntimeError as error:
        raise UserError(
            f"the {rank.world_size} processes of this run do not reach each other ({first_line(error)}). Start all of "
            "them at the same time. Between machines, name the network's interface in GLOO_SOCKET_IFNAME."
        ) from None
    limit_waiting(PATIENCE)
    notice_lost_machines()
    meet_neighbours()
    try:
        yield
    finally:
        dist.destroy_process_group()
