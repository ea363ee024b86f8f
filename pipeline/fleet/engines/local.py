"""The devices of this machine: a process for each, as many at once as there are devices."""

import os
import signal
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from typing import Any

from pipeline.errors import AGAIN
from pipeline.files.locks import is_running
from pipeline.fleet.engines import Place, Queued, Submission
from pipeline.fleet.unit import CORES, attempts, node_name

STOP = "stop"  # in a unit's folder: another command has canceled it


class Local:
    """Runs units as children of this process."""

    has_gangs = has_queue = False

    def __init__(self, cluster: Any) -> None:
        self._most = cluster.at_once
        self._waiting = list[int]()
        self._running = dict[int, tuple[subprocess.Popen[bytes], Mapping[str, str]]]()
        self._places = list[Mapping[str, str]]()  # environments of processes that may still start

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
        for number in numbers:
            (run.unit_folder(number) / STOP).unlink(missing_ok=True)
        self._waiting += [number for number in numbers if number not in self._running]
        if not self._running:
            self._places = _places(min(self._most, len(self._waiting)))
        self._start(run)
        return str(os.getpid())

    def states(self, run: Submission, numbers: Collection[int]) -> Mapping[int, Queued]:
        for number, (process, place) in list(self._running.items()):
            if (code := process.poll()) is None:
                continue
            del self._running[number]
            self._places.append(place)
            stopped = (run.unit_folder(number) / STOP).exists()
            if (code == AGAIN or code < 0) and not stopped:
                self._waiting.append(number)
        self._start(run)
        found = dict[int, Queued]()
        for number in numbers:
            if number in self._running or self._is_elsewhere(run, number):
                found[number] = Queued("running")
            elif number in self._waiting:
                found[number] = Queued("queued")
            elif (run.unit_folder(number) / STOP).exists():
                found[number] = Queued("stopped")
        return found

    def cancel(self, run: Submission, numbers: Collection[int]) -> None:
        self._waiting = [number for number in self._waiting if number not in numbers]
        for number in numbers:
            if number in self._running:
                self._running[number][0].terminate()
                self._running[number][0].wait()
            elif self._is_elsewhere(run, number):
                # the command that waits for it does not start it again
                (run.unit_folder(number) / STOP).touch()
                with suppress(ProcessLookupError):
                    os.kill(attempts(run.unit_folder(number))[-1].pid, signal.SIGTERM)

    def follow(self, run: Submission, script: str) -> None:
        """It has no queue."""

    def _start(self, run: Submission) -> None:
        while self._waiting and self._places:
            number, place = self._waiting.pop(0), self._places.pop(0)
            folder = run.unit_folder(number)
            command = [sys.executable, "-P", "-m", "lora_workbench", "fleet", "unit", str(folder)]
            # of a group of its own: Ctrl-C is this process's to pass on
            process = subprocess.Popen(
                command,
                env={**os.environ, **place},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                start_new_session=True,
            )
            self._running[number] = process, place

    def _is_elsewhere(self, run: Submission, number: int) -> bool:
        """Whether a process of another command runs the unit on this machine."""
        made = attempts(run.unit_folder(number))
        return bool(made) and made[-1].node == node_name() and is_running(made[-1].pid)


def _places(most: int) -> list[Mapping[str, str]]:
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
