"""Examples as tokens, and which of them are to be learned."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pipeline.data.examples import Example
from pipeline.data.tokenizers.chat_template import only
from pipeline.data.tokenizers.word import Tokenizer
from pipeline.errors import UserError

TOGETHER = 16  # prompts that are rendered with their conversation; a long one's would take its size times their number


@dataclass(frozen=True)
class Encoded:
    """Token ids, which of them are to be learned, and how many more were cut off at the end."""

    ids: tuple[int, ...]
    trained: tuple[bool, ...]
    cut: int = 0

    @property
    def labels(self) -> int:
        """Tokens that something before them is to predict: the first never is one."""
        return sum(self.trained[1:])


def encoder(
    tokenizer: Tokenizer, max_length: int = 0, positions: int | None = None, virtual: int = 0
) -> Callable[[Example], Encoded]:
    """`encode` with its settings, as `Corpus.build` takes it."""
    return lambda example: encode(example, tokenizer, max_length, positions, virtual)


def encode(
    example: Example, tokenizer: Tokenizer, max_length: int = 0, positions: int | None = None, virtual: int = 0
) -> Encoded:
    """An example's tokens: of a text all are learned, of a prompt its completion, of a conversation the answers.

    Each ends with the token that ends it, learned as well. `max_length` above 0 cuts what is longer; what is then
    longer than the model's `positions`, of which `virtual` tokens take some, is refused. Raises UserError with the
    example's place.
    """
    _refuse_unknown(example, tokenizer)
    if example.messages:
        ids, trained = _conversation(example, tokenizer)
    elif example.prompt is not None:
        ids, trained = _completion(example, tokenizer)
    else:
        ids = _ended(tokenizer.encode(example.text), tokenizer)
        trained = (True,) * len(ids)
    kept = min(len(ids), max_length or len(ids))
    if positions is not None and kept > positions - virtual:
        less, lower = (f" less {virtual} virtual tokens", " lower virtual_tokens,") if virtual else ("", "")
        raise UserError(
            f"{example.place}: {kept} tokens with the end token, more than the model's {positions} positions{less}. "
            f"Shorten it, cut it with max_length,{lower} or raise pretrain.max_positions of a MiniGPT."
        )
    return Encoded(ids[:kept], trained[:kept], len(ids) - kept)


def _refuse_unknown(example: Example, tokenizer: Tokenizer) -> None:
    unknown = tokenizer.unknown_words(example.text)
    if unknown:
        raise UserError(
            f"{example.place}: not in the vocabulary: {', '.join(unknown)}. "
            f"Add {example.file} to expand_vocab.data and run `lora expand-vocab`."
        )


def _ended(ids: tuple[int, ...], tokenizer: Tokenizer) -> tuple[int, ...]:
    """With one end token: a text that was written with its own gets no second."""
    return ids if ids and ids[-1] in tokenizer.end_ids else (*ids, tokenizer.end_id)


def _completion(example: Example, tokenizer: Tokenizer) -> tuple[tuple[int, ...], tuple[bool, ...]]:
    """Prompt and completion, each tokenized alone: the prompt's tokens are then those that it has when it is asked."""
    if not example.completion:
        raise UserError(f"{example.place}: a prompt without a completion teaches nothing. Add the completion.")
    given = tokenizer.encode(example.prompt or "")
    learned = _ended(tokenizer.following(example.completion), tokenizer)
    return given + learned, (False,) * len(given) + (True,) * len(learned)


def _conversation(example: Example, tokenizer: Tokenizer) -> tuple[tuple[int, ...], tuple[bool, ...]]:
    """The whole conversation as its template writes it; learned are the answers and what ends each."""
    try:
        turns = _Turns(example, tokenizer)
        trained, ended = turns.marked() or turns.compared()
    except UserError as error:
        raise error if str(error).startswith(example.place) else UserError(f"{example.place}: {error}") from None
    if ended or example.messages[-1]["role"] != "assistant":
        return turns.ids, tuple(trained)
    return (*turns.ids, tokenizer.end_id), (*trained, True)


