"""Recorded answers in place of models: `python -m pipeline.inference.replay ANSWERS`, for a demo
that is shipped without weights.

It speaks the protocol of the inference process (`server.py`). `docs/demo/record.py` writes the
file. An answer is found by the model's folder and what the user has said so far, word for word;
the sampling must be the one that was recorded, greedy at strength 1.
"""

import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from pipeline.errors import UserError
from pipeline.files import worker
from pipeline.files.worker import Answer
from pipeline.inference.requests import Generate, Load, Status, TopK, Unload, parse

KINDS: dict[str, type[Struct]] = {
    "generate": Generate,
    "load": Load,
    "unload": Unload,
    "top_k": TopK,
    "status": Status,
}
NAMED = 3  # prompts that an error names
RATE = 20  # tokens per second: not the models' own, which was that of another machine


class Recorded(Struct):
    """A model's answer. `pieces` and `probabilities`: of its tokens; `of`: the probability of each
    first token that any model has among its likeliest.
    """

    pieces: list[str]
    probabilities: list[float]
    reason: str
    prompt_tokens: int
    top_k: list[tuple[str, float]]
    of: dict[str, float | None]


class Exchange(Struct):
    """What users said, the last turn at the end, and each model's answer; `chat`: in the template."""

    said: list[str]
    chat: bool
    answers: dict[str, Recorded]  # by the model's folder, relative to the demo


class Recording(Struct):
    """The file. `models`: what `load` answers of each, by its folder."""

    models: dict[str, dict[str, Any]]
    window: int
    exchanges: list[Exchange]


class Replay:
    """Each method answers a request of its name, and raises UserError if it cannot."""

    def __init__(self, path: Path) -> None:
        self._root = path.parent.resolve()
        self._recording = msgspec.json.decode(path.read_bytes(), type=Recording)
        self._exchanges = {
            (exchange.chat, *exchange.said): exchange for exchange in self._recording.exchanges
        }
        self._loaded: dict[str, str] = {}  # name → folder

    def answer(self, request: worker.Request) -> Iterator[Answer]:
        """Yields the answers to one request, the last with event "done"."""
        if not isinstance(request.do, str) or request.do not in KINDS:
            raise UserError(
                f"This demo has no weights, which {request.do!r} needs. Its README.md says how to "
                "get them."
            )
        asked = parse(KINDS[request.do], request.fields)
        if isinstance(asked, Generate):
            yield from self._generate(asked, request)
        else:
            yield {"event": "done", **getattr(self, request.do)(asked)}

    def load(self, request: Load) -> Answer:
        folder = Path(request.adapter or request.base).resolve()
        shown = os.path.relpath(folder, self._root)
        if shown not in self._recording.models:
            known = ", ".join(self._recording.models)
            raise UserError(
                f"This demo has no weights, and no recorded answers of {shown}. It has those of "
                f"{known}."
            )
        resident = request.name in self._loaded
        self._loaded[request.name] = shown
        facts = self._recording.models[shown]
        return {"name": request.name, **facts, "seconds": 0.0, "resident": resident, "unloaded": []}

    def unload(self, request: Unload) -> Answer:
        self._loaded.pop(request.name, None)
        return {"name": request.name}

    def status(self, _: Status) -> Answer:
        import psutil

        return {
            "device": "replayed",
            "name": "recorded answers, no weights",
            "memory_used": psutil.Process().memory_info().rss,
            "memory_total": psutil.virtual_memory().total,
            "loaded": [*self._loaded],
            "pid": os.getpid(),
        }

    def top_k(self, request: TopK) -> Answer:
        """As the models' own: `of` has the tokens that any of these models lists."""
        exchange = self._find([request.text], request.chat)
        recorded = {}
        answers: dict[str, Answer] = {}
        for name in request.models:
            try:
                _refuse_strength(request.strength.get(name, 1.0))
                recorded[name] = self._answer_of(name, exchange)
            except UserError as error:
                answers[name] = {"error": str(error)}
        listed = {name: answer.top_k[: request.k] for name, answer in recorded.items()}
        tokens = dict.fromkeys(token for pairs in listed.values() for token, _ in pairs)
        for name, answer in recorded.items():
            answers[name] = {
                "top_k": [{"token": token, "probability": p} for token, p in listed[name]],
                "of": {token: answer.of.get(token) for token in tokens},
            }
        return {"answers": answers}

    def _generate(self, request: Generate, cancellable: worker.Request) -> Iterator[Answer]:
        _refuse_strength(request.strength)
        if request.temperature:
            raise UserError(
                "This demo has no weights: it replays greedy answers. Set the temperature to 0."
            )
        if request.messages is None:
            exchange = self._find([request.text], request.chat)
        else:
            # a system prompt is part of it: with one, the models were not asked
            said = [turn.content for turn in request.messages if turn.role != "assistant"]
            exchange = self._find(said, True)
        answer = self._answer_of(request.model, exchange)
        start = time.perf_counter()
        if request.messages is not None:
            yield {
                "event": "prompt",
                "tokens": answer.prompt_tokens,
                "window": self._recording.window,
                "cut_messages": 0,
                "cut_tokens": 0,
                "opens_thought": False,
            }
        shown = min(len(answer.pieces), request.limit)
        pairs = zip(answer.pieces[:shown], answer.probabilities, strict=False)
        for text, probability in pairs:
            cancellable.cancelled.wait(1 / RATE)
            yield {"event": "token", "text": text, "probability": probability}
        yield {
            "event": "done",
            "reason": answer.reason if shown == len(answer.pieces) else "length",
            "tokens": shown,
            "seconds": time.perf_counter() - start,
            "tokens_per_second": None,
        }

    def _find(self, said: Sequence[str], chat: bool) -> Exchange:
        """The exchange in which the user said this. Raises UserError, which names others."""
        exchange = self._exchanges.get((chat, *(text.strip() for text in said)))
        if exchange is None:
            recorded = [other for other in self._recording.exchanges if other.chat == chat]
            others = [*dict.fromkeys(other.said[0] for other in recorded)]
            known = ", ".join(f'"{text}"' for text in others[:NAMED])
            raise UserError(
                "This demo has no weights: it replays recorded answers, and has none to this. It "
                f"knows {known}. README.md has them all, and says how to get the weights."
            )
        return exchange

    def _answer_of(self, name: str, exchange: Exchange) -> Recorded:
        folder = self._loaded.get(name, "")
        if folder not in exchange.answers:
            raise UserError(f"{name} is not loaded. Load it first.")
        return exchange.answers[folder]


def _refuse_strength(strength: float) -> None:
    if strength != 1.0:
        raise UserError(
            "This demo has no weights: its answers were recorded at strength 1. Set it to 1."
        )


def start(path: Path) -> worker.Handle:
    return Replay(path).answer


def main() -> None:
    path = Path(sys.argv[1])
    worker.serve(lambda: start(path), at_once=("status",))


if __name__ == "__main__":
    main()
