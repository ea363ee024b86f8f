"""A rank that is lost ends what waits for it, on every rank that is left, and is named; what others
do goes on.
"""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from pipeline.training.parallel import heartbeats, ranks
from pipeline.training.parallel.collectives import ProcessLost, all_reduce, is_lost
from tests.helpers.ranks import run_ranks

LOST = "train: rank 1 of 2 ended, or cannot be reached."


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def a_run() -> Iterator[list[str]]:
    """The group of a run; what its user reads, if a rank is lost."""
    said: list[str] = []
    with suppress(ProcessLost), ranks.process_group("train"):
        try:
            all_reduce(torch.ones(1))
            yield said
        except RuntimeError as error:
            assert is_lost(error)
            said.append(str(ProcessLost.during("train")))
            raise ProcessLost(said[0]) from None


def options(connection: socket.socket) -> list[int]:
    names = ["SO_KEEPALIVE", "TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT", "TCP_USER_TIMEOUT"]
    levels = [socket.SOL_SOCKET, *[socket.IPPROTO_TCP] * 4]
    return [
        connection.getsockopt(level, getattr(socket, name))
        for level, name in zip(levels, names, strict=True)
    ]


def keep_another_connection() -> bool:
    """A tracker's connection is what it was: in a run, and after another rank is lost."""
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as tracker,
    ):
        served, before = server.accept()[0], options(tracker)
        with a_run() as said:
            assert options(tracker) == options(served) == before
            if dist.get_rank():
                die()
            while True:
                all_reduce(torch.ones(1))
        assert said
        tracker.sendall(b"still here")
        assert options(tracker) == before
        return served.recv(99) == b"still here"


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="options of Linux")
def test_the_connections_of_trackers_and_of_the_hub_stay_as_they_are() -> None:
    assert run_ranks(2, keep_another_connection, grouped=False, seconds=60) == [True, None]


def wait_in_a_gather() -> tuple[str, float]:
    """Rank 0 gathers, as `--shard` does, with a rank that is gone."""
    start = time.monotonic()
    with a_run() as said:
        if dist.get_rank():
            threading.Timer(1, die).start()
            time.sleep(600)
        dist.all_gather([torch.empty(1), torch.empty(1)], torch.ones(1))
    return said[0], time.monotonic() - start


def test_a_gather_with_a_rank_that_is_gone_ends_and_names_it() -> None:
    (said, seconds), _ = run_ranks(2, wait_in_a_gather, grouped=False, seconds=60)
    assert said.startswith(LOST) and seconds < 20


def wait_for_the_device(aborts: bool, said_at: Path) -> tuple[str, float]:
    """Rank 0 reads its device behind a collective of NCCL with a rank that is gone; a stand-in for
    both.

    `aborts`: whether NCCL can be aborted, which then ends the read. It destroys no group that has
    lost a rank.
    """
    sys.stderr = said_at.open("w")
    read = threading.Event()

    def abort() -> None:
        if not aborts:
            time.sleep(600)
        read.set()

    dist.destroy_process_group = lambda *_: time.sleep(600)
    ranks.abort_device_collectives = abort
    ranks.ABORT_WITHIN = 1
    start = time.monotonic()
    with a_run() as said:
        if dist.get_rank():
            die()
        read.wait(600)
        all_reduce(torch.ones(1))  # of the losses, over gloo: what was read is of no use
    return said[0], time.monotonic() - start


def test_a_host_that_waits_for_its_device_is_freed_and_reports_though_no_group_is_destroyed(
    tmp_path: Path,
) -> None:
    (said, seconds), _ = run_ranks(
        2, wait_for_the_device, True, tmp_path / "said", grouped=False, seconds=60
    )
    assert said.startswith(LOST) and seconds < 20


def test_a_host_whose_device_cannot_be_freed_says_so_and_ends(tmp_path: Path) -> None:
    said = tmp_path / "said"
    assert run_ranks(2, wait_for_the_device, False, said, grouped=False, seconds=60) == [None, None]
    assert said.read_text() == f"error: {LOST} Run the same command to resume.\n"


def leave_one_after_the_other() -> float:
    """Rank 0 writes the artifact after the others have left."""
    with a_run():
        if dist.get_rank() == 0:
            time.sleep(8)
    return time.monotonic()


@pytest.mark.slow
def test_a_rank_that_is_done_is_not_lost() -> None:
    first, *others = run_ranks(3, leave_one_after_the_other, grouped=False, seconds=60)
    assert all(first > other + 5 for other in others)


def pause(stopped: list[int], seconds: float) -> str:
    """The processes of some ranks do not run for a while, twice as long as a heartbeat may be left
    out.
    """
    heartbeats.LOST_AFTER = 5
    with a_run() as said:
        pids: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(pids, os.getpid())
        if dist.get_rank() == 0:
            named = " ".join(str(pids[rank]) for rank in stopped)
            pausing = f"sleep 1; kill -STOP {named}; sleep {seconds}; kill -CONT {named}"
            subprocess.Popen(["sh", "-c", pausing])
        steps = torch.zeros(1)
        while steps.item() < 18 * 20 * len(pids):
            all_reduce(steps.fill_(steps.item() / len(pids) + 1))
            time.sleep(0.05)
    return said[0] if said else "went on"


@pytest.mark.slow
def test_a_rank_that_does_not_run_for_long_is_lost() -> None:
    assert run_ranks(2, pause, [1], 12, grouped=False, seconds=60)[0].startswith(LOST)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stopped", "seconds"), [([1], 2), ([0, 1], 10)], ids=["shortly", "with all others"]
)
def test_a_rank_that_pauses_is_not_lost(stopped: list[int], seconds: float) -> None:
    assert run_ranks(2, pause, stopped, seconds, grouped=False, seconds=60) == ["went on"] * 2
