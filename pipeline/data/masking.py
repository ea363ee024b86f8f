"""Label masking: examples as tokens, and which of them are trained on."""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, repeat
from os.path import commonprefix

import numpy as np
import numpy.typing as npt

from pipeline.data.examples import Example, Message
from pipeline.data.formats.messages import text_of
from pipeline.data.tokenizers.chat_template import Renderings, checked
from pipeline.data.tokenizers.template_process import Conversation
from pipeline.data.tokenizers.word import Tokenizer
from pipeline.errors import UserError

# prompts per request: those of a long conversation together are quadratic in its length
RENDERED_TOGETHER = 16
# per request: enough to hide the round trip, little to hold in memory
GROUP_EXAMPLES, GROUP_CHARACTERS = 64, 2**18

Mask = npt.NDArray[np.bool_]  # (T,)
# an example as read, the same as turns, and its renderings if it is a conversation
WithRenderings = tuple[Example, Example, Renderings | UserError | None]


@dataclass(frozen=True)
class Encoded:
    """Token ids (T,), which of them are trained on (T,), and how many more were cut off."""

    ids: tuple[int, ...]
    trained: tuple[bool, ...]
    cut: int = 0

    @property
    def labels(self) -> int:
        """Number of labels. The first token is never one: nothing before it could predict it."""
        return sum(self.trained[1:])


@dataclass(frozen=True)
class Encoder:
    """`encode` with its settings, for one example or for many.

    Of many, chat templates are rendered ahead, in another process.
    """

    tokenizer: Tokenizer
    max_length: int = 0
    positions: int | None = None
    virtual: int = 0
    labels_bad_answers: bool = False  # for losses that learn to avoid them

    def __call__(self, example: Example) -> Encoded:
        """Raises UserError, as `encode`."""
        ((_, encoded),) = self.each([example])
        return encoded

    def each(
        self,
        examples: Iterable[Example],
        on_error: Callable[[Example, UserError], None] | None = None,
    ) -> Iterator[tuple[Example, Encoded]]:
        """The examples in their order, encoded.

        Raises UserError, as `encode`, for the first that is wrong; with `on_error`, which gets the
        error, such examples are left out.
        """
        rendered = map(self._render, _groups(examples))
        for example, turns, renderings in _one_group_ahead(rendered):
            try:
                encoded = self._encode(turns, renderings)
            except UserError as error:
                if on_error is None:
                    raise
                on_error(example, error)
                continue
            yield example, encoded

    def _render(self, group: list[Example]) -> Iterator[WithRenderings]:
        """Begin to render the conversations of a group. The first that is read waits for all."""
        shown = [as_turns(example, self.tokenizer) for example in group]
        conversations = [_conversation(example) for example in shown if example.messages]
        renderings: Iterator[Renderings | UserError]
        try:
            renderings = self.tokenizer.render_each(conversations) if conversations else iter(())
        except UserError as error:  # no template: each conversation reports it
            renderings = repeat(error)
        return (
            (example, turns, next(renderings) if turns.messages else None)
            for example, turns in zip(group, shown, strict=True)
        )

    def _encode(self, example: Example, renderings: Renderings | UserError | None) -> Encoded:
        tokenizer = self.tokenizer
        if unknown := tokenizer.unknown_words(example.text):
            raise UserError(
                f"{example.location}: not in the vocabulary: {', '.join(unknown)}. "
                f"Add {example.file} to expand_vocab.data and run `lora expand-vocab`."
            )
        if renderings is not None:
            ids, trained = _encode_conversation(example, tokenizer, renderings)
        elif example.prompt is not None:
            if not example.completion:
                raise UserError(f'{example.location}: "prompt" needs a "completion". Add one.')
            # Tokenized separately: in one text the last word of the prompt could merge with the
            # completion's first letters into a token that a prompt at inference never has.
            prompt = tokenizer.encode(example.prompt)
            completion = _append_end(tokenizer.encode_following(example.completion), tokenizer)
            ids = prompt + completion
            trained = (False,) * len(prompt) + (True,) * len(completion)
        else:
            ids = _append_end(tokenizer.encode(example.text), tokenizer)
            trained = (True,) * len(ids)
        if example.desirable is False and not self.labels_bad_answers:
            trained = (False,) * len(ids)
        length = min(len(ids), self.max_length or len(ids))
        if self.positions is not None and length > self.positions - self.virtual:
            less, lower = "", ""
            if self.virtual:
                less, lower = f" less {self.virtual} virtual tokens", " lower virtual_tokens,"
            raise UserError(
                f"{example.location}: {length} tokens with the end token, more than the model's "
                f"{self.positions} positions{less}. Shorten it, cut it with max_length,{lower} or "
                "raise pretrain.max_positions of a MiniGPT."
            )
        return Encoded(ids[:length], trained[:length], len(ids) - length)


