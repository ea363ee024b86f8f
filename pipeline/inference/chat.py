"""A conversation of several turns with a model, as text that arrives token by token."""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from pipeline.errors import UserError
from pipeline.files.text import join_texts
from pipeline.inference import engine
from pipeline.inference.engine import LoadedModel
from pipeline.models.generate import GREEDY, Sampling, encode_text, generate

Message = dict[str, str]  # role and content
ANSWER_SHARE = 4  # a history that is cut leaves at least 1/4 of the window for the answer


class History(NamedTuple):
    """A conversation as a prompt, without what does not fit."""

    ids: tuple[int, ...]
    cut_messages: int = 0  # left out at the beginning; of a model without chat template always 0
    cut_tokens: int = 0
    opens_thought: bool = False  # whether the template begins the answer with <think>


def fit_history(loaded: LoadedModel, messages: Sequence[Message], limit: int) -> History:
    """The prompt of a conversation, cut so that an answer of `limit` tokens has room.

    In a chat template, the system message stays and the oldest turns are left out until the rest
    fits. Without a template the contents are one text, cut at its beginning. The last message is
    the user's. Raises UserError as `engine.encode` does.
    """
    room = loaded.model.max_length - min(limit, loaded.model.max_length // ANSWER_SHARE)
    if not loaded.tokenizer.has_template:
        return _fit_text(loaded, join_texts([message["content"] for message in messages]), room)
    head = [message for message in messages[:1] if message["role"] == "system"]
    # Turns are cut before a user's message: templates reject a conversation that begins with an
    # answer.
    starts = [n for n, message in enumerate(messages) if message["role"] == "user"] or [len(head)]
    starts[0] = len(head)

    def rendered(start: int) -> str:
        return loaded.tokenizer.render([*head, *messages[start:]], True)

    def ids(start: int) -> tuple[int, ...]:
        return encode_text(loaded.name, loaded.tokenizer, rendered(start))

    everything = ids(starts[0])
    if len(everything) <= room:
        return History(everything, opens_thought=_opens_thought(rendered(starts[0])))
    # the fewest turns to leave out; the last message is read even if its answer gets less than its
    # share
    fewest = bisect_left(
        starts, True, hi=len(starts) - 1, key=lambda start: len(ids(start)) <= room
    )
    start = starts[fewest]
    prompt = rendered(start)
    fitting = engine.encode(loaded, prompt)
    cut = len(everything) - len(fitting)
    return History(fitting, start - len(head), cut, _opens_thought(prompt))


def _fit_text(loaded: LoadedModel, text: str, room: int) -> History:
    ids = encode_text(loaded.name, loaded.tokenizer, text)
    if len(ids) <= room:
        return History(ids)
    begin = ids[:1] if ids[0] == loaded.tokenizer.bos_id else ()
    fitting = begin + ids[len(ids) - max(room - len(begin), 1) :]
    return History(fitting, cut_tokens=len(ids) - len(fitting))


def _opens_thought(prompt: str) -> bool:
    return prompt.rstrip().endswith("<think>")


@dataclass
class Conversation:
    """The turns so far. Without a chat template, a model completes each text by itself."""

    system: str = ""
    sampling: Sampling = GREEDY
    limit: int = 512  # tokens of an answer, at most
    turns: list[Message] = field(default_factory=list)

    @property
    def messages(self) -> list[Message]:
        """System prompt and turns, as the chat template and data files have them."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return system + self.turns

    def ask(self, text: str) -> None:
        """Add the user's turn; the next answer replies to it."""
        self.turns.append({"role": "user", "content": text})

    def keep(self, answer: str) -> None:
        """Add the model's turn. An empty answer takes the user's turn back too."""
        if answer:
            self.turns.append({"role": "assistant", "content": answer})
        else:
            self.undo()

    def undo(self) -> str:
        """Take back the last question and its answer; returns the question, or an empty text."""
        while self.turns:
            if (turn := self.turns.pop())["role"] == "user":
                return turn["content"]
        return ""

    def examples(self, is_chat: bool) -> list[dict[str, object]]:
        """Rows of a data file: the conversation, or texts with their completions."""
        if is_chat:
            return [{"messages": self.messages}]
        contents = [turn["content"] for turn in self.turns]
        pairs = zip(contents[::2], contents[1::2], strict=True)
        return [{"prompt": prompt, "completion": completion} for prompt, completion in pairs]

    def answer(self, loaded: LoadedModel) -> Iterator[str]:
        """A model's answer to the last turn, piece by piece; it is not added. Raises UserError."""
        tokenizer = loaded.tokenizer
        is_chat = tokenizer.has_template
        prompt = tokenizer.render(self.messages, True) if is_chat else self.turns[-1]["content"]
        try:
            ids = engine.encode(loaded, prompt)
        except UserError as error:
            if is_chat and len(self.turns) > 1:
                raise UserError(
                    f"{error} /undo takes the last turn back, /reset begins anew."
                ) from None
            raise
        decode_next = tokenizer.stream()
        begun = not is_chat
        for id_ in generate(loaded.model, ids, tokenizer.end_ids, self.limit, self.sampling):
            piece = decode_next(id_)
            if not begun:  # an answer begins without the white space of its template
                piece = piece.lstrip()
                begun = bool(piece)
            if piece:
                yield piece
