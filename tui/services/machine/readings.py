"""CPU, memory and GPUs over time, and what some processes take of them: read once a second in a
thread.
"""

import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING, NamedTuple

from pipeline.files.cgroup import cpu_quota, cpu_seconds
from pipeline.files.memory import read_memory
from pipeline.project.process import AUTO, asked
from tui.services.machine.nvml import Gpu, GpuReading, Gpus

if TYPE_CHECKING:
    from psutil import Process

FIRST = 0.5  # seconds before the first reading
EVERY = 1.0  # seconds between two readings
KEPT = 3600  # readings: an hour
CHILDREN_EVERY = 10  # readings: a list of all processes takes as long as all else together
STALE = 5.0  # seconds without a reading after which the last one is no longer the present


class ProcessReading(NamedTuple):
    """A process with its children: cores' worth of CPU time, resident bytes, bytes on GPUs (None:
    not told).
    """

    cpu: float
    memory: int
    gpu_memory: int | None = None


class Sample(NamedTuple):
    """A reading of everything: `cpu` is the share of all usable cores, memory is in bytes."""

    time: float  # seconds since the epoch
    cpu: float
    memory: int
    gpus: tuple[GpuReading, ...] = ()
    processes: Mapping[str, ProcessReading] = {}


class Machine:
    """Reads the machine once a second after `start`, and keeps the last hour.

    `processes` is called in the thread at each reading: label → process id of those to follow.
    """

    def __init__(self, processes: Callable[[], Mapping[str, int]] = dict) -> None:
        self.cores = float(os.cpu_count() or 1)
        self.memory = 0  # bytes in total: the container's limit, if it has one; 0: not known yet
        self.limited = False  # whether it is a container's limit
        self.gpus: list[Gpu] = []
        self.problem = ""  # why CPU and memory cannot be read
        self.gpu_problem = ""  # why no GPU can be read, or one of them
        self._processes = processes
        self.samples: tuple[Sample, ...] = ()  # the oldest first
        self._gpus: Gpus | None = None  # until the first reading
        self._quota: tuple[float, Path] | None = None  # of a container: cores, and its folder
        self._before = (0.0, 0.0)  # time, and CPU seconds of the container, when it was read
        self._followed: Mapping[str, int] = {}
        self._trees: dict[str, list[Process]] = {}  # label → the process and its children
        self._count = 0  # readings
        self._ended = Event()

    def start(self) -> None:
        """Begin to read."""
        Thread(target=self._run, name="machine", daemon=True).start()

    def stop(self) -> None:
        self._ended.set()

    @property
    def last(self) -> Sample | None:
        """The last reading; None if there is none, or none lately: a driver may hang."""
        if self.samples and time.time() - self.samples[-1].time < STALE:
            return self.samples[-1]
        return None

    @property
    def name(self) -> str:
        """The device that trains: H100, 4 × H100, or cpu."""
        gpus = self.gpus[self._asked]
        if not gpus:
            return "cpu"
        return f"{len(gpus)} × {gpus[0].name}" if len(gpus) > 1 else gpus[0].name

    @property
    def _asked(self) -> slice:
        """Which of the GPUs train, as --device, LORA_DEVICE or the params file say; without them
        all.
        """
        kind, _, index = asked().name.partition(":")
        if kind == "cuda" and index.isdecimal():
            return slice(int(index), int(index) + 1)
        return slice(0, None if kind in (AUTO, "cuda") else 0)

    def summary(self) -> str:
        """Used of total memory of the device that trains, as H100 12/80 GiB; "" while nothing was
        read.
        """
        last, gpus = self.last, self.gpus[self._asked]
        if last is None:
            return ""
        used, total = last.memory, self.memory
        if gpus:
            sizes = [reading.memory for reading in last.gpus[self._asked]]
            if None in sizes:  # a GPU that was lost
                return self.name
            used, total = sum(filter(None, sizes)), sum(gpu.memory for gpu in gpus)
        return f"{self.name} {_gib(used)}/{_gib(total)} GiB"

    def _run(self) -> None:
        # a share of CPU needs a while, and the first paint should not wait for imports of 40 ms
        while not self._ended.wait(EVERY if self.samples else FIRST):
            try:
                self._read()
                self.problem = ""
            # whatever a broken /proc or driver does: a traceback would be drawn over the screen
            except Exception as error:
                self.problem = f"The machine cannot be read: {error}."

    def _read(self) -> None:
        import psutil  # 20 ms

        if not self._gpus:
            self._quota = cpu_quota()
            self.cores = float(psutil.cpu_count() or 1)
            if self._quota:
                self.cores = min(self._quota[0], self.cores)
            self._cpu()  # begins the interval of the first reading
            self._gpus = Gpus()
            self.gpus, self.gpu_problem = self._gpus.devices, self._gpus.problem
            return
        gpus, followed = self._gpus.read(), self._processes()
        self.gpu_problem = self._gpus.problem
        if followed != self._followed or self._count % CHILDREN_EVERY == 0:
            self._follow(followed)
        self._count += 1
        memory = read_memory()
        self.memory, self.limited = memory.total, memory.limited
        cpu, processes = self._cpu(), self._read_processes()
        sample = Sample(time.time(), cpu, memory.used, gpus, processes)
        self.samples = (*self.samples[1 - KEPT :], sample)

    def _cpu(self) -> float:
        """The share of all cores since the last call, within the limit of a container."""
        import psutil

        if self._quota is None:
            return float(psutil.cpu_percent(None)) / 100
        before, self._before = self._before, (time.monotonic(), cpu_seconds(self._quota[1]))
        seconds, used = (now - then for now, then in zip(self._before, before, strict=True))
        return min(used / seconds / self.cores, 1.0)

    def _follow(self, processes: Mapping[str, int]) -> None:
        """List the processes and their children. Known ones keep their object, which has the CPU
        time at its last call.
        """
        import psutil

        known = {process: process for tree in self._trees.values() for process in tree}
        self._followed, self._trees = processes, {}
        for label, pid in processes.items():
            with suppress(psutil.Error):
                tree = [psutil.Process(pid)]
                if pid != os.getpid():  # its children are the pipeline and the engine
                    tree += tree[0].children(recursive=True)
                self._trees[label] = [known.get(process, process) for process in tree]

    def _read_processes(self) -> dict[str, ProcessReading]:
        """A reading of each process that is still there."""
        import psutil

        on_gpus = self._gpus.memory_by_process() if self._gpus else {}
        readings = {}
        for label, tree in self._trees.items():
            known = list[tuple[float, int, int]]()
            for process in tree:
                # it may be gone, or another user's
                with suppress(psutil.Error), process.oneshot():
                    cpu, memory = process.cpu_percent(None) / 100, process.memory_info().rss
                    known.append((cpu, memory, on_gpus.get(process.pid, 0)))
            if known:
                cpu, memory, gpu_memory = map(sum, zip(*known, strict=True))
                readings[label] = ProcessReading(cpu, memory, gpu_memory if on_gpus else None)
        return readings


def _gib(size: int) -> str:
    """1.1, 12: a digit after the point below 10 GiB."""
    gib = size / 2**30
    return f"{gib:.1f}" if gib < 9.95 else f"{gib:.0f}"
