"""Reads the logs of runs as they grow, while that takes little of the machine."""

import asyncio
from collections.abc import Iterable
from time import monotonic, process_time

from pipeline.views.curves import Runs

CPU_SHARE = 0.02  # of a core for drawing a live chart, since training needs the rest
MAX_DELAY = 1.5  # seconds after which it is drawn anyway


class LogReader:
    """`is_stale`: a file may have changed since the last reading. `is_urgent`: the user waits."""

    def __init__(self, runs: Runs) -> None:
        self.runs = runs
        self.is_stale = self.is_urgent = self.is_reading = False
        self._read_at = self._cpu_time = 0.0  # wall-clock and CPU seconds

    async def read(self, states: Iterable[object]) -> bool:
        """Read what has changed, if it is time; whether anything is to be drawn. `states`: of the
        stages.
        """
        self.is_reading, self.is_stale = True, False
        try:
            found = await asyncio.to_thread(self.runs.look, list(states))
            if not (found or self.is_urgent or self._is_due()):
                self.is_stale = True
                return False
            self.is_urgent = False
            self._read_at, self._cpu_time = monotonic(), process_time()
            changed = [await view.read() for view in self.runs.on]
            return found or any(changed)
        finally:
            self.is_reading = False

    def _is_due(self) -> bool:
        """Whether what was drawn since the last reading took at most CPU_SHARE, or it is late."""
        since = monotonic() - self._read_at
        return since > MAX_DELAY or process_time() - self._cpu_time < CPU_SHARE * since
