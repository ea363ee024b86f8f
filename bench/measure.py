"""Times taken in turns, so that what else the machine does falls on all of them."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True)
class Row:
    """One line of the table: seconds, and `ratio`, how many times as much or as little as `reference`."""

    what: str
    seconds: float
    reference: str
    ratio: float | None
    goal: str
    met: bool

    def cells(self) -> tuple[str, ...]:
        time_ = f"{self.seconds * 1e3:.2f} ms" if self.seconds < 1 else f"{self.seconds:.1f} s"
        ratio = "" if self.ratio is None else f"{self.ratio:.2f} ×"
        return self.what, time_, self.reference, ratio, self.goal, "met" if self.met else "missed"


def in_turns(runs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each run over `rounds` turns, after one turn that does not count."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if turn:
                times[name].append(time.perf_counter() - start)
    return {name: median(found) for name, found in times.items()}
