"""A fake of the inference process: it answers immediately, and dies or waits if a test says so."""

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

from pipeline.files.async_worker import WorkerDied
from pipeline.inference.requests import MAX_LOADED
from tui.services.engine_client import Inference

TOKENS = (" tisch", " und", " stuhl")
DEATH = "The inference process ended: it was killed. Prompt again to start a new one."


class FakeInference(Inference):
    """Every model gives `tisch` probability 0.5, an adapter 0.5 + strength / 4; completions are
    three tokens.
    """

    def __init__(
        self, held: bool = False, loads_held: bool = False, starts_held: bool = False
    ) -> None:
        super().__init__(Path())
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.life = 0  # 0: not running
        self.loaded: list[str] = []
        self.dies = False  # at the next generate
        self.go_on = asyncio.Event()  # completions wait for it after their first token
        self.chat = False
        self.loads = asyncio.Semaphore(0 if loads_held else 1_000_000)  # a load takes one
        self.starts = asyncio.Event()  # the first request waits for it
        self.cancelled = 0
        self.tokens: tuple[str, ...] = TOKENS  # of each answer
        self.cut_messages = 0  # of a history
        self.opens_thought = False
        if not held:
            self.go_on.set()
        if not starts_held:
            self.starts.set()

    @property
    def running(self) -> bool:
        return self.life > 0

    @property
    def pid(self) -> int | None:
        return self.life or None

    def done(self, do: str) -> list[dict[str, Any]]:
        """The fields of all requests of one kind."""
        return [fields for name, fields in self.requests if name == do]

    async def ask(self, do: str, **fields: object) -> dict[str, Any]:
        await self.starts.wait()
        self.life = self.life or 1
        self.requests.append((do, fields))
        if do == "load":
            await self.loads.acquire()
        answer: dict[str, Any] = getattr(self, f"_{do}")(**fields)
        await asyncio.sleep(0)
        return answer

    def _load(self, name: str, **_: object) -> dict[str, Any]:
        self.loaded.append(name)
        unloaded = [self.loaded.pop(0)] if len(self.loaded) > MAX_LOADED else []
        return {
            "name": name,
            "parameters": 1,
            "seconds": 0.0,
            "chat": self.chat,
            "unloaded": unloaded,
        }

    def _top_k(
        self, models: list[str], strength: dict[str, float], text: str, **_: object
    ) -> dict[str, Any]:
        return {"answers": {name: self._choices(text, strength.get(name, 0.0)) for name in models}}

    def _choices(self, text: str, strength: float) -> dict[str, Any]:
        if "wortlos" in text:
            return {"error": "it does not know: wortlos."}
        of = {"tisch": 0.5 + strength / 4, "sofa": 0.5 - strength / 4}
        return {"of": of, "top_k": [{"token": token, "probability": p} for token, p in of.items()]}

    def _status(self) -> dict[str, Any]:
        memory = {"memory_used": 2**30, "memory_total": 2**33}
        return {"device": "cpu", "name": "a machine", **memory, "loaded": ["one"], "pid": self.life}

    def _spectrum(self, adapter: str) -> dict[str, Any]:
        name = f"model.layers.0.self_attn.{Path(adapter).name}_q"
        return {"modules": [{"name": name, "values": [2.0, 1.0], "share_of_first": 0.8}]}

    async def stream(self, do: str, **fields: object) -> AsyncGenerator[dict[str, Any], None]:
        self.requests.append((do, fields))
        over = False
        try:
            if "messages" in fields:
                cut = {"cut_messages": self.cut_messages, "cut_tokens": 7 * self.cut_messages}
                yield {
                    "event": "prompt",
                    "tokens": 9,
                    "window": 64,
                    **cut,
                    "opens_thought": self.opens_thought,
                }
            for number, token in enumerate(self.tokens):
                yield {"event": "token", "text": token, "probability": 0.5}
                if self.dies:
                    self.life, self.dies, over = 0, False, True
                    raise WorkerDied(DEATH)
                if number == 0:
                    await self.go_on.wait()
            over = True
            count = len(self.tokens)
            yield {
                "event": "done",
                "reason": "length",
                "tokens": count,
                "seconds": 0.0,
                "tokens_per_second": 40.0,
            }
        finally:
            self.cancelled += not over

    async def stop(self) -> None:
        self.life = 0
