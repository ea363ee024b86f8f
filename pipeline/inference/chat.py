"""A conversation of several turns with a model, as text that arrives token by token."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from pipeline.errors import UserError
from pipeline.inference import engine
from pipeline.inference.engine import LoadedModel
from pipeline.models.generate import GREEDY, Sampling, generate

Message = dict[str, str]  # role and content


@dataclass
class Conversation:
    """The turns so far. A model without a chat template completes each text by itself, without those before it.

    `limit`: most tokens of an answer.
    """

    system: str = ""
    sampling: Sampling = GREEDY
    limit: int = 512
    turns: list[Message] = field(default_factory=list)

    @property
    def messages(self) -> list[Message]:
        """System prompt and turns, as the chat template and data files have them."""
        return [{"role": "system", "content": self.system}] * bool(self.system) + self.turns

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
        """Rows of a data file: the conversation, or each text with its completion."""
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
                raise UserError(f"{error} /undo takes the last turn back, /reset begins anew.") from None
            raise
        decode_next, begun = tokenizer.stream(), not is_chat
        for id_ in generate(loaded.model, ids, tokenizer.end_ids, self.limit, self.sampling):
            piece = decode_next(id_)
            if not begun:  # an answer begins without the white space of its template
                piece = piece.lstrip()
                begun = bool(piece)
            if piece:
                yield piece
