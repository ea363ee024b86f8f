"""Sends requests to the inference process and keeps up to MAX_LOADED models loaded there, evicting the oldest."""

import asyncio
from collections import OrderedDict
from collections.abc import AsyncGenerator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.inference.catalog import REFUSED
from pipeline.project.stage_graph import ARTIFACTS
from pipeline.workbench import open_project
from tui.screens.adapters.session.catalog import Entry, Library, Stamp
from tui.screens.adapters.session.sampling import Sampling
from tui.screens.adapters.session.transcript import Answer
from tui.services.engine_client import Inference

MAX_LOADED = 9  # models kept loaded, and compared side by side


def trusts_remote_code(params: Path, base: Path) -> bool:
    """Whether a base may run its own code: if params.yaml trusts it, and only for the project's own models."""
    try:
        project = open_project(params)
        folders = [owner.root / ARTIFACTS for owner in (project, project.parent) if owner]
        is_own = any(base.resolve().is_relative_to(folder.resolve()) for folder in folders)
        return is_own and project.params.pretrain.trust_remote_code
    except UserError:  # the pipeline screen reports it
        return False


class RequestQueue:
    """Tracks which models the current process has loaded. A model's name in requests is its path."""

    def __init__(self, inference: Inference, library: Library, params: Path) -> None:
        self.inference, self._library, self._params = inference, library, params
        self._pid: int | None = None
        self._loaded: OrderedDict[Path, tuple[Stamp, dict[str, Any]]] = OrderedDict()
        self._load_lock = asyncio.Lock()

    def has_chat(self, entries: Sequence[Entry]) -> bool:
        """Whether all models are loaded and have a chat template."""
        loaded = [self._loaded.get(entry.model.path) for entry in entries]
        return bool(loaded) and all(model and model[1].get("chat") for model in loaded)

    def is_loaded(self, entry: Entry) -> bool:
        """Whether the model is loaded. Does not check whether its files changed since."""
        return self._pid == self.inference.pid and entry.model.path in self._loaded

    async def load(self, entry: Entry) -> dict[str, Any]:
        """Load the model unless it is loaded. Returns the engine's facts about it. Raises UserError if it cannot."""
        async with self._load_lock:
            return await self._load(entry)

    async def _load(self, entry: Entry) -> dict[str, Any]:
        self._forget_if_restarted()
        path = entry.model.path
        stamp = await asyncio.to_thread(self._library.stamp, entry.model)
        loaded = self._loaded.get(path)
        if loaded is None or loaded[0] != stamp:
            await self._check_loadable(entry, stamp)
            await self._evict_oldest(path)
            adapter = path if entry.model.kind == "adapter" else None
            base = await asyncio.to_thread(self._library.base, entry.model)
            trust = base is not None and await asyncio.to_thread(trusts_remote_code, self._params, base)
            fields = {"base": base, "adapter": adapter, "trust_remote_code": trust}
            facts = await self.inference.ask("load", name=str(path), **fields)
            self._pid = self.inference.pid
            self._loaded[path] = stamp, facts
        self._loaded.move_to_end(path)
        return self._loaded[path][1]

    def _forget_if_restarted(self) -> None:
        if self._pid != self.inference.pid:
            self._loaded.clear()

    async def _check_loadable(self, entry: Entry, stamp: Stamp) -> None:
        if stamp == ((),):
            raise UserError(f"{entry.model.path} no longer exists. Select another model.")
        verdict = (await asyncio.to_thread(self._library.check, entry)).verdict
        if verdict and verdict.state == REFUSED:
            raise UserError(verdict.reason or REFUSED)

    async def _evict_oldest(self, path: Path) -> None:
        while len(self._loaded.keys() - {path}) >= MAX_LOADED:
            oldest = next(other for other in self._loaded if other != path)
            del self._loaded[oldest]
            await self.inference.ask("unload", name=str(oldest))

    async def top_k(
        self, models: Mapping[Path, Answer], text: str, sampling: Sampling, chat: bool
    ) -> dict[Path, dict[str, Any]]:
        """The engine's answer per model: `top_k` and `of`, or `error`. All models must be loaded."""
        strength = {str(path): answer.strength for path, answer in models.items() if answer.strength is not None}
        names = list(map(str, models))
        answer = await self.inference.ask("top_k", models=names, text=text, k=sampling.k, strength=strength, chat=chat)
        return {path: answer["answers"][str(path)] for path in models}

    def complete(
        self, path: Path, answer: Answer, text: str, sampling: Sampling, chat: bool
    ) -> AsyncGenerator[dict[str, Any], None]:
        """Stream the engine's answers to `generate`. Closing the generator cancels the request."""
        strength = {} if answer.strength is None else {"strength": answer.strength}
        fields: dict[str, Any] = {"model": str(path), "text": text, "chat": chat, **strength, **sampling.fields()}
        return self.inference.stream("generate", **fields)

    async def attention(
        self, entry: Entry, text: str, strength: float, chat: bool, layer: int, head: int
    ) -> dict[str, Any]:
        """The attention weights of a head over `text`. Raises UserError."""
        await self.load(entry)
        fields: dict[str, Any] = {"model": str(entry.model.path), "text": text, "chat": chat}
        scaled = {"strength": strength} if entry.model.scales else {}
        return await self.inference.ask("attention", layer=layer, head=head, **fields, **scaled)