class _Turns:
    """A rendered conversation in which the assistant's turns are looked for."""

    def __init__(self, example: Example, tokenizer: Tokenizer) -> None:
        self._example, self._tokenizer = example, tokenizer
        self._answers = [i for i, message in enumerate(example.messages) if message["role"] == "assistant"]
        asked = [(turn, True) for turn in self._answers[:TOGETHER]]
        whole, *prompts = tokenizer.render_each(example.messages, [(len(example.messages), False), *asked])
        self._text = only([whole])
        self._prompts = dict(zip(self._answers, prompts, strict=False))
        unknown = tokenizer.unknown_words(self._text)
        if unknown:
            raise UserError(f"{example.place}: the chat template writes words without a token: {', '.join(unknown)}.")
        self.ids, self._spans = tokenizer.spans(self._text)

    def marked(self) -> tuple[list[bool], bool] | None:
        """What the template marks itself, each run with the end token behind it, and whether the last has one."""
        mask = self._in_marks()
        if not any(mask):
            return None
        trained, ended = list(mask), False
        for stop in [i for i in range(1, len(mask) + 1) if mask[i - 1] and not (i < len(mask) and mask[i])]:
            ended = any(self._ends(i) for i in self._back_over_space(stop))
            end = next((i for i in self._over_space(stop) if self._ends(i)), None)
            if not ended and end is not None:
                trained[stop : end + 1] = [True] * (end + 1 - stop)
                ended = True
        return trained, ended

    def _in_marks(self) -> list[bool]:
        """Whether each token shares a character with what the template marks; marks and tokens are in order."""
        mask, marks = [], iter((*self._text.marks, (len(self._text), len(self._text))))
        start, stop = next(marks)
        for begin, end in self._spans:
            while begin >= stop < len(self._text):
                start, stop = next(marks)
            mask.append(begin < stop and end > start)
        return mask

    def _over_space(self, first: int) -> Iterator[int]:
        """Tokens from `first` on, up to and with the first that is not white space."""
        for i in range(first, len(self.ids)):
            yield i
            if not self._is_space(i):
                return

    def _back_over_space(self, stop: int) -> Iterator[int]:
        for i in range(stop - 1, -1, -1):
            yield i
            if not self._is_space(i):
                return

    def _is_space(self, i: int) -> bool:
        start, stop = self._spans[i]
        return not self._text[start:stop].strip()

    def _ends(self, i: int) -> bool:
        return self.ids[i] in self._tokenizer.end_ids

    def compared(self) -> tuple[list[bool], bool]:
        """Each answer is what the conversation adds to the prompt that it answers, up to the first end token."""
        trained, ended = [False] * len(self.ids), False
        starts = [self._start(turn) for turn in self._answers]
        for turn, start, limit in zip(self._answers, starts, [*starts[1:], len(self._text)], strict=True):
            stop, ended = self._stop(turn, start, limit)
            for i, (begin, end) in enumerate(self._spans):
                if end > start and begin < stop:
                    trained[i] = True
        return trained, ended

    def _start(self, turn: int) -> int:
        """Where an answer begins: as many characters as its prompt has."""
        known = self._prompts.get(turn)
        asked = only([known]) if known is not None else self._tokenizer.render(self._example.messages[:turn], True)
        if not self._text.startswith(asked):
            raise self._refusal(turn, "writes a prompt otherwise than the same turns in a conversation")
        return len(asked)

    def _stop(self, turn: int, start: int, limit: int) -> tuple[int, bool]:
        """Where an answer's end token ends, or, where it has none, the turn; and which of the two."""
        content = self._content(turn, start, limit)
        for i, (begin, end) in enumerate(self._spans):
            if self._ends(i) and content <= begin < limit:
                return end, True
        alone = self._tokenizer.render(self._example.messages[: turn + 1], reply=False)
        if not self._text.startswith(alone):
            raise self._refusal(turn, "writes no end-of-turn token after it")
        return len(alone), False

    def _content(self, turn: int, start: int, limit: int) -> int:
        """Where the answer's own text ends: whole, or, as templates do to earlier turns, without its thoughts."""
        content = self._example.messages[turn]["content"]
        for text in (content, content.strip(), content.split("</think>")[-1].strip()):
            at = self._text.find(text, start, limit) if text else -1
            if at >= 0 and not self._any_end(start, at):
                return at + len(text)
        raise self._refusal(turn, "does not write its content as it stands")

    def _any_end(self, start: int, stop: int) -> bool:
        return any(self._ends(i) and start <= begin < stop for i, (begin, _) in enumerate(self._spans))

    def _refusal(self, turn: int, reason: str) -> UserError:
        return UserError(
            f"{self._example.place}: which tokens of messages[{turn}] to learn cannot be told: the chat template "
            f'{reason}. Give the template {{% generation %}} marks, or write the line as {{"prompt", "completion"}}.'
        )
