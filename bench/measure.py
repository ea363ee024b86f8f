"""Timing in turns, so that other load on the machine affects all runs alike."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True)
class Row:
    """One row of the table. `ratio` compares the run with `reference`; `goal` says in which
    direction.

    `seconds`: 0 where none were measured."""

    what: str
    seconds: float
    reference: str
    ratio: float | None
    goal: str
    met: bool

    def cells(self) -> tuple[str, ...]:
        time_ = f"{self.seconds * 1e3:.2f} ms" if self.seconds else ""
        if self.seconds >= 1:
            time_ = f"{self.seconds:.1f} s"
        ratio = "" if self.ratio is None else f"{self.ratio:.2f} ×"
        return self.what, time_, self.reference, ratio, self.goal, "met" if self.met else "missed"


def in_turns(runs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each run over `rounds` turns, after one warm-up turn."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if turn:
                times[name].append(time.perf_counter() - start)
    return {name: median(seconds) for name, seconds in times.items()}
