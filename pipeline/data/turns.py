"""An example turn by turn, for the eye: what is trained on, and where `max_length` cuts it.

With a tokenizer it is the text that the model reads, as its chat template writes it; without one,
the messages.
"""

import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import zip_longest
from typing import Literal, NamedTuple

from pipeline.data.examples import Example, Message
from pipeline.data.masking import Encoder, as_turns
from pipeline.data.tokenizers.template_process import Conversation
from pipeline.data.tokenizers.word import Tokenizer
from pipeline.errors import UserError

MOST_TURNS = 64  # found by rendering each prefix, which is quadratic
Kind = Literal["trained", "read", "template", "cut"]
# Behind a message's content, what its template writes to end it.
END_OF_TURN = re.compile(r"\s*(?:<[^<>\n]{1,40}>|\[/[A-Z]+\])?\n?")


class Turn(NamedTuple):
    """The text of a turn in order; "read" is what the model reads and is not trained to write."""

    role: str
    parts: tuple[tuple[Kind, str], ...]


class View(NamedTuple):
    """The turns, and how many tokens they have; None without a tokenizer."""

    turns: tuple[Turn, ...]
    tokens: int | None = None  # with the end token
    trained: int | None = None  # labels that are not cut
    cut: int = 0


class _Piece(NamedTuple):
    """A text and its tokens: where each stops in it, and whether it is trained on."""

    role: str
    text: str
    stops: Sequence[int]
    trained: Sequence[bool]
    content: tuple[int, int]  # what is no markup of the template


def view(example: Example, tokenizer: Tokenizer | None = None, max_length: int = 0) -> View:
    """Raises UserError if the example cannot be encoded."""
    if tokenizer is not None:
        example = as_turns(example, tokenizer)
    rejected = _rejected(example)
    # a prompt that the model completes has no label
    if tokenizer is None or example.prompt == example.text:
        return View((*_plain(example), *rejected))
    encoded = Encoder(tokenizer)(example)
    trained = (False, *encoded.trained[1:])  # no token predicts the first
    kept = min(len(trained), max_length or len(trained))
    split = _of_messages if example.messages else _of_texts
    turns = tuple(_cut(split(example, trained, encoded.ids, tokenizer), kept))
    return View((*turns, *rejected), len(trained), sum(trained[:kept]), len(trained) - kept)


def _plain(example: Example) -> Iterator[Turn]:
    if example.messages:
        for number, message in enumerate(example.messages):
            learns = message["role"] == "assistant" and number not in example.untrained
            yield Turn(message["role"], (("trained" if learns else "read", _text_of(message)),))
    elif example.prompt is not None:
        yield Turn("prompt", (("read", example.prompt),))
        if example.completion:
            yield Turn("completion", (("trained", example.completion),))
    else:
        yield Turn("text", (("trained", example.text),))


def _rejected(example: Example) -> tuple[Turn, ...]:
    if isinstance(example.rejected, str):
        return (Turn("rejected", (("read", example.rejected),)),)
    return tuple(
        Turn(f"rejected {message['role']}", (("read", _text_of(message)),))
        for message in example.rejected or ()
    )


def _text_of(message: Message) -> str:
    calls = [str(call.get("function", call)) for call in message.get("tool_calls", ())]
    texts = [message.get("reasoning_content"), message["content"], *calls]
    return "\n".join(filter(None, texts))


