"""Prompts sent to several models at once: requests to the inference process, answers,
transcript.
"""

import json
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from pipeline.errors import UserError
from pipeline.files.async_worker import WorkerDied
from pipeline.files.text import escape_whitespace
from pipeline.views.model_library import Entry
from tui.services.loaded_models import LoadedModels, Sampling

MAX_EXCHANGES = 200
WAITING, LOADING = "waiting", "loading"  # states of an answer before its model has begun


@dataclass
class Answer:
    """A model's answer. `ended`: end, length or interrupted; `error`: why it is missing or
    incomplete.
    """

    name: str
    strength: float | None = None  # scale of an adapter
    top_k: list[tuple[str, float]] = field(default_factory=list)
    # probability of every token in the table; None: not in the vocabulary
    of: dict[str, float | None] = field(default_factory=dict)
    text: str = ""
    ended: str = ""
    error: str = ""

    @property
    def title(self) -> str:
        return self.name if self.strength in (None, 1.0) else f"{self.name} ×{self.strength:.2f}"

    def fail(self, error: UserError | str, entry: Entry) -> None:
        """Store why the model cannot go on, with its name for its path, and without it in front:
        the same for several models is shown once. Raises the error if the engine ended, which
        concerns all models."""
        if isinstance(error, WorkerDied):
            raise error
        path = str(entry.model.path)
        self.error, self.ended = str(error).removeprefix(f"{path} ").replace(path, entry.label), ""


@dataclass
class Exchange:
    """A prompt and its answers, in display order. Field names are the keys of the JSON
    transcript.
    """

    prompt: str
    sampling: Sampling
    answers: list[Answer]
    # prompted with the chat template: the answer is a turn, not a continuation of the prompt
    chat: bool = False

    def parts(self, answer: Answer) -> tuple[str, str]:
        """The text shown before an answer, and the answer."""
        return (
            (f"{self.prompt} → ", answer.text.lstrip()) if self.chat else (self.prompt, answer.text)
        )

    def full_text(self, answer: Answer) -> str:
        return "".join(self.parts(answer))

    def answers_text(self) -> str:
        """All answers as text, with the models' names if there are several."""
        if len(self.answers) == 1:
            return self.full_text(self.answers[0])
        return "\n".join(f"{answer.title}: {self.full_text(answer)}" for answer in self.answers)


def transcript(exchanges: Sequence[Exchange], suffix: str) -> str:
    """The transcript: JSON lines if the suffix is .jsonl, else Markdown."""
    if suffix == ".jsonl":
        return "".join(
            json.dumps(asdict(exchange), ensure_ascii=False) + "\n" for exchange in exchanges
        )
    lines = ["# Transcript"]
    for exchange in exchanges:
        lines += [f"\n## {exchange.prompt}\n", f"{exchange.sampling}\n"]
        for answer in exchange.answers:
            note = answer.error or (answer.ended if answer.ended == "interrupted" else "")
            lines.append(
                f"- **{answer.title}**: {exchange.full_text(answer)}"
                + (f" ({note})" if note else "")
            )
            if answer.top_k:
                top = (
                    f"{escape_whitespace(token)} {100 * probability:.1f}%"
                    for token, probability in answer.top_k
                )
                lines.append(f"  - next: {', '.join(top)}")
    return "\n".join(lines) + "\n"


