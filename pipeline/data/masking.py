"""Label masking: examples as tokens, and which of them are trained on."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pipeline.data.examples import Example
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


def encoder(
    tokenizer: Tokenizer, max_length: int = 0, positions: int | None = None, virtual: int = 0
) -> Callable[[Example], Encoded]:
    """`encode` with fixed settings, for `Corpus.build`."""
    return lambda example: encode(example, tokenizer, max_length, positions, virtual)


def encode(
    example: Example, tokenizer: Tokenizer, max_length: int = 0, positions: int | None = None, virtual: int = 0
) -> Encoded:
    """Tokenize an example and mark what is trained on.

    That is all of a text, the completion of a prompt, and the assistant's turns of a conversation, each with the end
    token behind it. `max_length` above 0 truncates. Raises UserError, with the example's location, if the result does
    not fit into the model's `positions`, less the `virtual` tokens.
    """
    _refuse_unknown_words(example, tokenizer)
    if example.messages:
        ids, trained = _encode_conversation(example, tokenizer)
    elif example.prompt is not None:
        ids, trained = _encode_completion(example, tokenizer)
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


def _refuse_unknown_words(example: Example, tokenizer: Tokenizer) -> None:
    unknown = tokenizer.unknown_words(example.text)
    if unknown:
        raise UserError(
            f"{example.location}: not in the vocabulary: {', '.join(unknown)}. "
            f"Add {example.file} to expand_vocab.data and run `lora expand-vocab`."
        )


def _append_end(ids: tuple[int, ...], tokenizer: Tokenizer) -> tuple[int, ...]:
    """`ids` with an end token, unless the text already ends with one."""
    return ids if ids and ids[-1] in tokenizer.end_ids else (*ids, tokenizer.end_id)


def _encode_completion(example: Example, tokenizer: Tokenizer) -> tuple[tuple[int, ...], tuple[bool, ...]]:
    """Prompt and completion, tokenized separately, so that the prompt has the same tokens as at inference."""
    if not example.completion:
        raise UserError(f'{example.location}: "prompt" needs a "completion". Add one.')
    prompt = tokenizer.encode(example.prompt or "")
    completion = _append_end(tokenizer.encode_following(example.completion), tokenizer)
    return prompt + completion, (False,) * len(prompt) + (True,) * len(completion)


def _encode_conversation(example: Example, tokenizer: Tokenizer) -> tuple[tuple[int, ...], tuple[bool, ...]]:
    """The conversation as its chat template writes it; the assistant's turns and their end tokens are trained on."""
    try:
        turns = _AssistantTurns(example, tokenizer)
        trained, ended = turns.mask_from_marks() or turns.mask_from_prefixes()
    except UserError as error:
        raise error if str(error).startswith(example.location) else UserError(f"{example.location}: {error}") from None
    if ended or example.messages[-1]["role"] != "assistant":
        return turns.ids, tuple(trained)
    return (*turns.ids, tokenizer.end_id), (*trained, True)