def _of_texts(
    example: Example, trained: Sequence[bool], ids: Sequence[int], tokenizer: Tokenizer
) -> Iterator[_Piece]:
    """A text, or a prompt and its completion; the tokens around them are written as words."""
    texts = [("text", example.text)]
    if example.prompt is not None:
        texts = [("prompt", example.prompt), ("completion", example.completion)]
    at = 0
    for number, (role, text) in enumerate(texts):
        is_first, is_last = number == 0, number == len(texts) - 1
        stops = [stop for _, stop in tokenizer.spans(text)[1]]
        size = len(tokenizer.encode(text) if is_first else tokenizer.encode_following(text))
        before = after = ""
        if is_first and size > len(stops) and ids[0] == tokenizer.bos_id:
            before = tokenizer.word(ids[0])
        if is_last and len(trained) > at + size:
            size = len(trained) - at
            after = tokenizer.word(ids[-1])
        inner = size - bool(before) - bool(after)
        # a continuation has other tokens than a text: their places are estimated
        if len(stops) != inner:
            stops = [len(text) * (n + 1) // inner for n in range(inner)]
        start = len(before)
        stops = [start + stop for stop in stops]
        if before:
            stops.insert(0, start)
        whole = before + text + after
        if after:
            stops.append(len(whole))
        yield _Piece(role, whole, stops, trained[at : at + size], (start, start + len(text)))
        at += size


def _of_messages(
    example: Example, trained: Sequence[bool], ids: Sequence[int], tokenizer: Tokenizer
) -> Iterator[_Piece]:
    """A token that two turns share is of the one in which it ends."""
    text = str(tokenizer.render(example.messages, False, example.tools))
    stops = [stop for _, stop in tokenizer.spans(text)[1]]
    if len(ids) > len(stops):  # the end token that training appends
        text += tokenizer.word(ids[-1])
        stops.append(len(text))
    at = start = 0
    for message, end in zip(example.messages, _ends(example, text, tokenizer), strict=True):
        turn, last = text[start:end], bisect_right(stops, end)
        content = (message["content"] or "").strip()
        first = turn.find(content)
        inner = (first, first + len(content)) if content and first >= 0 else (0, len(turn))
        inner_stops = [stop - start for stop in stops[at:last]]
        yield _Piece(message["role"], turn, inner_stops, trained[at:last], inner)
        at, start = last, end


def _ends(example: Example, text: str, tokenizer: Tokenizer) -> Iterator[int]:
    """Where each turn ends in the rendered `text`.

    That is where the conversation up to it ends, if `text` begins with that rendering, else behind
    its content.
    """
    messages = example.messages
    prefixes = [(n, False) for n in range(1, min(len(messages), MOST_TURNS))]
    (answer,) = tokenizer.render_each([Conversation(messages, prefixes, example.tools)])
    rendered = () if isinstance(answer, UserError) else answer
    end = 0
    # None where there is no rendering: the process was stopped, or the turn is behind the most
    for message, prefix in zip_longest(messages[:-1], rendered):
        if isinstance(prefix, str) and len(prefix) > end and text.startswith(prefix):
            end = len(prefix)
        else:
            # the template writes a turn otherwise once others follow it: without thoughts, perhaps
            content = (message["content"] or "").split("</think>")[-1].strip()
            offset = text.find(content, end) if content else -1
            match = END_OF_TURN.match(text, offset + len(content)) if offset >= 0 else None
            end = match.end() if match else end
        yield end
    yield len(text)


def _cut(pieces: Iterable[_Piece], kept: int) -> Iterator[Turn]:
    """The pieces as turns; what is behind the first `kept` tokens is cut."""
    for piece in pieces:
        first, last = piece.content
        parts: list[tuple[Kind, str]] = []
        at = 0
        kind = _kind(False, kept > 0)
        for number, (stop, is_trained) in enumerate(zip(piece.stops, piece.trained, strict=True)):
            end = max(at, stop)
            kind = _kind(is_trained, number < kept)
            if kind == "read" and (end <= first or at >= last):
                kind = "template"
            _append(parts, kind, piece.text[at:end])
            at = end
        _append(parts, kind, piece.text[at:])  # what no token stands for
        kept -= len(piece.stops)
        yield Turn(piece.role, tuple(parts))


def _kind(is_trained: bool, is_kept: bool) -> Kind:
    if not is_kept:
        return "cut"
    return "trained" if is_trained else "read"


def _append(parts: list[tuple[Kind, str]], kind: Kind, text: str) -> None:
    if not text:
        return
    if parts and parts[-1][0] == kind:
        parts[-1] = (kind, parts[-1][1] + text)
    else:
        parts.append((kind, text))
