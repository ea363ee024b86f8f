"""The models that the inference process has loaded, and how they are sampled: what the screens that
prompt share.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from pipeline.errors import UserError
from pipeline.project.params.load import Params
from pipeline.project.stage_graph import Project
from pipeline.stages.registry import GRAPH, open_project
from pipeline.views.model_library import GONE, Entry, Library
from pipeline.views.models import REFUSED, WITHOUT_WEIGHTS, trusts_remote_code
from tui.services.engine_client import Inference


@dataclass(frozen=True)
class Sampling:
    """Temperature 0 is greedy; top_k 0 and top_p 1 are off. `limit`: maximum tokens; `k`: rows of
    the top-k table.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    limit: int = 20
    k: int = 5

    def __str__(self) -> str:
        cuts = [f"top-k {self.top_k}"] * (self.top_k > 0) + [f"top-p {self.top_p:g}"] * (
            self.top_p < 1
        )
        parts = (
            [f"temperature {self.temperature:g}", *cuts, f"seed {self.seed}"]
            if self.temperature
            else ["greedy"]
        )
        candidates = [f"{self.k} candidates"] * bool(self.k)
        return " · ".join([*parts, f"{self.limit} tokens", *candidates])

    def fields(self) -> dict[str, float | int]:
        """The arguments of the engine's `generate`."""
        return {name: value for name, value in asdict(self).items() if name != "k"}


class LoadedModels:
    """The models that the inference process has loaded, which makes room for another by itself.

    A model's name in requests is its path. The screens share one object, `shared_models`.
    """

    def __init__(self, inference: Inference, library: Library, params: Path) -> None:
        self.inference, self.library, self._params = inference, library, params
        self._pid: int | None = None  # of the process that has the models loaded
        # with the engine's facts
        self._loaded: dict[Path, tuple[str, dict[str, Any]]] = {}
        self._load_lock = asyncio.Lock()

    def has_chat(self, entries: Sequence[Entry]) -> bool:
        """Whether all models are loaded and have a chat template."""
        loaded = [self._loaded.get(entry.model.path) for entry in entries]
        return bool(loaded) and all(model and model[1].get("chat") for model in loaded)

    def is_loaded(self, entry: Entry) -> bool:
        """Whether the model is loaded. Does not check whether its files changed since."""
        return self._pid == self.inference.pid and entry.model.path in self._loaded

    async def load(self, entry: Entry) -> None:
        """Load the model unless it is loaded and its files are the same. Raises UserError if it
        cannot.
        """
        path = entry.model.path
        async with self._load_lock:
            if self._pid != self.inference.pid:  # another process has none of them
                self._loaded.clear()
            stamp = await asyncio.to_thread(self.library.stamp, entry.model)
            if path in self._loaded and self._loaded[path][0] == stamp:
                return
            if stamp == GONE:
                raise UserError(f"{path} no longer exists. Select another model.")
            verdict = (await asyncio.to_thread(self.library.check, entry)).verdict
            is_missing = verdict and verdict.state == WITHOUT_WEIGHTS
            if verdict and (
                verdict.state == REFUSED or (is_missing and not self.inference.replays)
            ):
                raise UserError(verdict.reason or verdict.state)
            base = await asyncio.to_thread(self.library.base, entry.model)
            trust = base is not None and await asyncio.to_thread(
                trusts_remote_code, self._params, base
            )
            adapter = path if entry.model.kind == "adapter" else None
            fields = {"base": base, "adapter": adapter, "trust_remote_code": trust}
            facts = await self.inference.ask("load", name=str(path), **fields)
            for name in facts["unloaded"]:  # they made room
                self._loaded.pop(Path(name), None)
            self._loaded[path] = stamp, facts
            self._pid = self.inference.pid


class Host(Protocol):
    """The workbench, which has one inference process and its models for all screens."""

    root: Path
    params_path: Path
    inference: Inference | None
    models: LoadedModels | None


def shared_models(workbench: Host) -> LoadedModels:
    """The workbench's models, for all its screens."""
    if workbench.inference is None:
        workbench.inference = Inference(workbench.root)
    if workbench.models is None:
        try:
            project = open_project(workbench.params_path)
        # its models are listed anyway, and the pipeline screen says what is wrong
        except (UserError, OSError):
            project = Project(workbench.root, Params(kinds=GRAPH.sections), GRAPH)
        workbench.models = LoadedModels(
            workbench.inference, Library(project), workbench.params_path
        )
    return workbench.models


class Latest:
    """Runs a job one at a time. Any number of requests during a run cause a single further run."""

    def __init__(self, job: Callable[[], Awaitable[None]]) -> None:
        self._job = job
        self._running = self._again = False

    async def run(self) -> None:
        self._again = True
        if self._running:
            return
        self._running = True
        try:
            while self._again:
                self._again = False
                await self._job()
        finally:
            self._running = False