class _AssistantTurns:
    """Finds the tokens of the assistant's turns in a rendered conversation."""

    def __init__(self, example: Example, tokenizer: Tokenizer) -> None:
        from pipeline.data.tokenizers.chat_template import single_rendering  # only conversations need it

        self._example, self._tokenizer = example, tokenizer
        self._answers = [i for i, message in enumerate(example.messages) if message["role"] == "assistant"]
        prefixes = [(turn, True) for turn in self._answers[:RENDERED_TOGETHER]]
        conversation, *prompts = tokenizer.render_each(example.messages, [(len(example.messages), False), *prefixes])
        self._text = single_rendering([conversation])
        self._prompts = dict(zip(self._answers, prompts, strict=False))
        unknown = tokenizer.unknown_words(self._text)
        if unknown:
            raise UserError(
                f"{example.location}: the chat template writes words that are not in the vocabulary: "
                f"{', '.join(unknown)}."
            )
        self.ids, self._spans = tokenizer.spans(self._text)

    def mask_from_marks(self) -> tuple[list[bool], bool] | None:
        """From the template's {% generation %} marks: the mask, with the end token behind each marked run, and whether
        the last run has one. None if nothing is marked."""
        mask = self._is_marked()
        if not any(mask):
            return None
        trained, ended = list(mask), False
        for stop in [i for i in range(1, len(mask) + 1) if mask[i - 1] and not (i < len(mask) and mask[i])]:
            ended = any(self._is_end_token(i) for i in self._tokens_back_through_space(stop))
            end = next((i for i in self._tokens_through_space(stop) if self._is_end_token(i)), None)
            if not ended and end is not None:
                trained[stop : end + 1] = [True] * (end + 1 - stop)
                ended = True
        return trained, ended

    def _is_marked(self) -> list[bool]:
        """Whether each token overlaps a marked span; one pass, since both are in order."""
        mask, marks = [], iter((*self._text.marks, (len(self._text), len(self._text))))
        start, stop = next(marks)
        for begin, end in self._spans:
            while begin >= stop < len(self._text):
                start, stop = next(marks)
            mask.append(begin < stop and end > start)
        return mask

    def _tokens_through_space(self, first: int) -> Iterator[int]:
        """Indices from `first` up to and including the first token that is not white space."""
        for i in range(first, len(self.ids)):
            yield i
            if not self._is_space(i):
                return

    def _tokens_back_through_space(self, stop: int) -> Iterator[int]:
        """The same backwards, from the token before `stop`."""
        for i in range(stop - 1, -1, -1):
            yield i
            if not self._is_space(i):
                return

    def _is_space(self, i: int) -> bool:
        start, stop = self._spans[i]
        return not self._text[start:stop].strip()

    def _is_end_token(self, i: int) -> bool:
        return self.ids[i] in self._tokenizer.end_ids

    def mask_from_prefixes(self) -> tuple[list[bool], bool]:
        """Without marks: an answer is what the conversation adds to its prompt, up to the first end token."""
        trained, ended = [False] * len(self.ids), False
        starts = [self._answer_start(turn) for turn in self._answers]
        for turn, start, limit in zip(self._answers, starts, [*starts[1:], len(self._text)], strict=True):
            stop, ended = self._answer_stop(turn, start, limit)
            for i, (begin, end) in enumerate(self._spans):
                if end > start and begin < stop:
                    trained[i] = True
        return trained, ended

    def _answer_start(self, turn: int) -> int:
        """Character offset of an answer: the length of its rendered prompt."""
        rendering = self._prompts.get(turn)
        if rendering is None:
            prompt = self._tokenizer.render(self._example.messages[:turn], add_generation_prompt=True)
        else:
            from pipeline.data.tokenizers.chat_template import single_rendering

            prompt = single_rendering([rendering])
        if not self._text.startswith(prompt):
            raise self._masking_error(turn, "changes earlier text when this turn is added")
        return len(prompt)

    def _answer_stop(self, turn: int, start: int, limit: int) -> tuple[int, bool]:
        """Character offset behind the answer's end token (True), or behind the turn if it has none (False)."""
        content = self._content_stop(turn, start, limit)
        for i, (begin, end) in enumerate(self._spans):
            if self._is_end_token(i) and content <= begin < limit:
                return end, True
        until_turn = self._tokenizer.render(self._example.messages[: turn + 1], add_generation_prompt=False)
        if not self._text.startswith(until_turn):
            raise self._masking_error(turn, "writes no end-of-turn token after it")
        return len(until_turn), False

    def _content_stop(self, turn: int, start: int, limit: int) -> int:
        """Character offset behind the message's content; templates may strip it or drop its <think> block."""
        content = self._example.messages[turn]["content"]
        for text in (content, content.strip(), content.split("</think>")[-1].strip()):
            offset = self._text.find(text, start, limit) if text else -1
            if offset >= 0 and not self._has_end_token(start, offset):
                return offset + len(text)
        raise self._masking_error(turn, "does not write its content unchanged")

    def _has_end_token(self, start: int, stop: int) -> bool:
        return any(self._is_end_token(i) and start <= begin < stop for i, (begin, _) in enumerate(self._spans))

    def _masking_error(self, turn: int, reason: str) -> UserError:
        return UserError(
            f"{self._example.location}: cannot mask messages[{turn}]: the chat template {reason}. "
            'Add {% generation %} marks to the template, or use "prompt"/"completion" instead.'
        )
