"""Prompts sent to several models at once: sampling settings, requests to the inference process, answers, transcript."""

import asyncio
import json
import math
from collections import OrderedDict, deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.files.text import escape_whitespace
from pipeline.inference.catalog import REFUSED
from pipeline.project.stage_graph import ARTIFACTS
from pipeline.workbench import open_project
from tui.screens.adapters.library import Entry, Library, Stamp
from tui.services.engine_client import EngineDied, Inference
from tui.widgets.form import FormField, Kind

MAX_LOADED = 9  # models kept loaded, and compared side by side
MAX_EXCHANGES = 200
WAITING, LOADING = "waiting", "loading"  # states of an answer before its model has begun


@dataclass(frozen=True)
class Sampling:
    """Temperature 0 is greedy; top_k 0 and top_p 1 are off. `limit`: maximum tokens; `k`: rows of the top-k table."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    limit: int = 20
    k: int = 5

    def __str__(self) -> str:
        cuts = [f"top-k {self.top_k}"] * (self.top_k > 0) + [f"top-p {self.top_p:g}"] * (self.top_p < 1)
        parts = [f"temperature {self.temperature:g}", *cuts, f"seed {self.seed}"] if self.temperature else ["greedy"]
        return " · ".join([*parts, f"{self.limit} tokens", f"{self.k} candidates"])

    def fields(self) -> dict[str, float | int]:
        """The arguments of the engine's `generate`."""
        return {name: value for name, value in asdict(self).items() if name != "k"}


def _declare(key: str, rule: str, allowed: Callable[[Any], bool]) -> FormField:
    label = key.replace("_", "-")
    kind: Kind = "number" if isinstance(getattr(Sampling, key), float) else "integer"

    def problem(value: Any) -> str:
        """`value` is still the typed text if that is no number."""
        if not isinstance(value, str) and allowed(value):
            return ""
        return f"{label} must be {rule}, got {format_setting(value)!r}."

    return FormField(key, kind, label=label, rule=rule, problem=problem)


