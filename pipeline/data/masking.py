"""Label masking: examples as tokens, and which of them are trained on."""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pipeline.data.examples import Example
from pipeline.data.tokenizers.chat_template import single_rendering
from pipeline.data.tokenizers.word import Tokenizer
from pipeline.errors import UserError

RENDERED_TOGETHER = 16  # prompts per request: those of a long conversation together are quadratic in its length


@dataclass(frozen=True)
class Encoded:
    """Token ids (T,), which of them are trained on (T,), and how many more were cut off at the end."""

    ids: tuple[int, ...]
    trained: tuple[bool, ...]
    cut: int = 0

    @property
    def labels(self) -> int:
        """Number of labels. The first token is never a label: nothing before it could predict it."""
        return sum(self.trained[1:])


def encode(
    example: Example, tokenizer: Tokenizer, max_length: int = 0, positions: int | None = None, virtual: int = 0
) -> Encoded:
    """Tokenize an example and mark what is trained on.

    That is all of a text, the completion of a prompt, and the assistant's turns of a conversation, each with the end
    token behind it. `max_length` above 0 truncates. Raises UserError, with the example's location, if the result does
    not fit into the model's `positions`, less the `virtual` tokens.
    """
    if unknown := tokenizer.unknown_words(example.text):
        raise UserError(
            f"{example.location}: not in the vocabulary: {', '.join(unknown)}. "
            f"Add {example.file} to expand_vocab.data and run `lora expand-vocab`."
        )
    if example.messages:
        ids, trained = _encode_conversation(example, tokenizer)
    elif example.prompt is not None:
        if not example.completion:
            raise UserError(f'{example.location}: "prompt" needs a "completion". Add one.')
        # Tokenized separately: in one text the last word of the prompt could merge with the completion's first letters
        # into a token that a prompt at inference never has.
        prompt = tokenizer.encode(example.prompt)
        completion = _append_end(tokenizer.encode_following(example.completion), tokenizer)
        ids, trained = prompt + completion, (False,) * len(prompt) + (True,) * len(completion)
    else:
        ids = _append_end(tokenizer.encode(example.text), tokenizer)
        trained = (True,) * len(ids)
    length = min(len(ids), max_length or len(ids))
    if positions is not None and length > positions - virtual:
        less, lower = (f" less {virtual} virtual tokens", " lower virtual_tokens,") if virtual else ("", "")
        raise UserError(
            f"{example.location}: {length} tokens with the end token, more than the model's {positions} "
            f"positions{less}. Shorten it, cut it with max_length,{lower} or raise pretrain.max_positions of a "
            "MiniGPT."
        )
    return Encoded(ids[:length], trained[:length], len(ids) - length)


def _append_end(ids: tuple[int, ...], tokenizer: Tokenizer) -> tuple[int, ...]:
    """`ids` with an end token, unless the text already ends with one."""
    return ids if ids and ids[-1] in tokenizer.end_ids else (*ids, tokenizer.end_id)


def _encode_conversation(example: Example, tokenizer: Tokenizer) -> tuple[tuple[int, ...], tuple[bool, ...]]:
    """The conversation as its chat template writes it; the assistant's turns and their end tokens are trained on."""
    try:
        turns = _AssistantTurns(example, tokenizer)
        # Marks are the author's own word on what the assistant says, but few templates have them. For the others the
        # mask is found by rendering the conversation up to each answer, which only fails on templates that change
        # earlier text when a turn is added.
        trained, ended = turns.mask_from_marks() or turns.mask_from_prefixes()
    except UserError as error:
        raise error if str(error).startswith(example.location) else UserError(f"{example.location}: {error}") from None
    if ended or example.messages[-1]["role"] != "assistant":
        return turns.ids, tuple(trained)
    return (*turns.ids, tokenizer.end_id), (*trained, True)


