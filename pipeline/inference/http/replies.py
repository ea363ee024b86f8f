"""Answers in the formats of OpenAI's two APIs, in one piece or as chunks of a stream."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.inference.http.choices import Piece, TextToken

Json = dict[str, Any]
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


@dataclass
class Choice:
    """One choice so far."""

    text: str = ""
    tokens: list[TextToken] = field(default_factory=list)
    finish: str | None = None
    calls: Sequence[Json] = ()

    def add(self, piece: Piece) -> None:
        self.text += piece.text
        self.tokens += piece.tokens
        self.finish = piece.finish
        self.calls = piece.calls


class ChatFormat:
    """chat.completion and chat.completion.chunk."""

    prefix, object_, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, word: Callable[[int], str], logprobs: bool) -> None:
        self._word, self._wants_logprobs = word, logprobs

    def choice(self, index: int, choice: Choice) -> Json:
        message: Json = {"role": "assistant", "content": choice.text, "refusal": None}
        if choice.calls:
            message |= {"content": choice.text or None, "tool_calls": choice.calls}
        return {
            "index": index,
            "message": message,
            "logprobs": self._logprobs(choice.tokens),
            "finish_reason": choice.finish,
        }

    def chunk(self, piece: Piece) -> Json:
        delta: Json = {"content": piece.text} if piece.text or piece.tokens else {}
        if piece.calls:
            delta["tool_calls"] = [{"index": n, **call} for n, call in enumerate(piece.calls)]
        return {
            "index": piece.index,
            "delta": delta,
            "logprobs": self._logprobs(piece.tokens),
            "finish_reason": piece.finish,
        }

    def opening(self, index: int) -> Json | None:
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def _logprobs(self, tokens: Sequence[TextToken]) -> Json | None:
        if not self._wants_logprobs:
            return None
        content = []
        for token, _ in tokens:
            top = [self._entry(id_, logprob) for id_, logprob in token.top]
            content.append(self._entry(token.id, token.logprob) | {"top_logprobs": top})
        return {"content": content, "refusal": None}

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
        logprobs = self._logprobs(index, tokens) if self._wants_logprobs else None
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}

    def _logprobs(self, index: int, tokens: Sequence[TextToken]) -> Json:
        start = len(self._echoes.get(index, ""))
        words, logprobs, top, offsets = list[str](), list[float](), list[Json](), list[int]()
        for token, offset in tokens:
            words.append(self._word(token.id))
            logprobs.append(token.logprob)
            top.append({self._word(id_): logprob for id_, logprob in token.top})
            offsets.append(start + offset)
        return {
            "tokens": words,
            "token_logprobs": logprobs,
            "top_logprobs": top,
            "text_offset": offsets,
        }


# How an API writes choices. `prefix` begins an answer's id, and `object_` is its type; `opening`
# comes before a choice's first piece in a stream.
Format = ChatFormat | CompletionFormat


def _bytes_of(word: str) -> bytes:
    """A token's bytes; those of an incomplete character are written <0xE2> in its text."""
    parts = _BYTE.split(word)  # every second one is the hexadecimal number of a byte
    parts[::2] = [part.encode().hex() for part in parts[::2]]
    return bytes.fromhex("".join(parts))


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