def encode(
    example: Example, tokenizer: Tokenizer, max_length: int = 0, positions: int | None = None
) -> Encoded:
    """Tokenize an example and mark what is trained on.

    That is all of a text, the completion of a prompt, and the assistant's turns of a conversation,
    each with the end token behind it. `max_length` above 0 truncates. Raises UserError, with the
    example's location, if the result does not fit into the model's `positions`.
    """
    return Encoder(tokenizer, max_length, positions)(example)


def as_turns(example: Example, tokenizer: Tokenizer) -> Example:
    """A `templated` prompt and its answer as turns, if there is a chat template.

    White space around them is left out: it parts the texts of a line, and nobody types it into a
    chat.
    """
    if not example.templated or not tokenizer.has_template:
        return example
    turns = (
        Message(role="user", content=(example.prompt or "").strip()),
        Message(role="assistant", content=example.completion.strip()),
    )
    rejected = example.rejected
    if isinstance(rejected, str):
        rejected = (Message(role="assistant", content=rejected.strip()),)
    return replace(
        example,
        text=text_of(turns),
        prompt=None,
        messages=turns,
        begin=1,
        rejected=rejected,
        templated=False,
    )


def _groups(examples: Iterable[Example]) -> Iterator[list[Example]]:
    """Runs of examples that are rendered together. An error of reading comes behind the last."""
    group, size = list[Example](), 0
    try:
        for example in examples:
            group.append(example)
            size += len(example.text)
            if len(group) == GROUP_EXAMPLES or size > GROUP_CHARACTERS:
                yield group
                group, size = [], 0
    except UserError:
        yield group
        raise
    yield group


def _one_group_ahead(groups: Iterator[Iterator[WithRenderings]]) -> Iterator[WithRenderings]:
    """The items of the groups. The next group is rendered while one is tokenized."""
    previous: Iterator[WithRenderings] = iter(())
    try:
        for following in groups:
            yield from previous
            previous = following
    except UserError:  # of reading
        yield from previous
        raise
    yield from previous


def _conversation(example: Example) -> Conversation:
    """What is rendered for the mask: the whole, and the prompts of the first answers."""
    prompts = [(turn, True) for turn in _answers(example)[:RENDERED_TOGETHER]]
    return Conversation(example.messages, [(len(example.messages), False), *prompts], example.tools)


def _function_names(message: Message) -> list[str]:
    calls = message.get("tool_calls", [])
    return [str(call.get("function", call)["name"]) for call in calls]


def _answers(example: Example) -> list[int]:
    """The indices of the assistant's turns."""
    return [turn for turn, message in enumerate(example.messages) if message["role"] == "assistant"]


def _append_end(ids: tuple[int, ...], tokenizer: Tokenizer) -> tuple[int, ...]:
    """`ids` with an end token, unless the text already ends with one."""
    return ids if ids and ids[-1] in tokenizer.end_ids else (*ids, tokenizer.end_id)


