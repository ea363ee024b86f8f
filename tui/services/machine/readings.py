"""CPU, memory and GPUs over time, and what some processes take of them: read once a second in a
thread.
"""

import os
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from threading import Event, Lock, Thread
from typing import TYPE_CHECKING, NamedTuple

from pipeline.files.cgroup import cpu_quota, cpu_seconds
from pipeline.files.memory import read_memory
from pipeline.project.process import AUTO, asked, is_valid
from tui.services.machine.nvml import Gpu, GpuReading, Gpus

if TYPE_CHECKING:
    from psutil import Process

# seconds before the first reading: its imports take 40 ms, which the first paint should not wait
# for
FIRST = 0.5
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
    """A reading of everything: `cpu` is the share of all usable cores, memory is in bytes; None:
    cannot be read.
    """

    time: float  # seconds since the epoch
    cpu: float | None
    memory: int | None
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
        self._samples: deque[Sample] = deque(maxlen=KEPT)
        self._lock, self._ended = Lock(), Event()
        self._thread: Thread | None = None

    def start(self) -> None:
        """Begin to read, once."""
        if self._thread is None:
            self._thread = Thread(target=self._run, name="machine", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        self._ended.set()

    @property
    def samples(self) -> tuple[Sample, ...]:
        """The readings, oldest first."""
        with self._lock:
            return tuple(self._samples)

    @property
    def last(self) -> Sample | None:
        """The last reading; None if there is none, or none lately: a driver may hang."""
        with self._lock:
            last = self._samples[-1] if self._samples else None
        return last if last and time.time() - last.time < STALE else None

    @property
    def name(self) -> str:
        """The device that trains: H100, 4 × H100, or cpu."""
        if not (gpus := self.gpus[self._asked]):
            return "cpu"
        return f"{len(gpus)} × {gpus[0].name}" if len(gpus) > 1 else gpus[0].name

    @property
    def _asked(self) -> slice:
        """Which of the GPUs train, as --device, LORA_DEVICE or the params file say; without them
        all.
        """
        name = asked().name
        index = int(name[5:]) if is_valid(name) and name.startswith("cuda:") else 0
        if name.startswith("cuda:"):
            return slice(index, index + 1)
        return slice(0, None if name in (AUTO, "cuda") else 0)

    def summary(self) -> str:
        """Used of total memory of the device that trains, as H100 12/80 GiB; "" while nothing was
        read.
        """
        last = self.last
        if last is None:
            return ""
        gpus, sizes = self.gpus[self._asked], [reading.memory for reading in last.gpus[self._asked]]
        used = last.memory
        if gpus:
            used = None if None in sizes else sum(size or 0 for size in sizes)
        total = sum(gpu.memory for gpu in gpus) or self.memory
        return (
            f"{self.name} {_gib(used)}/{_gib(total)} GiB"
            if used is not None and total
            else self.name
        )

    def _run(self) -> None:
        if self._ended.wait(FIRST):
            return
        gpus, host = None, None
        try:
            host = _Host()
            self.cores = host.cores
            self.memory, self.limited = host.memory.total, host.memory.limited
        # whatever a broken /proc or driver does: a traceback would be drawn over the screen
        except Exception as error:
            self.problem = f"CPU and memory cannot be read: {error}."
        try:
            gpus = Gpus()
            self.gpus = gpus.devices
        except Exception as error:
            self.gpu_problem = f"GPUs cannot be read: {error}."
        # a share of CPU needs a while
        while not self._ended.wait(EVERY if self._samples else FIRST):
            try:
                self._read(host, gpus)
            except Exception as error:
                self.problem = f"The machine cannot be read: {error}."

    def _read(self, host: "_Host | None", gpus: Gpus | None) -> None:
        readings = gpus.read() if gpus else ()
        cpu, used, processes = None, None, dict[str, ProcessReading]()
        if host:
            followed = self._processes()
            on_gpus = gpus.memory_by_process() if gpus and gpus.devices and followed else None
            cpu, used, processes = host.cpu(), host.used(), host.processes(followed, on_gpus)
            self.problem = ""
        if gpus:
            self.gpu_problem = gpus.problem
        with self._lock:
            self._samples.append(Sample(time.time(), cpu, used, readings, processes))


class _Host:
    """CPU and memory by psutil, within the limits of a container."""

    def __init__(self) -> None:
        import psutil  # 20 ms

        self._psutil = psutil
        self.memory = read_memory()
        self._quota = cpu_quota()
        self.cores = (
            min(self._quota[0], psutil.cpu_count() or 1)
            if self._quota
            else float(psutil.cpu_count() or 1)
        )
        # time, and CPU seconds of the control group, at the last call of `cpu`
        self._before = (0.0, 0.0)
        self._trees: dict[int, list[Process]] = {}  # process id → itself and its children
        self._count = 0
        self.cpu()  # begins the interval of the first reading

    def cpu(self) -> float:
        """The share of all cores since the last call."""
        if self._quota is None:
            return float(self._psutil.cpu_percent(None)) / 100
        now, before = (time.monotonic(), cpu_seconds(self._quota[1])), self._before
        self._before = now
        return min((now[1] - before[1]) / (now[0] - before[0]) / self.cores, 1.0)

    def used(self) -> int:
        return read_memory().used

    def processes(
        self, followed: Mapping[str, int], on_gpus: Mapping[int, int] | None
    ) -> dict[str, ProcessReading]:
        """A reading of each process that is still there."""
        for pid in self._trees.keys() - followed.values():
            del self._trees[pid]
        readings = {}
        for label, pid in followed.items():
            if pid not in self._trees or self._count % CHILDREN_EVERY == 0:
                self._find_children(pid)
            cpu, memory, gpu_memory, seen = 0.0, 0, 0, False
            for process in self._trees[pid]:
                # it may be gone, or another user's
                with suppress(self._psutil.Error), process.oneshot():
                    cpu += process.cpu_percent(None) / 100
                    memory += process.memory_info().rss
                    gpu_memory += (on_gpus or {}).get(process.pid, 0)
                    seen = True
            if seen:
                readings[label] = ProcessReading(cpu, memory, gpu_memory if on_gpus else None)
        self._count += 1
        return readings

    def _find_children(self, pid: int) -> None:
        """List the process and its children. Known ones keep their object, which has the CPU time
        at its last call.
        """
        known = {process.pid: process for process in self._trees.get(pid, ())}
        tree: list[Process] = []
        with suppress(self._psutil.Error):
            root = self._psutil.Process(pid)
            # Of this program the children are what it started: the pipeline and the engine.
            tree = [root] if pid == os.getpid() else [root, *root.children(recursive=True)]
        # A process that has another's id now is not equal to the one before.
        self._trees[pid] = [known[p.pid] if known.get(p.pid) == p else p for p in tree]


def _gib(size: int) -> str:
    """1.1, 12: a digit after the point below 10 GiB."""
    gib = size / 2**30
    return f"{gib:.1f}" if gib < 9.95 else f"{gib:.0f}"
