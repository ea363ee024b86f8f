"""What every tokenizer here can do, the word-level one, and the way to open either from a model's folder."""

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Protocol

import tokenizers
from tokenizers import models, normalizers, pre_tokenizers

from pipeline.data.tokenizers import chat_template
from pipeline.data.tokenizers.chat_template import Asked, Messages, Rendered, Renderings
from pipeline.errors import UserError
from pipeline.files.artifact import refuse_untrusted, write_json

PAD, UNKNOWN, END = "<pad>", "<unk>", "<eos>"
SPECIAL = (PAD, UNKNOWN, END)
FILE = "tokenizer.json"

Spans = Sequence[tuple[int, int]]


class Tokenizer(Protocol):
    """Text to tokens and back, for any model."""

    @property
    def bos_id(self) -> int | None:
        """What a plain text begins with, if anything."""

    @property
    def end_id(self) -> int:
        """What training ends a text with."""

    @property
    def end_ids(self) -> frozenset[int]:
        """Each ends what the model says."""

    @property
    def has_template(self) -> bool:
        """Whether `render` can be asked."""

    def __len__(self) -> int:
        """Ids in use; the model may have more rows."""

    def words(self) -> list[str]:
        """`word` of every id."""

    def word(self, id_: int) -> str:
        """A token as people read it, with the space it begins with; special tokens as they are."""

    def id_of_token(self, token: str) -> int | None:
        """The first id that `word` shows so, or None."""

    def encode(self, text: str) -> tuple[int, ...]:
        """A prompt's ids: begun as the model was taught, once, and not ended."""

    def spans(self, text: str) -> tuple[tuple[int, ...], Spans]:
        """Ids and the characters [start, stop) of each; nothing is put in front."""

    def following(self, text: str) -> tuple[int, ...]:
        """Ids of `text` as it stands after other text."""

    def continuation(self, prompt: str, answer: str) -> tuple[int, ...]:
        """Ids of `answer` after `prompt`, a space between unless there is white space; () if it cannot be said."""

    def decode(self, ids: Iterable[int]) -> str:
        """Text, without special tokens."""

    def stream(self) -> Callable[[int], str]:
        """A function that takes one token after the other and gives the text that each adds."""

    def unknown_words(self, text: str) -> list[str]:
        """Words that have no token, as written."""

    def normal(self, text: str) -> str:
        """Text as it compares: two that differ only in what the tokenizer does not see, or white space, are one."""

    def render(self, messages: Messages, reply: bool) -> Rendered:
        """A conversation in the model's chat template; with `reply`, up to where it answers. Raises UserError."""

    def render_each(self, messages: Messages, asked: Asked) -> Renderings:
        """`render` of the first n messages for each (n, reply) asked, in the time of one. Raises UserError."""

    def expanded(self, tokens: Iterable[str], special: bool = False) -> "tuple[Tokenizer, list[str]]":
        """A new tokenizer that knows `tokens` too, and those that are new. Old ids stay."""

    def save(self, folder: Path, max_length: int) -> None:
        """Every file of the tokenizer, the same bytes for the same tokenizer."""


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of the model in `folder`. Raises UserError."""
    refuse_untrusted(folder)
    try:
        text = (folder / FILE).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        text = ""
    if re.search(r'"type":\s*"WordLevel"', text) and all(f'"{token}"' in text for token in SPECIAL):
        return WordTokenizer.load(folder)
    from pipeline.data.tokenizers.subword import SubwordTokenizer  # MiniGPT does not need it

    return SubwordTokenizer.load(folder)


class WordTokenizer:
    """Words to ids and back. Ids never change once given: `expanded` only appends.

    On the `tokenizers` library; its file opens in transformers.AutoTokenizer.
    """

    bos_id = None

    def __init__(self, inner: tokenizers.Tokenizer, folder: Path | None = None) -> None:
        self._inner, self._folder = inner, folder
        vocabulary: dict[str, int] = inner.get_vocab()
        self.pad_id, self.unknown_id, self.end_id = (vocabulary[token] for token in SPECIAL)
        self.end_ids = frozenset([self.end_id])

    @classmethod
    def of_words(cls, words: Iterable[str]) -> "WordTokenizer":
        """The special tokens, then each word once, in order of first appearance."""
        vocabulary = {token: id_ for id_, token in enumerate(dict.fromkeys([*SPECIAL, *words]))}
        inner = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
        inner.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
        inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        inner.add_special_tokens(list(SPECIAL))
        return cls(inner)

    @classmethod
    def load(cls, folder: Path) -> "WordTokenizer":
        path = folder / FILE
        try:
            inner = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}. A model folder needs its tokenizer.") from None
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{path} is not a tokenizer file: {error}") from None
        missing = [token for token in SPECIAL if inner.token_to_id(token) is None]
        if missing:
            raise UserError(f"{path} lacks {', '.join(missing)}: it is not a word-level tokenizer of this project.")
        return cls(inner, folder)

    def save(self, folder: Path, max_length: int) -> None:
        (folder / FILE).write_text(self._inner.to_str(pretty=True), encoding="utf-8")
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "pad_token": PAD,
            "unk_token": UNKNOWN,
            "eos_token": END,
            "model_max_length": max_length,
            "clean_up_tokenization_spaces": False,
        }
        write_json(folder / "tokenizer_config.json", config)

    def __len__(self) -> int:
        return self._inner.get_vocab_size()

    def words(self) -> list[str]:
        """Every token, by id."""
        return [self.word(id_) for id_ in range(len(self))]

    def word(self, id_: int) -> str:
        return str(self._inner.id_to_token(id_))

    def id_of_token(self, token: str) -> int | None:
        """The id of a token as `word` gives it, or None."""
        id_: int | None = self._inner.token_to_id(token)
        return id_

    def encode(self, text: str) -> tuple[int, ...]:
        """Word ids, without an end token; an unknown word is `unknown_id`."""
        return self.spans(text)[0]

    def spans(self, text: str) -> tuple[tuple[int, ...], Spans]:
        encoding = self._inner.encode(text, add_special_tokens=False)
        return tuple(encoding.ids), encoding.offsets

    def following(self, text: str) -> tuple[int, ...]:
        return self.encode(text)

    def continuation(self, prompt: str, answer: str) -> tuple[int, ...]:  # noqa: ARG002  # words stand alone
        ids = self.encode(answer)
        return () if self.unknown_id in ids else ids

    def decode(self, ids: Iterable[int]) -> str:
        """Words, without special tokens."""
        return " ".join(word for word in map(self.word, ids) if word not in SPECIAL)

    def stream(self) -> Callable[[int], str]:
        def text(id_: int) -> str:
            word = self.decode([id_])  # nothing for a special token
            return f" {word}" if word else ""

        return text

    def unknown_words(self, text: str) -> list[str]:
        ids, spans = self.spans(text)
        return [text[start:stop] for id_, (start, stop) in zip(ids, spans, strict=True) if id_ == self.unknown_id]

    def normal(self, text: str) -> str:
        return " ".join(split(text))

    @property
    def has_template(self) -> bool:
        return self._folder is not None and chat_template.has_template(self._folder)

    def render(self, messages: Messages, reply: bool) -> Rendered:
        return chat_template.only(self.render_each(messages, [(len(messages), reply)]))

    def render_each(self, messages: Messages, asked: Asked) -> Renderings:
        if self._folder is None:
            raise chat_template.no_template("the tokenizer")
        found = chat_template.render_in(self._folder, messages, asked)
        # without marks: one template wrote the rules, another tokenizer reads
        return [one if isinstance(one, UserError) else Rendered(one) for one in found]

    def expanded(self, tokens: Iterable[str], special: bool = False) -> tuple["WordTokenizer", list[str]]:  # noqa: ARG002
        """A new tokenizer with every unknown word of `tokens` (texts, whose words may repeat), and those words."""
        new = dict.fromkeys(word for text in tokens for word in split(text) if self._inner.token_to_id(word) is None)
        return WordTokenizer.of_words([*self.words()[len(SPECIAL) :], *new]), list(new)


def split(text: str) -> list[str]:
    """Words as the tokenizer sees them: NFC, lower case, split at white space."""
    normal = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()]).normalize_str(text)
    # Not str.split, for which the control characters U+001C to U+001F are white space too.
    return [word for word, _ in pre_tokenizers.WhitespaceSplit().pre_tokenize_str(normal)]
