"""Weights & Biases: offline unless there is a key or WANDB_MODE; `wandb sync` sends it later."""

import netrc
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from pipeline.project.logs.run_log import Sample
from pipeline.project.logs.trackers import TrackedRun

LIBRARY, FOLDER, VIEW = "wandb", "runs/wandb", "wandb sync {folder}/wandb/offline-run-*"
HOST = "api.wandb.ai"


class Tracker:
    """A run whose id is its name: what a resumed run writes is synced into the same one."""

    def __init__(self, run: TrackedRun) -> None:
        import wandb

        # Nothing of this machine: no code, git state, host or system metrics; the training process
        # is another one.
        settings = wandb.Settings(
            mode=_mode(),
            silent=True,
            console="off",
            disable_git=True,
            disable_code=True,
            x_disable_stats=True,
            x_disable_meta=True,
        )
        run.folder.mkdir(parents=True, exist_ok=True)
        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or run.project,
            name=run.place,
            id=re.sub(r"[^\w.-]", "-", run.name),
            resume="allow",
            reinit="create_new",  # an adapter of a sweep does not end the one before
            dir=str(run.folder),
            config=dict(run.params),
            settings=settings,
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def log_text(self, step: int, samples: Sequence[Sample]) -> None:
        import wandb

        table = wandb.Table(
            columns=["step", "prompt", "answer"], data=[list(sample[:3]) for sample in samples]
        )
        self._run.log({"step": step, "samples": table})

    def flush(self) -> None:
        """Nothing: wandb's own process writes in the background."""

    def finish(self, state: str) -> None:
        self._run.finish(exit_code=0 if state == "done" else 1)


def _mode() -> str:
    """WANDB_MODE, else online where there is a key and offline where wandb would ask for one."""
    if mode := os.environ.get("WANDB_MODE"):
        return mode
    known: object = os.environ.get("WANDB_API_KEY")
    with suppress(OSError, UnicodeError, netrc.NetrcParseError):
        known = known or netrc.netrc().authenticators(HOST)
    return "online" if known else "offline"
