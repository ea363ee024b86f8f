"""Asks the inference process for the answers of a conversation, one model after the other."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from pipeline.errors import UserError
from pipeline.files.async_worker import WorkerDied
from pipeline.views.model_library import Entry
from tui.screens.chat.talk import (
    FAILED,
    INTERRUPTED,
    LOADING,
    READING,
    STARTING,
    WRITING,
    Answer,
    Message,
)
from tui.screens.chat.thoughts import OPEN
from tui.services.loaded_models import LoadedModels, Sampling
from tui.widgets.colors import LOOKS

MOST_MODELS = 2  # side by side
DEFAULT = Sampling(limit=512)
Request = tuple[Answer, list[Message]]  # an answer to write, and what the model reads for it


class Session:
    """The models that are asked, at which strength and sampling."""

    def __init__(self, models: LoadedModels) -> None:
        self.models, self.sampling, self.strength = models, DEFAULT, 1.0
        self.entries: list[Entry] = []
        self.asked: dict[str, Entry] = {}  # path → model, of all that were chosen so far

    def use(self, entries: Sequence[Entry]) -> None:
        """Ask these models from now on."""
        self.entries = list(entries)
        self.asked.update({str(entry.model.path): entry for entry in entries})

    @property
    def scales(self) -> bool:
        """Whether any of the models is an adapter whose strength can be set."""
        return any(entry.model.scales for entry in self.entries)

    def new_answers(self) -> list[Answer]:
        return [
            Answer(
                str(entry.model.path), entry.label, self.strength if entry.model.scales else None
            )
            for entry in self.entries
        ]

    async def write(self, requests: Sequence[Request]) -> AsyncGenerator[Answer, None]:
        """Fill in the answers. Yields an answer whenever it changed.

        If a model fails, the reason is its answer's `error`, and the next is asked. Raises
        WorkerDied if the process ends. Text that arrived until then, or until the generator was
        closed, stays.
        """
        unfinished = INTERRUPTED, ""
        try:
            for answer, messages in requests:
                try:
                    async with aclosing(self._write_one(answer, messages)) as changes:
                        async for _ in changes:
                            yield answer
                except WorkerDied:
                    raise
                except UserError as error:  # which names the model by its path
                    answer.state, answer.error = (
                        FAILED,
                        str(error).replace(answer.model, answer.label),
                    )
                    yield answer
        except WorkerDied:
            unfinished = (FAILED, "the engine ended")
            raise
        finally:  # also when it is cancelled or closed
            for answer, _ in requests:
                if answer.unfinished:
                    answer.state, answer.error = unfinished

    async def _write_one(
        self, answer: Answer, messages: list[Message]
    ) -> AsyncGenerator[None, None]:
        entry = self.asked[answer.model]
        if not self.models.is_loaded(entry):
            answer.state = LOADING if self.models.inference.running else STARTING
            yield
        await self.models.load(entry)
        answer.chat, answer.state = self.models.has_chat([entry]), READING
        yield
        fields = {"model": answer.model, "messages": messages, **self.sampling.fields()}
        if answer.strength is not None:
            fields["strength"] = answer.strength
        # Closing the stream cancels the request, so it must not wait for the garbage collector.
        async with aclosing(self.models.inference.stream("generate", **fields)) as events:
            async for event in events:
                if event["event"] == "prompt":
                    answer.prompt_tokens, answer.window = event["tokens"], event["window"]
                    answer.cut_messages, answer.cut_tokens = (
                        event["cut_messages"],
                        event["cut_tokens"],
                    )
                    if event["opens_thought"]:  # the template has written the tag
                        answer.pieces.append(f"{OPEN}\n")
                elif event["event"] == "token":
                    answer.state = WRITING
                    answer.tokens += 1
                    answer.pieces.append(event["text"])
                elif event["event"] == "done":
                    answer.state, answer.tokens_per_second = (
                        event["reason"],
                        event["tokens_per_second"],
                    )
                yield


def method_of(entry: Entry) -> str:
    """The name of its method in the registry: a variant's own (`prefix`), which its adapter calls
    otherwise.
    """
    return entry.label if entry.label in LOOKS else entry.model.method
