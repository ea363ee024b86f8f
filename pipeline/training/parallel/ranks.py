"""A distributed run: ranks share each batch; rank 0 uses the cache and writes the artifact."""

import ctypes
import os
import shutil
import signal
import socket
import sys
import threading
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pipeline.errors import Interrupted, UserError, first_line, is_out_of_memory
from pipeline.models.device import best_device
from pipeline.project.process import exit_code, world
from pipeline.project.runner import Event, Facts, Job, Note, Work, run
from pipeline.project.stage_graph import Project, Stage
from pipeline.training.parallel.collectives import (
    CollectiveError,
    ProcessLost,
    broadcast_object,
    follow,
    is_lost,
    is_main_process,
    limit_waiting,
    raise_on_all_ranks,
    tells_of_a_connection,
)
from pipeline.training.parallel.heartbeats import Heartbeats

# for the processes to start; without an answer they would wait for each other
MEET = timedelta(minutes=10)
ABORT_WITHIN = 10  # seconds
# rank 0 may wait for another run's lock, or its machine may read a base slowly
PATIENCE = timedelta(days=7)


def run_distributed(
    project: Project,
    stage: Stage,
    work: Work,
    *,
    force: bool = False,
    checkpoint_every: int | None = None,
) -> Generator[Event, None, Facts]:
    """`run` on every rank; returns the manifest on rank 0 and {} on the others."""
    with process_group(stage.name):
        try:
            if is_main_process():
                return (yield from _lead(project, stage, work, force, checkpoint_every))
            if _run_as_worker(project, stage, work, checkpoint_every) and world().reports_errors:
                yield Note(
                    f"{stage.name}: done; rank 0 writes {project.artifact_name(stage.name)} on "
                    "its machine"
                )
            return {}
        except (RuntimeError, ProcessLost) as error:
            if isinstance(error, RuntimeError) and not is_lost(error):
                raise
            raise (_lost(stage) if isinstance(error, RuntimeError) else error) from None


def _lost(stage: Stage) -> ProcessLost:
    if world().reports_errors:
        # sent by torchrun; this rank has to report the error
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    return ProcessLost.during(stage.name)


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
        return (
            yield from run(project, stage, lead, force=force, checkpoint_every=checkpoint_every)
        )
    finally:
        if not started:  # the artifact came from the cache: the other ranks wait for a key
            broadcast_object("")


def _run_as_worker(
    project: Project, stage: Stage, work: Work, checkpoint_every: int | None
) -> bool:
    """Do the same work as rank 0, in a folder that is deleted.

    False if rank 0 takes the result from the cache.
    """
    scratch = project.run_folder(stage.name) / f".rank-{dist.get_rank()}"
    try:
        key = broadcast_object("")  # empty: the artifact came from the cache
        if key:
            shutil.rmtree(scratch, ignore_errors=True)  # left by a killed run
            (scratch / "out").mkdir(parents=True)
            job = Job(project, stage, scratch / "out", scratch, key, checkpoint_every)
            for _ in _report_errors(work, job):
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
        raise _lost(job.stage) from None


