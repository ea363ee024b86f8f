"""Asks the inference process about models, and has it load what it lacks: at most so many, the longest unasked go."""

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

MOST = 9  # models that stay loaded, and that are asked side by side


def trusts(params: Path, base: Path) -> bool:
    """Whether code that comes with a base may run: where params.yaml says so, and only of the project's own models."""
    try:
        project = open_project(params)
        folders = [one.root / ARTIFACTS for one in (project, project.parent) if one]
        own = any(base.resolve().is_relative_to(folder.resolve()) for folder in folders)
        return own and project.params.pretrain.trust_remote_code
    except UserError:  # the pipeline screen says what is wrong with it
        return False


class RequestQueue:
    """Knows what is loaded in which life of the process. A model's name there is its path."""

    def __init__(self, inference: Inference, library: Library, params: Path) -> None:
        self.inference, self._library, self._params = inference, library, params
        self._pid: int | None = None
        self._loaded: OrderedDict[Path, tuple[Stamp, dict[str, Any]]] = OrderedDict()
        self._one_at_a_time = asyncio.Lock()

    def has_chat(self, entries: Sequence[Entry]) -> bool:
        """Whether all of them are loaded and have a chat template."""
        facts = [self._loaded.get(entry.model.path) for entry in entries]
        return bool(facts) and all(known and known[1].get("chat") for known in facts)

    def ready(self, entry: Entry) -> bool:
        """Whether it is loaded, unless its files have changed since."""
        return self._pid == self.inference.pid and entry.model.path in self._loaded

    async def load(self, entry: Entry) -> dict[str, Any]:
        """Have the model ready, and say what the engine knows of it. Raises UserError with the reason if it cannot."""
        async with self._one_at_a_time:
            return await self._load(entry)

    async def _load(self, entry: Entry) -> dict[str, Any]:
        self._forget_another_life()
        path = entry.model.path
        stamp = await asyncio.to_thread(self._library.stamp, entry.model)
        known = self._loaded.get(path)
        if known is None or known[0] != stamp:
            await self._refuse(entry, stamp)
            await self._make_room(path)
            adapter = path if entry.model.kind == "adapter" else None
            base = await asyncio.to_thread(self._library.base, entry.model)
            trusted = base is not None and await asyncio.to_thread(trusts, self._params, base)
            fields = {"base": base, "adapter": adapter, "trust_remote_code": trusted}
            facts = await self.inference.ask("load", name=str(path), **fields)
            self._pid = self.inference.pid
            self._loaded[path] = stamp, facts
        self._loaded.move_to_end(path)
        return self._loaded[path][1]

    def _forget_another_life(self) -> None:
        if self._pid != self.inference.pid:
            self._loaded.clear()

    async def _refuse(self, entry: Entry, stamp: Stamp) -> None:
        if stamp == ((),):
            raise UserError(f"{entry.model.path} does not exist any more. Select another model.")
        verdict = (await asyncio.to_thread(self._library.check, entry)).verdict
        if verdict and verdict.state == REFUSED:
            raise UserError(verdict.reason or REFUSED)

    async def _make_room(self, path: Path) -> None:
        while len(self._loaded.keys() - {path}) >= MOST:
            oldest = next(known for known in self._loaded if known != path)
            del self._loaded[oldest]
            await self.inference.ask("unload", name=str(oldest))

    async def top_k(
        self, models: Mapping[Path, Answer], text: str, sampling: Sampling, chat: bool
    ) -> dict[Path, dict[str, Any]]:
        """The engine's answer a model: top_k and of, or error. The models are loaded."""
        strength = {str(path): answer.strength for path, answer in models.items() if answer.strength is not None}
        names = list(map(str, models))
        done = await self.inference.ask("top_k", models=names, text=text, k=sampling.k, strength=strength, chat=chat)
        return {path: done["answers"][str(path)] for path in models}

    def complete(
        self, path: Path, answer: Answer, text: str, sampling: Sampling, chat: bool
    ) -> AsyncGenerator[dict[str, Any], None]:
        """The engine's answers to `generate`, as they come. Closing it cancels."""
        strength = {} if answer.strength is None else {"strength": answer.strength}
        fields: dict[str, Any] = {"model": str(path), "text": text, "chat": chat, **strength, **sampling.fields()}
        return self.inference.stream("generate", **fields)

    async def attention(
        self, entry: Entry, text: str, strength: float, chat: bool, layer: int, head: int
    ) -> dict[str, Any]:
        """What a head of the model attends to over `text`. Raises UserError."""
        await self.load(entry)
        fields: dict[str, Any] = {"model": str(entry.model.path), "text": text, "chat": chat}
        scaled = {"strength": strength} if entry.model.scales else {}
        return await self.inference.ask("attention", layer=layer, head=head, **fields, **scaled)