class _AssistantTurns:
    """Finds the tokens of the assistant's turns in a rendered conversation.

    A mask says of each token whether it is trained on; with it comes whether the last answer has an end token.
    """

    def __init__(self, example: Example, tokenizer: Tokenizer) -> None:
        self._example, self._tokenizer = example, tokenizer
        self._answers = [i for i, message in enumerate(example.messages) if message["role"] == "assistant"]
        # In one request, as most conversations need the prompts and all need the whole.
        prefixes = [(turn, True) for turn in self._answers[:RENDERED_TOGETHER]]
        conversation, *self._prompts = tokenizer.render_each(
            example.messages, [(len(example.messages), False), *prefixes]
        )
        self._text = single_rendering([conversation])
        if unknown := tokenizer.unknown_words(self._text):
            raise UserError(
                f"{example.location}: the chat template writes words that are not in the vocabulary: "
                f"{', '.join(unknown)}."
            )
        self.ids, self._spans = tokenizer.spans(self._text)

    def mask_from_marks(self) -> tuple[list[bool], bool] | None:
        """The tokens in the template's {% generation %} marks, and the end token behind each run of them.

        None if nothing is marked.
        """
        mask = self._mask(self._text.marks)
        if not any(mask):
            return None
        trained, ended = list(mask), False
        for stop in (i + 1 for i, marked in enumerate(mask) if marked and not (i + 1 < len(mask) and mask[i + 1])):
            ended = self._end_token(range(stop - 1, -1, -1)) is not None
            if not ended and (end := self._end_token(range(stop, len(self.ids)))) is not None:
                # The model must learn to stop, also where the author marked the words alone.
                trained[stop : end + 1] = [True] * (end + 1 - stop)
                ended = True
        return trained, ended

    def _end_token(self, indices: Iterable[int]) -> int | None:
        """The index of an end token that at most white space comes before."""
        for i in indices:
            if self.ids[i] in self._tokenizer.end_ids:
                return i
            start, stop = self._spans[i]
            if self._text[start:stop].strip():
                return None
        return None

    def _mask(self, spans: Sequence[tuple[int, int]]) -> list[bool]:
        """Whether each token overlaps one of the character `spans` [start, stop), which are in order."""
        stops = [stop for _, stop in spans]
        first = (
            bisect_right(stops, begin) for begin, _ in self._spans
        )  # the first that stops behind the token's begin
        return [i < len(spans) and spans[i][0] < end for i, (_, end) in zip(first, self._spans, strict=True)]

    def mask_from_prefixes(self) -> tuple[list[bool], bool]:
        """An answer is what the conversation adds to its prompt, up to the first end token behind its content."""
        messages = self._example.messages
        ends = [span for id_, span in zip(self.ids, self._spans, strict=True) if id_ in self._tokenizer.end_ids]
        starts = []
        for number, turn in enumerate(self._answers):
            if number < len(self._prompts):
                prompt = single_rendering([self._prompts[number]])
            else:
                prompt = self._tokenizer.render(messages[:turn], add_generation_prompt=True)
            if not self._text.startswith(prompt):
                raise self._masking_error(turn, "changes earlier text when this turn is added")
            starts.append(len(prompt))
        spans, ended = [], False
        for turn, start, limit in zip(self._answers, starts, [*starts[1:], len(self._text)], strict=True):
            content = messages[turn]["content"] or ""
            # As written; templates may strip it, or drop its <think> block. An end token before it is of another turn.
            for text in (content, content.strip(), content.split("</think>")[-1].strip()):
                offset = self._text.find(text, start, limit) if text else -1
                if offset >= 0 and not any(start <= begin < offset for begin, _ in ends):
                    break
            else:
                raise self._masking_error(turn, "does not write its content unchanged")
            stop = next((end for begin, end in ends if offset + len(text) <= begin < limit), None)
            ended = stop is not None
            if stop is None:  # no end token: all that the template writes of the turn
                until_turn = self._tokenizer.render(messages[: turn + 1], add_generation_prompt=False)
                if not self._text.startswith(until_turn):
                    raise self._masking_error(turn, "writes no end-of-turn token after it")
                stop = len(until_turn)
            spans.append((start, stop))
        return self._mask(spans), ended

    def _masking_error(self, turn: int, reason: str) -> UserError:
        return UserError(
            f"{self._example.location}: cannot mask messages[{turn}]: the chat template {reason}. "
            'Add {% generation %} marks to the template, or use "prompt"/"completion" instead.'
        )