class Conversation:
    """The exchanges of this session, the newest last, and the models of the newest one."""

    def __init__(self, models: LoadedModels) -> None:
        self.models, self._inference = models, models.inference
        self.exchanges: deque[Exchange] = deque(maxlen=MAX_EXCHANGES)
        self.sampling = Sampling()
        self.chat = False
        self._entries: list[Entry] = []

    @property
    def newest(self) -> Exchange | None:
        return self.exchanges[-1] if self.exchanges else None

    def begin(self, prompt: str, entries: Sequence[Entry], strength: float) -> Exchange:
        """Append an exchange for `answers` to fill. `strength` applies to adapters that can be
        scaled.
        """
        answers = [
            Answer(e.label, strength if e.model.scales else None, ended=WAITING) for e in entries
        ]
        self._entries = list(entries)
        self.exchanges.append(Exchange(prompt, self.sampling, answers))
        return self.exchanges[-1]

    async def answers(self, exchange: Exchange) -> AsyncGenerator[None, None]:
        """Prompt the models. Yields whenever an answer or the top-k table changed.

        If one model fails, the reason is its answer's `error`. Raises UserError if no model can
        continue. Text that arrived before that, or before the generator was cancelled or closed,
        stays.
        """
        answers, unfinished = exchange.answers, ""
        pairs = list(zip(self._entries, answers, strict=True))
        try:
            for entry, answer in pairs:
                if not self.models.is_loaded(entry):
                    answer.ended = LOADING
                    yield
                await self._load(entry, answer)
                answer.ended = "" if answer.error else WAITING
                if answer.error:
                    yield
            exchange.chat = self._uses_chat_template()
            # The table of all models comes first: it takes one step each, while completions take
            # many.
            await self._top_k(exchange.prompt, answers)
            yield
            for entry, answer in pairs:
                if not answer.error:
                    async for _ in self._complete(entry, answer, exchange):
                        yield
        except UserError as error:
            unfinished = "the engine ended" if isinstance(error, WorkerDied) else str(error)
            raise
        finally:  # also when it is cancelled or closed; then there is no error
            for answer in answers:
                if answer.ended in (WAITING, LOADING) and not answer.error:
                    answer.ended, answer.error = (
                        ("", unfinished) if unfinished else ("interrupted", "")
                    )

    async def _load(self, entry: Entry, answer: Answer) -> None:
        try:
            await self.models.load(entry)
        except UserError as error:
            answer.fail(error, entry)

    def _uses_chat_template(self) -> bool:
        return self.chat and self.models.has_chat(self._entries)

    async def _top_k(self, prompt: str, answers: Sequence[Answer]) -> None:
        """Fill in the top-k tables of the answers without an error."""
        pairs = zip(self._entries, answers, strict=True)
        models = {entry.model.path: answer for entry, answer in pairs if not answer.error}
        if not models:
            return
        fields: dict[str, Any] = {
            "models": list(map(str, models)),
            "text": prompt,
            "k": self.sampling.k,
        }
        fields["strength"] = {
            str(path): a.strength for path, a in models.items() if a.strength is not None
        }
        result = (await self._inference.ask("top_k", chat=self._uses_chat_template(), **fields))[
            "answers"
        ]
        for entry, answer in zip(self._entries, answers, strict=True):
            if entry.model.path not in models:
                continue
            facts = result[str(entry.model.path)]
            if facts.get("error"):
                answer.fail(facts["error"], entry)
            answer.of = facts.get("of", {})
            answer.top_k = [
                (choice["token"], choice["probability"]) for choice in facts.get("top_k", [])
            ]

    async def _complete(
        self, entry: Entry, answer: Answer, exchange: Exchange
    ) -> AsyncGenerator[None, None]:
        fields: dict[str, Any] = {
            "model": str(entry.model.path),
            "text": exchange.prompt,
            "chat": exchange.chat,
        }
        if answer.strength is not None:
            fields["strength"] = answer.strength
        try:
            # Closing the stream cancels the request, so it must not wait for the garbage collector.
            async with aclosing(
                self._inference.stream("generate", **fields, **self.sampling.fields())
            ) as events:
                async for event in events:
                    answer.text += event["text"] if event["event"] == "token" else ""
                    answer.ended = event.get("reason", answer.ended)
                    yield
        except UserError as error:
            answer.fail(error, entry)
            yield

    async def probe(self, strength: float) -> list[Answer]:
        """The newest exchange's top-k table at another strength. The exchange itself is not
        changed.
        """
        if self.newest is None:
            return []
        answers = [
            replace(a, strength=None if a.strength is None else strength)
            for a in self.newest.answers
        ]
        for entry, answer in zip(self._entries, answers, strict=True):
            if not answer.error:  # it may have been evicted
                await self._load(entry, answer)
        await self._top_k(self.newest.prompt, answers)
        return answers

    async def attention(
        self, entry: Entry, exchange: Exchange, strength: float, **head: int
    ) -> dict[str, Any]:
        """The attention over an exchange's prompt: weights of the head at `layer` and `head`,
        without them small maps of all heads. Raises UserError."""
        await self.models.load(entry)
        fields: dict[str, Any] = {
            "model": str(entry.model.path),
            "text": exchange.prompt,
            "chat": exchange.chat,
        }
        if entry.model.kind == "adapter":
            fields["strength"] = strength
        return await self._inference.ask(
            "attention" if head else "attention_maps", **fields, **head
        )
