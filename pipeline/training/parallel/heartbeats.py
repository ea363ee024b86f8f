"""Which ranks of a run are lost, by heartbeats over its store.

A connection that was cut looks like one on which nobody sends, and NCCL's kernels wait for a rank
that is dead: neither the host, which waits for them in a read, nor NCCL would notice.
"""

import os
import socket
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import psutil

BEAT = 1.0  # seconds
# Heartbeats that a rank may leave out. TCP repeats a packet after 0.2 s, 0.4 s …, so that a
# connection which was cut for half a minute is tried again 51 s after the cut: less than that would
# end a run that could go on.
LOST_AFTER = 90
LATE = 3  # heartbeats; on a busy machine one is left out now and then
DONE, FAILED = b"done", b"failed"  # in place of a heartbeat, of a rank that has left


class Heartbeats:
    """Each rank counts in the run's store, once every BEAT seconds, and reads the others' counts.

    `lost` is the name of a rank that has failed or no longer counts, "" before; `on_loss` is then
    called, once, in a thread. What is counted is heartbeats, not seconds: a process that was
    stopped for a while suspects nobody.
    """

    def __init__(self, store: Any, rank: int, on_loss: Callable[[], None]) -> None:
        self.lost = ""
        self._store, self._rank, self._on_loss = store, rank, on_loss
        self._found, self._left = threading.Event(), threading.Event()
        self._last_word = FAILED
        self._names: dict[int, str] = {}
        self._here: dict[int, psutil.Process] = {}
        self._counts: dict[int, bytes] = {}
        self._missed: dict[int, int] = {}
        self._unanswered = 0
        works = (self._beat, self._judge)
        self._threads = [threading.Thread(target=work, daemon=True) for work in works]

    @property
    def identity(self) -> tuple[str, int, float]:
        """How other ranks know this process: its machine, its number there, and its start."""
        process = psutil.Process()
        return socket.gethostname(), process.pid, process.create_time()

    def start(self, identities: Sequence[tuple[str, int, float]]) -> None:
        """Begin to count. Every rank has called `announce` before. `identities`: of all ranks."""
        several = len({machine for machine, *_ in identities}) > 1
        for rank, (machine, pid, created) in enumerate(identities):
            if rank == self._rank:
                continue
            self._names[rank] = f"rank {rank} of {len(identities)}" + f" on {machine}" * several
            self._missed[rank] = 0
            with suppress(psutil.Error):  # in another container, or on another machine
                process = psutil.Process(pid)
                if process.create_time() == created:
                    self._here[rank] = process
        for thread in self._threads:
            thread.start()

    def announce(self) -> None:
        """The first heartbeat."""
        self._store.set(str(self._rank), "0")

    def stop(self, done: bool) -> None:
        """Tell the other ranks that this one is `done`, or that they should not wait for it."""
        self._last_word = DONE if done else FAILED
        self._left.set()
        for thread in self._threads:
            thread.join(2 * BEAT)  # the store may not answer

    def name_lost(self, within: float) -> str:
        """The lost rank, for which it waits `within` seconds; else one that is late; else ""."""
        self._found.wait(within)
        return self.lost or self._silent_for(LATE)

    def _beat(self) -> None:
        others = list(self._names)
        keys = [*map(str, others)]
        count = 0
        with suppress(RuntimeError):  # the store is gone: `_judge` notices
            while not self._left.wait(BEAT):
                count += 1
                self._store.set(str(self._rank), str(count))
                for rank, now in zip(others, self._store.multi_get(keys), strict=True):
                    is_silent = now == self._counts.get(rank)
                    self._missed[rank] = self._missed[rank] + 1 if is_silent else 0
                    self._counts[rank] = now
                    process = self._here.get(rank)
                    if is_silent and process is not None and now != DONE and not runs(process):
                        self._store.set(str(rank), FAILED)  # other machines do not see it
                        self._counts[rank], self._missed[rank] = FAILED, LOST_AFTER + 1
                self._unanswered = 0
            self._store.set(str(self._rank), self._last_word)

    def _judge(self) -> None:
        """In a thread of its own: the store of a machine that is gone does not answer."""
        while not self._left.wait(BEAT):
            self._unanswered += 1
            if lost := self._lost():
                self.lost = lost
                self._found.set()
                self._on_loss()
                return

    def _lost(self) -> str:
        if silent := self._silent_for(LOST_AFTER):
            return silent
        for rank, missed in self._missed.items():
            # what it says itself arrives before
            if self._counts.get(rank) == FAILED and missed >= LATE:
                return self._names[rank]
        return ""

    def _silent_for(self, beats: int) -> str:
        """The rank that left out most heartbeats, if more than `beats`; else the store's machine.

        "" if there is neither.
        """
        working = [rank for rank in self._missed if self._counts.get(rank) != DONE]
        rank = max(working, key=self._missed.__getitem__, default=None)
        if rank is not None and self._missed[rank] > beats:
            return self._names[rank]
        return f"the machine at {os.environ['MASTER_ADDR']}" if self._unanswered > beats else ""


def runs(process: psutil.Process) -> bool:
    """Whether the process has not ended. A zombie has: only its exit code was not asked for."""
    with suppress(psutil.NoSuchProcess):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False
