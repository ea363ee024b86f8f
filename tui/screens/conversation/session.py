"""Asks the inference process for the answers to a message, one model after the other."""

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import aclosing
from dataclasses import asdict
from typing import Any

from textual.content import Content

from pipeline.errors import UserError
from pipeline.files.async_worker import WorkerDied
from pipeline.inference.talk import OPEN, Answer, Message, State, Turn
from pipeline.stages.registry import METHODS
from pipeline.views.model_library import Entry
from tui.screens.conversation.sampling import Sampling
from tui.services.loaded_models import LoadedModels
from tui.widgets.cells import interval_strip, method_sign
from tui.widgets.colors import LOOKS

MAX_NAMES = 4  # of models
STRONGEST, TRACK = 2.0, 11  # strength, and cells of its scale
# folder → method
SWEEPS = {stage.output: name for name, stage in METHODS.items() if stage.kind == "adapters"}


class Session:
    """The models that are asked, at which strength and sampling.

    `chats`: a model reads the messages before; else each message is a prompt of its own, which is
    put into the chat template only if `template` says so.
    """

    def __init__(self, models: LoadedModels, sampling: Sampling, chats: bool) -> None:
        self.models, self.sampling, self.chats = models, sampling, chats
        self.strength, self.template = 1.0, chats
        self.entries: list[Entry] = []
        self.asked: dict[str, Entry] = {}  # path → model, of all that were chosen so far
        self.shows_thoughts = False

    def use(self, entries: Sequence[Entry]) -> None:
        """Ask these models from now on."""
        self.entries = list(entries)
        self.asked |= {str(entry.model.path): entry for entry in entries}

    @property
    def scales(self) -> bool:
        """Whether any of the models is an adapter whose strength can be set."""
        return any(entry.model.scales for entry in self.entries)

    def facts(self, turns: Sequence[Turn]) -> Iterator[Content | str]:
        """What is set, and how full the model's window is, the most important first: what does not
        fit is cut at the end.
        """
        names = [Content.styled(entry.label, sign_of(entry)[1]) for entry in self.entries]
        shown = Content(" beside ").join(names) or "no model"
        yield shown if len(names) <= MAX_NAMES else f"{len(names)} models"
        if self.models.inference.replays:
            yield "recorded answers"
        if self.scales:
            at = self.strength / STRONGEST
            yield f"×{self.strength:.2f} {interval_strip(0.0, at, at, TRACK)}"
        for answer in turns[-1].reply.answers[:1] if turns else ():
            if answer.window:
                yield f"context {answer.prompt_tokens + answer.tokens:,} of {answer.window:,}"
        yield str(self.sampling)
        if self.template and not self.chats:
            yield "chat template"

    def new_answers(self) -> list[Answer]:
        answers = []
        for entry in self.entries:
            strength = self.strength if entry.model.scales else None
            answers.append(Answer(str(entry.model.path), entry.label, strength))
        return answers

    async def write(self, text: str, requests: Sequence[tuple[Answer, list[Message]]]) -> None:
        """Fill in the answers to a text, as they arrive.

        The models are loaded first, then comes the table of next tokens of all, which takes a step
        each. If a model fails, the reason is its answer's `error`. Raises WorkerDied if the process
        ends. Text that arrived until then, or until it was cancelled, stays.
        """
        unfinished, answers = (State.INTERRUPTED, ""), [answer for answer, _ in requests]
        try:
            for answer in answers:
                await self._load(answer)
            if not self.chats:  # a template is for all or none: they are compared
                chat = all(answer.chat for answer in answers)
                for answer in answers:
                    answer.chat = chat
            if self.sampling.k:
                await self.fill_table(text, answers)
            for answer, messages in requests:
                await self._write_one(answer, text, messages)
        except WorkerDied:
            unfinished = (State.FAILED, "the engine ended")
            raise
        finally:  # also when it is cancelled
            for answer in answers:
                if answer.unfinished:
                    answer.state, answer.error = unfinished

    async def _load(self, answer: Answer) -> None:
        answer.state = State.LOADING
        try:
            has_chat = await self.models.load(self.asked[answer.model])
            answer.chat = has_chat and self.template
            answer.state = State.WAITING
        except UserError as error:
            _fail(answer, error)

    async def fill_table(self, text: str, answers: Sequence[Answer]) -> None:
        """The likeliest next tokens of the models that did not fail."""
        asked = {answer.model: answer for answer in answers if answer.state != State.FAILED}
        if not asked:
            return
        strength = {a.model: a.strength for a in asked.values() if a.strength is not None}
        chat = all(answer.chat for answer in asked.values())
        result = await self.models.inference.ask(
            "top_k", models=list(asked), text=text, k=self.sampling.k, strength=strength, chat=chat
        )
        for model, facts in result["answers"].items():
            answer = asked[model]
            if facts.get("error"):
                _fail(answer, facts["error"])
            answer.probabilities = facts.get("of", {})
            answer.top_k = [(one["token"], one["probability"]) for one in facts.get("top_k", [])]

    async def _write_one(self, answer: Answer, text: str, messages: list[Message]) -> None:
        if answer.state == State.FAILED:
            return
        fields = {**asdict(self.sampling), "model": answer.model, "strength": answer.strength}
        del fields["k"]  # it is of the table
        fields |= {"messages": messages} if self.chats else {"text": text, "chat": answer.chat}
        answer.state = State.READING
        try:
            await self.models.load(self.asked[answer.model])  # another may have taken its place
            # Closing the stream cancels the request: it must not wait for the garbage collector.
            async with aclosing(self.models.inference.stream("generate", **fields)) as events:
                async for event in events:
                    _take(answer, event)
                    await asyncio.sleep(0)  # tokens may arrive fast: let keys through
        except UserError as error:
            _fail(answer, error)


def _take(answer: Answer, event: dict[str, Any]) -> None:
    match event["event"]:
        case "prompt":
            answer.prompt_tokens, answer.window = event["tokens"], event["window"]
            answer.cut_messages, answer.cut_tokens = event["cut_messages"], event["cut_tokens"]
            if event["opens_thought"]:  # the template has written the tag
                answer.text += f"{OPEN}\n"
        case "token":
            answer.state = State.WRITING
            answer.tokens += 1
            answer.text += event["text"]
        case "done":
            answer.state = State(event["reason"])
            answer.tokens_per_second = event["tokens_per_second"]


def _fail(answer: Answer, error: UserError | str) -> None:
    """Say why, with the model's name for its path. Raises the error if the engine ended, which
    concerns all models.
    """
    if isinstance(error, WorkerDied):
        raise error
    text = str(error).removeprefix(f"{answer.model} ").replace(answer.model, answer.label)
    answer.state, answer.error = State.FAILED, text


def sign_of(entry: Entry) -> tuple[str, str]:
    """The sign of a model and its style: its method's, as its curve has them. A variant's own name
    (`prefix`) comes first, which its adapter calls otherwise.
    """
    method = entry.model.method.removesuffix("_tuning")
    names = entry.label, SWEEPS.get(entry.group, ""), "lora" if method == "dora" else method
    return method_sign(next((name for name in names if name in LOOKS), ""))
