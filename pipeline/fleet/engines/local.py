"""The devices of this machine: a process for each, as many at once as there are devices."""

import os
import subprocess
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from pipeline.fleet.engines import Place, Queued, Submission
from pipeline.fleet.engines._attended import Attended
from pipeline.fleet.unit import CORES, attempt_command, ended

Environment = Mapping[str, str]


class Local(Attended[tuple[subprocess.Popen[bytes], Environment]]):
    """Runs units as children of this process."""

    unread = ("address", "cpus", "gpus", "memory", "options", "setup", "time", "warn")

    def __init__(self, _name: str, cluster: Any) -> None:
        super().__init__()
        self._most = cluster.at_once
        self._places = list[Environment]()  # of processes that may still start

    def check(self) -> None:
        """It is always here."""

    def place(self) -> Place:
        from pipeline.models.device import available_memory, best_device, cores

        device = best_device()
        count, memory = len(_places(self._most)), available_memory(device)
        if device.type == "cuda":
            return Place(count, "a GPU", memory)
        return Place(count, f"its share of {cores()} cores", memory // count, is_shared=True)

    def submit(self, run: Submission, numbers: Collection[int]) -> str:
        for number, (process, _) in self._running.items():
            if ended(run.unit_folder(number)):
                process.wait()  # it wrote that and is about to leave its place
        self._reap()
        if not self._running:
            self._places = _places(min(self._most, len(numbers)))
        return super().submit(run, numbers)

    def start(
        self, run: Submission, number: int
    ) -> tuple[subprocess.Popen[bytes], Environment] | None:
        if not self._places:
            return None
        place = self._places.pop(0)
        # of a group of its own: Ctrl-C is this process's to pass on
        process = subprocess.Popen(
            attempt_command(run.unit_folder(number)),
            env={**os.environ, **place},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        return process, place

    def look(self, attempt: tuple[subprocess.Popen[bytes], Environment]) -> Queued | None:
        process, place = attempt
        if process.poll() is None:
            return Queued("running")
        self._places.append(place)
        return None

    def wait_for(self, attempt: tuple[subprocess.Popen[bytes], Environment]) -> None:
        process, _ = attempt
        process.terminate()  # sooner than by its look at STOP
        process.wait()


def _places(most: int) -> list[Environment]:
    """The environment of each process: its GPU, or its share of the cores."""
    import torch

    from pipeline.models.device import best_device, cores

    if best_device().type == "cuda":
        count = torch.cuda.device_count()
        given = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        names: Sequence[str] = given.split(",") if given else list(map(str, range(count)))
        return [{"CUDA_VISIBLE_DEVICES": name} for name in names[: min(count, most)]]
    number = min(cores(), most)
    places: list[dict[str, str]] = [
        {"OMP_NUM_THREADS": str(cores() // number)} for _ in range(number)
    ]
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        allowed = sorted(map(str, os.sched_getaffinity(0)))
        for n, place in enumerate(places):
            place[CORES] = ",".join(allowed[n::number])
    return [*places]


ENGINE = Local
