"""Units that end with the command that started them: what engines without a queue share."""

import os
from abc import abstractmethod
from collections.abc import Collection, Mapping
from typing import Generic, TypeVar

from pipeline.fleet.engines import Queued, Submission
from pipeline.fleet.unit import STOP, attempts, journal_folder, node_name, read_unit
from pipeline.project.logs.run_state import alive

T = TypeVar("T")


class Attended(Generic[T]):
    """Starts units when there is room. One that was lost is for `wait` to submit again.

    T: what an engine knows of an attempt that it has started.
    """

    has_gangs = has_queue = False

    def __init__(self) -> None:
        self._waiting = list[int]()
        self._running = dict[int, T]()

    @abstractmethod
    def start(self, run: Submission, number: int) -> T | None:
        """Start an attempt; None if there is no room."""

    @abstractmethod
    def look(self, attempt: T) -> Queued | None:
        """What it does now; None if it has ended."""

    @abstractmethod
    def wait_for(self, attempt: T) -> None:
        """Wait until an attempt has ended that was told to stop."""

    def submit(self, run: Submission, numbers: Collection[int]) -> str:
        self._reap()
        known = {*self._waiting, *self._running}
        self._waiting += [number for number in numbers if number not in known]
        self._fill(run)
        return str(os.getpid())

    def states(self, run: Submission, numbers: Collection[int]) -> Mapping[int, Queued]:
        found = self._reap()
        stopped = {number for number in numbers if (run.unit_folder(number) / STOP).exists()}
        self._waiting = [number for number in self._waiting if number not in stopped]
        self._fill(run)
        for number in numbers:
            if number in found:
                continue
            if number in self._running or _is_elsewhere(run, number):
                found[number] = Queued("running")
            elif number in self._waiting:
                found[number] = Queued("queued")
        return found

    def cancel(self, run: Submission, numbers: Collection[int]) -> None:  # noqa: ARG002
        self._waiting = [number for number in self._waiting if number not in numbers]
        for number in numbers:
            if number in self._running:
                self.wait_for(self._running.pop(number))

    def follow(self, run: Submission, script: str) -> None:
        """It has no queue."""

    def _reap(self) -> dict[int, Queued]:
        """What attempts do that have not ended; the others leave room."""
        found = dict[int, Queued]()
        for number, attempt in list(self._running.items()):
            if state := self.look(attempt):
                found[number] = state
            else:
                del self._running[number]
        return found

    def _fill(self, run: Submission) -> None:
        while self._waiting:
            attempt = self.start(run, self._waiting[0])
            if attempt is None:
                break
            self._running[self._waiting.pop(0)] = attempt


def _is_elsewhere(run: Submission, number: int) -> bool:
    """Whether an attempt of another command goes on, or of a node that was lost."""
    folder = run.unit_folder(number)
    made = attempts(folder)
    if made and made[-1].node == node_name():
        return made[-1].runs_here
    return bool(made) and alive(journal_folder(folder, read_unit(folder)))
