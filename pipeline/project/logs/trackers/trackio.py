"""Trackio: its SQLite file, in its own folder (TRACKIO_DIR); no server is started."""

import os
from collections.abc import Mapping, Sequence
from contextvars import copy_context
from typing import Any

from pipeline.project.logs.run_log import Sample
from pipeline.project.logs.trackers import TrackedRun

LIBRARY, FOLDER, VIEW = "trackio", "runs/trackio", "trackio show"


class Tracker:
    """A run that is continued by its name."""

    def __init__(self, run: TrackedRun) -> None:
        import trackio

        # `init` ends the run of its context. A context of its own has none, so that the runs of a
        # sweep's other adapters stay open.
        self._run: Any = copy_context().run(
            trackio.init,
            project=os.environ.get("TRACKIO_PROJECT") or run.project,
            name=run.name,
            config=dict(run.params),
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def log_text(self, step: int, samples: Sequence[Sample]) -> None:
        values = {
            f"samples/{n}": f"{sample.prompt} → {sample.answer}"
            for n, sample in enumerate(samples, 1)
        }
        self._run.log(values, step=step)

    def flush(self) -> None:
        """Nothing: its thread writes twice a second."""

    def finish(self, state: str) -> None:  # noqa: ARG002  # it has no state of a run
        self._run.finish()