@contextmanager
def process_group(stage: str) -> Iterator[None]:
    """The group of this run's processes. Raises UserError if they do not meet."""
    rank = world()
    on_gpus = best_device().type == "cuda"
    if on_gpus:
        if rank.local_world_size > torch.cuda.device_count():
            raise UserError(
                f"{rank.local_world_size} processes need as many GPUs, got "
                f"{torch.cuda.device_count()}. Start fewer."
            )
        torch.cuda.set_device(rank.local_rank)
    # on GPUs both: numbers and messages travel as CPU tensors
    backend = "cpu:gloo,cuda:nccl" if on_gpus else "gloo"
    # NCCL connects here at once
    device = torch.device("cuda", rank.local_rank) if on_gpus else None
    # torch would end this process a minute after NCCL's error: no checkpoint would be written, and
    # no message
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    before = _open_files()
    try:
        dist.init_process_group(backend, timeout=MEET, device_id=device)
    except ValueError as error:
        raise UserError(
            f"the environment does not say how the processes meet ({first_line(error)}). Start "
            "them with torchrun or "
            "--devices, or unset RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT."
        ) from None
    except RuntimeError as error:
        if is_out_of_memory(error) or ("NCCL" in str(error) and not tells_of_a_connection(error)):
            raise
        raise UserError(
            f"the {rank.world_size} processes of this run do not reach each other "
            f"({first_line(error)}). Start all of them at the same time. Between machines, name "
            "the network's interface in GLOO_SOCKET_IFNAME."
        ) from None
    limit_waiting(PATIENCE)
    opened = {identity: file for identity, file in _open_files().items() if identity not in before}
    heartbeats = _begin_heartbeats(partial(_end_waits, stage, opened))
    done = False
    try:
        yield
        done = True
    except Interrupted:  # by all ranks after the same step
        done = True
        raise
    finally:
        heartbeats.stop(done)
        if done:
            dist.destroy_process_group()
        else:
            # Destroying the group would wait for ranks that are gone, and so would its destructor,
            # which one more reference keeps from running.
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(dist.group.WORLD))
            _abort_within(ABORT_WITHIN)


def _begin_heartbeats(on_loss: Callable[[], None]) -> Heartbeats:
    store: Any = dist.distributed_c10d._get_default_store()
    # a thread that waits on the group's own store holds its connection
    clone = dist.distributed_c10d.PrefixStore("heartbeats", store.clone())
    heartbeats = Heartbeats(clone, dist.get_rank(), on_loss)
    heartbeats.announce()
    identities: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(identities, heartbeats.identity)
    heartbeats.start(identities)
    follow(heartbeats)
    return heartbeats


def _end_waits(stage: str, opened: Mapping[tuple[int, int], int]) -> None:
    """Let fail what waits in this process for a lost rank.

    That is NCCL's kernels, and gloo on the connections that it opened. If NCCL cannot be aborted,
    the host would wait for its device for ever: this process reports that and ends.
    """
    aborted = _abort_within(ABORT_WITHIN)
    for identity, file in opened.items():
        with suppress(OSError):  # closed meanwhile, a file, or a socket that listens
            if _identity(file) == identity:
                _close(file)
    if not aborted:
        if world().reports_errors:
            sys.stderr.write(f"error: {ProcessLost.during(stage)}\n")
            sys.stderr.flush()
        os._exit(exit_code(ProcessLost))


def _abort_within(seconds: float) -> bool:
    """Whether NCCL's collectives were aborted in that time."""
    aborting = threading.Thread(target=abort_device_collectives, daemon=True)
    aborting.start()
    aborting.join(seconds)
    return not aborting.is_alive()


def abort_device_collectives() -> None:
    """End what NCCL's kernels wait for; their results are then not to be used."""
    for group in list(dist.distributed_c10d._world.pg_map):
        with suppress(RuntimeError):  # the group has none
            backend: Any = group._get_backend(torch.device("cuda"))
            if type(backend).__name__ == "ProcessGroupNCCL":
                backend.abort()


def _open_files() -> dict[tuple[int, int], int]:
    """Identity → number of this process's open files: a number alone is used again."""
    files = {}
    for path in Path("/dev/fd").iterdir():
        with suppress(OSError):
            files[_identity(int(path.name))] = int(path.name)
    return files


def _identity(file: int) -> tuple[int, int]:
    status = os.fstat(file)
    return status.st_dev, status.st_ino


def _close(file: int) -> None:
    connection = socket.socket(fileno=file)
    try:
        if connection.family in (socket.AF_INET, socket.AF_INET6):
            connection.getpeername()
            connection.shutdown(socket.SHUT_RDWR)
    finally:
        connection.detach()  # it is gloo's own to close
