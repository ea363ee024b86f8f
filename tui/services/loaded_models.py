"""The models that the inference process has loaded, which the screens that prompt share."""

import asyncio
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.project.params.load import Params
from pipeline.project.stage_graph import Project
from pipeline.stages.registry import GRAPH, open_project
from pipeline.views.model_library import GONE, Entry, Library
from pipeline.views.models import REFUSED, WITHOUT_WEIGHTS, trusts_remote_code
from tui.services.engine_client import Inference


class LoadedModels:
    """The models that the inference process has loaded, which makes room for another by itself.

    A model's name in requests is its path. The screens share one object, `shared_models`.
    """

    def __init__(self, inference: Inference, library: Library, params: Path) -> None:
        self.inference, self.library, self._params = inference, library, params
        self._pid: int | None = None  # of the process that has the models loaded
        # path → stamp of its files, and whether it has a chat template
        self._loaded: dict[Path, tuple[str, bool]] = {}
        self._load_lock = asyncio.Lock()

    async def load(self, entry: Entry) -> bool:
        """Load the model unless it is loaded and its files are the same; returns whether it has a
        chat template. Raises UserError if it cannot.
        """
        path = entry.model.path
        async with self._load_lock:
            if self._pid != self.inference.pid:  # another process has none of them
                self._loaded.clear()
            stamp = await asyncio.to_thread(self.library.stamp, entry.model)
            loaded, has_chat = self._loaded.get(path, (GONE, False))
            if stamp == GONE:
                raise UserError(f"{path} no longer exists. Select another model.")
            if stamp == loaded:
                return has_chat
            request = await asyncio.to_thread(self._request, entry)
            facts = await self.inference.ask("load", name=str(path), **request)
            for name in facts["unloaded"]:  # they made room
                self._loaded.pop(Path(name), None)
            self._loaded[path] = stamp, bool(facts["chat"])
            self._pid = self.inference.pid
            return self._loaded[path][1]

    def _request(self, entry: Entry) -> dict[str, Any]:
        """What is to be loaded. Raises UserError if the files are not what they should be."""
        refused = [REFUSED] if self.inference.replays else [REFUSED, WITHOUT_WEIGHTS]
        verdict = self.library.check(entry).verdict
        if verdict and verdict.state in refused:
            raise UserError(verdict.reason or verdict.state)
        base = self.library.base(entry.model)
        return {
            "base": base,
            "adapter": entry.model.path if entry.model.kind == "adapter" else None,
            "trust_remote_code": base is not None and trusts_remote_code(self._params, base),
        }


def shared_models(workbench: Any) -> LoadedModels:
    """The models of the workbench, which has one inference process for all its screens."""
    workbench.inference = workbench.inference or Inference(workbench.root)
    if workbench.models is None:
        try:
            project = open_project(workbench.params_path)
        # its models are listed anyway, and the pipeline screen says what is wrong
        except (UserError, OSError):
            project = Project(workbench.root, Params(kinds=GRAPH.sections), GRAPH)
        library = Library(project)
        workbench.models = LoadedModels(workbench.inference, library, workbench.params_path)
    models: LoadedModels = workbench.models
    return models