def _encode_conversation(
    example: Example, tokenizer: Tokenizer, renderings: Renderings | UserError
) -> tuple[tuple[int, ...], tuple[bool, ...]]:
    """The conversation as its template writes it; answers and their end tokens are trained on."""
    try:
        if isinstance(renderings, UserError):
            raise renderings
        turns = _AssistantTurns(example, tokenizer, renderings)
        # Marks are the author's own word on what the assistant says, but few templates have them.
        # For the others the mask is found by rendering the conversation up to each answer, which
        # only fails on templates that change earlier text when a turn is added.
        trained, ended = turns.mask_from_marks() or turns.mask_from_prefixes()
    except UserError as error:
        if str(error).startswith(example.location):
            raise
        raise UserError(f"{example.location}: {error}") from None
    mask, last = tuple(trained.tolist()), len(example.messages) - 1
    if ended or example.messages[last]["role"] != "assistant" or last in example.untrained:
        return turns.ids, mask
    return (*turns.ids, tokenizer.end_id), (*mask, True)


class _AssistantTurns:
    """Finds the tokens of the assistant's turns in a rendered conversation.

    As a mask over the tokens, and whether the last answer has an end token.
    """

    def __init__(self, example: Example, tokenizer: Tokenizer, renderings: Renderings) -> None:
        """`renderings`: of the prefixes of `_conversation`."""
        self._example, self._tokenizer = example, tokenizer
        self._answers = _answers(example)
        conversation, *self._prompts = renderings
        self._text = checked(conversation)
        if unknown := tokenizer.unknown_words(self._text):
            raise UserError(
                f"{example.location}: the chat template writes words that are not in the "
                f"vocabulary: {', '.join(unknown)}."
            )
        self.ids, spans = tokenizer.spans(self._text)
        # a third of np.array's time
        table = np.fromiter(chain.from_iterable(spans), np.int64, 2 * len(self.ids))
        self._begins, self._ends = table[::2], table[1::2]
        end_ids = tokenizer.end_ids
        self._end_spans = [
            span for id_, span in zip(self.ids, spans, strict=True) if id_ in end_ids
        ]

    def mask_from_marks(self) -> tuple[Mask, bool] | None:
        """The tokens in {% generation %} marks, and the end token behind each run of them.

        None if nothing is marked.
        """
        if not self._text.marks or not (mask := self._mask(self._text.marks)).any():
            return None
        if self._example.untrained:
            mask = self._mask(self._marks_of_trained_turns())
        trained, ended = mask.copy(), False
        # where a run of marked tokens stops
        stops = np.flatnonzero(mask & ~np.append(mask[1:], False)) + 1
        for stop in stops.tolist():
            ended = self._end_token(range(stop - 1, -1, -1)) is not None
            if not ended and (end := self._end_token(range(stop, len(self.ids)))) is not None:
                # The model must learn to stop, also where the author marked the words alone.
                trained[stop : end + 1] = True
                ended = True
        return trained, ended

    def _marks_of_trained_turns(self) -> list[tuple[int, int]]:
        """A mark belongs to the last answer whose prompt ends before the mark does."""
        starts, marks = self._starts(), []
        for mark in self._text.marks:
            begun = sum(start < mark[1] for start in starts)
            if self._answers[max(0, begun - 1)] not in self._example.untrained:
                marks.append(mark)
        return marks

    def _end_token(self, indices: Iterable[int]) -> int | None:
        """The index of an end token that at most white space comes before."""
        for i in indices:
            if self.ids[i] in self._tokenizer.end_ids:
                return i
            if self._text[self._begins[i] : self._ends[i]].strip():
                return None
        return None

    def _mask(self, spans: Sequence[tuple[int, int]]) -> Mask:
        """Whether each token overlaps one of the character `spans` [start, stop), in order."""
        starts, stops = np.array(spans).reshape(-1, 2).T
        # the first that stops behind the token's begin
        first = np.searchsorted(stops, self._begins, "right")
        mask: Mask = np.append(starts, np.iinfo(np.int64).max)[first] < self._ends
        return mask

    def mask_from_prefixes(self) -> tuple[Mask, bool]:
        """An answer: what the conversation adds to its prompt, up to the end token behind it."""
        starts = self._starts()
        limits = [*starts[1:], len(self._text)]
        spans, ended = [], False
        for turn, start, limit in zip(self._answers, starts, limits, strict=True):
            if turn not in self._example.untrained:
                stop, ended = self._stop(turn, start, limit)
                spans.append((start, stop))
        return self._mask(spans), ended

    def _render(self, count: int, ask: bool = False) -> str:
        """The first `count` messages; `ask`: with the generation prompt."""
        return self._tokenizer.render(self._example.messages[:count], ask, self._example.tools)

    def _starts(self) -> list[int]:
        """Where each answer begins: behind the prompt that the model gets for it."""
        starts = list[int]()
        for number, turn in enumerate(self._answers):
            is_rendered = number < len(self._prompts)
            prompt = checked(self._prompts[number]) if is_rendered else self._render(turn, True)
            start: int | None = len(prompt)
            if not self._text.startswith(prompt):
                start = self._end_of_header(turn, prompt)
            if start is None:
                return self._ends_of_headers(turn, starts)
            starts.append(start)
        return starts

    def _end_of_header(self, turn: int, prompt: str) -> int | None:
        """Where an answer begins if its prompt ends with more, such as a `<think>`.

        None unless the text has the prompt's earlier turns, and the beginning of the answer's turn.
        """
        before = self._render(turn)
        shared = commonprefix([self._text, prompt])  # noqa: RUF071  # of characters
        # not within a tag: <think> and <tool_call> begin alike
        start = len(re.sub(r"<[^<>]*\Z", "", shared))
        return start if prompt.startswith(before) and start > len(before) else None

    def _ends_of_headers(self, turn: int, starts: list[int]) -> list[int]:
        """Where the answers begin in a template that drops thoughts from earlier ones.

        Behind the header of the first, if this header stands before each answer and nowhere else.
        """
        if starts:
            before = self._render(self._answers[0])
            header = self._text[len(before) : starts[0]]
            ends = [match.end() for match in re.finditer(re.escape(header), self._text)]
            is_written_first = header.strip() and self._text.startswith(before)
            if is_written_first and len(ends) == len(self._answers):
                return ends
        raise self._masking_error(turn, "changes earlier text when this turn is added")

    def _stop(self, turn: int, start: int, limit: int) -> tuple[int, bool]:
        """Where the answer in [start, limit) stops, and whether by an end token."""
        message = self._example.messages[turn]
        content, calls = message["content"] or "", bool(message.get("tool_calls"))
        ends = self._end_spans
        # As written; templates may strip it, or drop its <think> block. An end token before it is
        # of another turn.
        for text in (content, content.strip(), content.split("</think>")[-1].strip()):
            offset = self._text.find(text, start, limit) if text else -1
            if offset >= 0 and not any(start <= begin < offset for begin, _ in ends):
                break
        else:
            if not calls:  # a template may leave out what is said beside calls
                raise self._masking_error(turn, "does not write its content unchanged")
            text, offset = "", start
        behind = offset + len(text)
        stop = next((end for begin, end in ends if behind <= begin < limit), None)
        if any(self._text.find(name, start, limit) < 0 for name in _function_names(message)):
            raise self._masking_error(turn, "does not write its tool_calls")
        if stop is not None and not (calls and self._holds_next_turn(turn, behind, stop)):
            return stop, True
        # No end token: all that the template writes of the turn.
        until_turn = self._render(turn + 1)
        if not self._text.startswith(until_turn):
            raise self._masking_error(turn, "writes no end-of-turn token after it")
        return len(until_turn), False

    def _holds_next_turn(self, turn: int, start: int, stop: int) -> bool:
        """Whether the end token at `stop` may end the next turn, and so is not the calls' own."""
        following = self._example.messages[turn + 1 : turn + 2]
        texts = [(message["content"] or "").strip() for message in following]
        return any(text in self._text[start:stop] for text in texts)

    def _masking_error(self, turn: int, reason: str) -> UserError:
        return UserError(
            f"{self._example.location}: cannot mask messages[{turn}]: the chat template {reason}. "
            'Add {% generation %} marks to the template, or use "prompt"/"completion" instead.'
        )
