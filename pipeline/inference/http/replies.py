"""Answers in the formats of OpenAI's two APIs, in one piece or as chunks of a stream."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from pipeline.inference.http.choices import Piece, TextToken

Json = dict[str, Any]
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


@dataclass
class Choice:
    """One choice so far."""

    text: str = ""
    tokens: list[TextToken] = field(default_factory=list)
    finish: str | None = None

    def add(self, piece: Piece) -> None:
        self.text += piece.text
        self.tokens += piece.tokens
        self.finish = piece.finish


class Format(Protocol):
    """How an API writes choices. `prefix` and `object_`: of its ids, and what an answer is
    called.
    """

    prefix: str
    object_: str
    chunk_object: str

    def choice(self, index: int, choice: Choice) -> Json:
        """A finished choice."""

    def chunk(self, piece: Piece) -> Json:
        """A part of a choice in a stream."""

    def opening(self, index: int) -> Json | None:
        """What comes before a choice's first piece in a stream."""


class ChatFormat:
    """chat.completion and chat.completion.chunk."""

    prefix, object_, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, word: Callable[[int], str], logprobs: bool) -> None:
        self._word, self._wants_logprobs = word, logprobs

    def choice(self, index: int, choice: Choice) -> Json:
        message = {"role": "assistant", "content": choice.text, "refusal": None}
        return {
            "index": index,
            "message": message,
            "logprobs": self._logprobs(choice.tokens),
            "finish_reason": choice.finish,
        }

    def chunk(self, piece: Piece) -> Json:
        return {
            "index": piece.index,
            "delta": {"content": piece.text} if piece.text or piece.tokens else {},
            "logprobs": self._logprobs(piece.tokens),
            "finish_reason": piece.finish,
        }

    def opening(self, index: int) -> Json | None:
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def _logprobs(self, tokens: Sequence[TextToken]) -> Json | None:
        if not self._wants_logprobs:
            return None
        return {
            "content": [
                self._entry(token.id, token.logprob)
                | {"top_logprobs": [self._entry(*each) for each in token.top]}
                for token, _ in tokens
            ],
            "refusal": None,
        }

    def _entry(self, id_: int, logprob: float) -> Json:
        word = self._word(id_)
        return {"token": word, "logprob": logprob, "bytes": list(_bytes_of(word))}


class CompletionFormat:
    """text_completion, in one piece and in chunks. `echoes`: what precedes each choice's text."""

    prefix, object_, chunk_object = "cmpl", "text_completion", "text_completion"

    def __init__(
        self, word: Callable[[int], str], logprobs: bool, echoes: Mapping[int, str]
    ) -> None:
        self._word, self._wants_logprobs, self._echoes = word, logprobs, echoes

    def choice(self, index: int, choice: Choice) -> Json:
        text = self._echoes.get(index, "") + choice.text
        return self._entry(index, text, choice.tokens, choice.finish)

    def chunk(self, piece: Piece) -> Json:
        return self._entry(piece.index, piece.text, piece.tokens, piece.finish)

    def opening(self, index: int) -> Json | None:
        return self._entry(index, self._echoes[index], (), None) if index in self._echoes else None

    def _entry(
        self, index: int, text: str, tokens: Sequence[TextToken], finish: str | None
    ) -> Json:
        logprobs = {
            "tokens": [self._word(token.id) for token, _ in tokens],
            "token_logprobs": [token.logprob for token, _ in tokens],
            "top_logprobs": [
                {self._word(id_): value for id_, value in token.top} for token, _ in tokens
            ],
            "text_offset": [len(self._echoes.get(index, "")) + offset for _, offset in tokens],
        }
        wanted = logprobs if self._wants_logprobs else None
        return {"index": index, "text": text, "logprobs": wanted, "finish_reason": finish}


def _bytes_of(word: str) -> bytes:
    """A token's bytes; those of an incomplete character are written <0xE2> in its text."""
    return b"".join(
        part.encode() if n % 2 == 0 else bytes.fromhex(part)
        for n, part in enumerate(_BYTE.split(word))
    )


@dataclass
class Usage:
    """Tokens of a request; a prompt with several choices counts once."""

    prompt: int
    generated: int = 0

    def json(self) -> Json:
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.generated,
            "total_tokens": self.prompt + self.generated,
        }