def format_setting(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


SAMPLING_FIELDS = (
    _declare("temperature", "a number from 0", lambda value: 0 <= value < math.inf),
    _declare("top_k", "a whole number from 0 (0 cuts nothing)", lambda value: value >= 0),
    _declare("top_p", "above 0 up to 1 (1 cuts nothing)", lambda value: 0 < value <= 1),
    _declare("seed", "a whole number below 2^63", lambda value: 0 <= value < 2**63),
    _declare("limit", "a whole number from 1 to 10000", lambda value: 1 <= value <= 10_000),
    _declare("k", "a whole number from 1 to 50", lambda value: 1 <= value <= 50),
)


@dataclass
class Answer:
    """A model's answer. `ended`: end, length or interrupted; `error`: why it is missing or incomplete."""

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

    def fail(self, error: UserError) -> None:
        """Store why the model cannot go on. Raises the error if the engine ended, which concerns all models."""
        if isinstance(error, EngineDied):
            raise error
        self.error, self.ended = str(error), ""


@dataclass
class Exchange:
    """A prompt and its answers, in display order. Field names are the keys of the JSON transcript."""

    prompt: str
    sampling: Sampling
    answers: list[Answer]
    chat: bool = False  # prompted with the chat template: the answer is a turn, not a continuation of the prompt

    def parts(self, answer: Answer) -> tuple[str, str]:
        """The text shown before an answer, and the answer."""
        return (f"{self.prompt} → ", answer.text.lstrip()) if self.chat else (self.prompt, answer.text)

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
        return "".join(json.dumps(asdict(exchange), ensure_ascii=False) + "\n" for exchange in exchanges)
    lines = ["# Transcript"]
    for exchange in exchanges:
        lines += [f"\n## {exchange.prompt}\n", f"{exchange.sampling}\n"]
        for answer in exchange.answers:
            note = answer.error or (answer.ended if answer.ended == "interrupted" else "")
            lines.append(f"- **{answer.title}**: {exchange.full_text(answer)}" + (f" ({note})" if note else ""))
            if answer.top_k:
                top = (f"{escape_whitespace(token)} {100 * probability:.1f}%" for token, probability in answer.top_k)
                lines.append(f"  - next: {', '.join(top)}")
    return "\n".join(lines) + "\n"


def trusts_remote_code(params: Path, base: Path) -> bool:
    """Whether a base may run its own code: if params.yaml trusts it, and only for the project's own models."""
    try:
        project = open_project(params)
        folders = [owner.root / ARTIFACTS for owner in (project, project.parent) if owner]
        is_own = any(base.resolve().is_relative_to(folder.resolve()) for folder in folders)
        return is_own and project.params.origin.trust_remote_code
    except UserError:  # the pipeline screen reports it
        return False


class LoadedModels:
    """The models that the inference process has loaded: up to MAX_LOADED, then the oldest is unloaded.

    A model's name in requests is its path.
    """

    def __init__(self, inference: Inference, library: Library, params: Path) -> None:
        self.inference, self._library, self._params = inference, library, params
        self._pid: int | None = None  # of the process that has the models loaded
        self._loaded: OrderedDict[Path, tuple[Stamp, dict[str, Any]]] = OrderedDict()  # with the engine's facts
        self._load_lock = asyncio.Lock()

    def has_chat(self, entries: Sequence[Entry]) -> bool:
        """Whether all models are loaded and have a chat template."""
        loaded = [self._loaded.get(entry.model.path) for entry in entries]
        return bool(loaded) and all(model and model[1].get("chat") for model in loaded)

    def is_loaded(self, entry: Entry) -> bool:
        """Whether the model is loaded. Does not check whether its files changed since."""
        return self._pid == self.inference.pid and entry.model.path in self._loaded

    async def load(self, entry: Entry) -> None:
        """Load the model unless it is loaded and its files are the same. Raises UserError if it cannot."""
        path = entry.model.path
        async with self._load_lock:
            if self._pid != self.inference.pid:  # another process has none of them
                self._loaded.clear()
            stamp = await asyncio.to_thread(self._library.stamp, entry.model)
            if path in self._loaded and self._loaded[path][0] == stamp:
                self._loaded.move_to_end(path)
                return
            if stamp == ((),):
                raise UserError(f"{path} no longer exists. Select another model.")
            verdict = (await asyncio.to_thread(self._library.check, entry)).verdict
            if verdict and verdict.state == REFUSED:
                raise UserError(verdict.reason or REFUSED)
            # Make room first: the memory of the oldest may be what the new one needs.
            while len(self._loaded.keys() - {path}) >= MAX_LOADED:
                oldest = next(other for other in self._loaded if other != path)
                del self._loaded[oldest]
                await self.inference.ask("unload", name=str(oldest))
            base = await asyncio.to_thread(self._library.base, entry.model)
            trust = base is not None and await asyncio.to_thread(trusts_remote_code, self._params, base)
            adapter = path if entry.model.kind == "adapter" else None
            fields = {"base": base, "adapter": adapter, "trust_remote_code": trust}
            self._loaded[path] = stamp, await self.inference.ask("load", name=str(path), **fields)
            self._loaded.move_to_end(path)
            self._pid = self.inference.pid


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
        """Append an exchange for `answers` to fill. `strength` applies to adapters that can be scaled."""
        answers = [Answer(e.label, strength if e.model.scales else None, ended=WAITING) for e in entries]
        self._entries = list(entries)
        self.exchanges.append(Exchange(prompt, self.sampling, answers))
        return self.exchanges[-1]

    async def answers(self, exchange: Exchange) -> AsyncGenerator[None, None]:
        """Prompt the models. Yields whenever an answer or the top-k table changed.

        If one model fails, the reason is its answer's `error`. Raises UserError if no model can continue. Text that
        arrived before that, or before the generator was cancelled or closed, stays.
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
            # The table of all models comes first: it takes one step each, while completions take many.
            await self._top_k(exchange.prompt, answers)
            yield
            for entry, answer in pairs:
                if not answer.error:
                    async for _ in self._complete(entry.model.path, answer, exchange):
                        yield
        except UserError as error:
            unfinished = "the engine ended" if isinstance(error, EngineDied) else str(error)
            raise
        finally:  # also when it is cancelled or closed; then there is no error
            for answer in answers:
                if answer.ended in (WAITING, LOADING) and not answer.error:
                    answer.ended, answer.error = ("", unfinished) if unfinished else ("interrupted", "")

    async def _load(self, entry: Entry, answer: Answer) -> None:
        try:
            await self.models.load(entry)
        except UserError as error:
            answer.fail(error)

    def _uses_chat_template(self) -> bool:
        return self.chat and self.models.has_chat(self._entries)

    async def _top_k(self, prompt: str, answers: Sequence[Answer]) -> None:
        """Fill in the top-k tables of the answers without an error."""
        pairs = zip(self._entries, answers, strict=True)
        models = {entry.model.path: answer for entry, answer in pairs if not answer.error}
        if not models:
            return
        fields: dict[str, Any] = {"models": list(map(str, models)), "text": prompt, "k": self.sampling.k}
        fields["strength"] = {str(path): a.strength for path, a in models.items() if a.strength is not None}
        result = (await self._inference.ask("top_k", chat=self._uses_chat_template(), **fields))["answers"]
        for path, answer in models.items():
            facts = result[str(path)]
            answer.error, answer.of = facts.get("error", ""), facts.get("of", {})
            answer.top_k = [(choice["token"], choice["probability"]) for choice in facts.get("top_k", [])]

    async def _complete(self, path: Path, answer: Answer, exchange: Exchange) -> AsyncGenerator[None, None]:
        fields: dict[str, Any] = {"model": str(path), "text": exchange.prompt, "chat": exchange.chat}
        if answer.strength is not None:
            fields["strength"] = answer.strength
        try:
            # Closing the stream cancels the request, so it must not wait for the garbage collector.
            async with aclosing(self._inference.stream("generate", **fields, **self.sampling.fields())) as events:
                async for event in events:
                    answer.text += event["text"] if event["event"] == "token" else ""
                    answer.ended = event.get("reason", answer.ended)
                    yield
        except UserError as error:
            answer.fail(error)
            yield

    async def probe(self, strength: float) -> list[Answer]:
        """The newest exchange's top-k table at another strength. The exchange itself is not changed."""
        if self.newest is None:
            return []
        answers = [replace(a, strength=None if a.strength is None else strength) for a in self.newest.answers]
        for entry, answer in zip(self._entries, answers, strict=True):
            if not answer.error:  # it may have been evicted
                await self._load(entry, answer)
        await self._top_k(self.newest.prompt, answers)
        return answers

    async def attention(
        self, entry: Entry, text: str, strength: float, chat: bool, layer: int, head: int
    ) -> dict[str, Any]:
        """The attention weights of a head over `text`. Raises UserError."""
        await self.models.load(entry)
        fields: dict[str, Any] = {"model": str(entry.model.path), "text": text, "chat": chat}
        scaled = {"strength": strength} if entry.model.scales else {}
        return await self._inference.ask("attention", layer=layer, head=head, **fields, **scaled)


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
