"""The word-level tokenizer, and `load_tokenizer`, which opens either kind."""

import re
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from pathlib import Path

import tokenizers
from tokenizers import models, normalizers, pre_tokenizers

from pipeline.data.tokenizers import chat_template
from pipeline.data.tokenizers.chat_template import Answers, Messages, Renderings, Tools
from pipeline.data.tokenizers.subword import SubwordTokenizer
from pipeline.data.tokenizers.template_process import Conversation, Rendered
from pipeline.errors import UserError
from pipeline.files.artifact import refuse_untrusted, write_json

PAD, UNKNOWN, END = "<pad>", "<unk>", "<eos>"
SPECIAL = (PAD, UNKNOWN, END)
FILE = "tokenizer.json"
NORMALIZER = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])

Spans = Sequence[tuple[int, int]]


class WordTokenizer:
    """One id per word, lower case. `expanded` only appends, so ids never change.

    Built on the `tokenizers` library; transformers.AutoTokenizer opens its file. Its docstrings say
    what every tokenizer does.
    """

    bos_id = None  # beginning-of-text token of a plain text

    def __init__(self, inner: tokenizers.Tokenizer, folder: Path | None = None) -> None:
        self._inner, self._folder = inner, folder
        vocabulary: dict[str, int] = inner.get_vocab()
        self.pad_id, self.unknown_id, self.end_id = (vocabulary[token] for token in SPECIAL)
        # tokens that stop generation; training appends `end_id`
        self.end_ids = frozenset([self.end_id])

    @classmethod
    def of_words(cls, words: Iterable[str]) -> "WordTokenizer":
        """A vocabulary of the special tokens, then each word once, in order of first appearance."""
        vocabulary = {token: id_ for id_, token in enumerate(dict.fromkeys([*SPECIAL, *words]))}
        inner = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
        inner.normalizer = NORMALIZER
        inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        inner.add_special_tokens(list(SPECIAL))
        return cls(inner)

    @classmethod
    def load(cls, folder: Path) -> "WordTokenizer":
        path = folder / FILE
        try:
            inner = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(
                f"{path}: {error.strerror}. A model folder needs its tokenizer."
            ) from None
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{path} is not a tokenizer file: {error}") from None
        missing = [token for token in SPECIAL if inner.token_to_id(token) is None]
        if missing:
            raise UserError(
                f"{path} has no {', '.join(missing)}: it is not a word-level tokenizer of this "
                "project."
            )
        return cls(inner, folder)

    def save(self, folder: Path, max_length: int) -> None:
        """Write the tokenizer's files: the same tokenizer gives the same bytes."""
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
        """Number of ids in use; the model may have more embedding rows."""
        return self._inner.get_vocab_size()

    def words(self) -> list[str]:
        """`word` of every id."""
        return [self.word(id_) for id_ in range(len(self))]

    def word(self, id_: int) -> str:
        """A token as readable text, with its leading space; special tokens as they are."""
        return str(self._inner.id_to_token(id_))

    def id_of_token(self, token: str) -> int | None:
        """The first id whose `word` is `token`, or None."""
        id_: int | None = self._inner.token_to_id(token)
        return id_

    def encode(self, text: str) -> tuple[int, ...]:
        """A prompt's ids: with the beginning-of-text token (once), without an end token.

        An unknown word gives `unknown_id`.
        """
        return self.spans(text)[0]

    def spans(self, text: str) -> tuple[tuple[int, ...], Spans]:
        """Ids, without beginning-of-text token, and the characters [start, stop) of each."""
        encoding = self._inner.encode(text, add_special_tokens=False)
        return tuple(encoding.ids), encoding.offsets

    # ids of a text as a continuation of other text: words have no context
    encode_following = encode

    def continuation(self, prompt: str, answer: str) -> tuple[int, ...]:  # noqa: ARG002
        """Ids of `answer` behind `prompt`, with a space between if neither has one there.

        () if `answer` has an unknown word.
        """
        ids = self.encode(answer)
        return () if self.unknown_id in ids else ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text, without special tokens."""
        return " ".join(word for word in map(self.word, ids) if word not in SPECIAL)

    def stream(self) -> Callable[[int], str]:
        """A function that gets one id after the other, and returns the text that it adds."""

        def text(id_: int) -> str:
            word = self.decode([id_])  # empty for a special token
            return f" {word}" if word else ""

        return text

    def unknown_words(self, text: str) -> list[str]:
        """Words without a token, as written."""
        ids, spans = self.spans(text)
        return [
            text[start:stop]
            for id_, (start, stop) in zip(ids, spans, strict=True)
            if id_ == self.unknown_id
        ]

    def normalize(self, text: str) -> str:
        """The text with single spaces, and without other differences that the tokenizer ignores."""
        return " ".join(split(text))

    @property
    def has_template(self) -> bool:
        """Whether there is a chat template for `render`."""
        return self._folder is not None and chat_template.has_template(self._folder)

    def render(
        self, messages: Messages, add_generation_prompt: bool, tools: Tools = ()
    ) -> Rendered:
        """A conversation in the model's chat template. Raises UserError."""
        return chat_template.render_one(self.render_each, messages, add_generation_prompt, tools)

    def render_each(self, conversations: Sequence[Conversation]) -> Answers:
        """Begin to render the `prefixes` of each conversation; iterate to get the answers.

        Raises UserError.
        """
        if self._folder is None:
            raise chat_template.no_template("the tokenizer")
        # without `Rendered.marks`: label masking then compares prefixes
        return map(_without_marks, chat_template.render_in(self._folder, conversations))

    def expanded(
        self,
        tokens: Iterable[str],
        special: bool = False,  # noqa: ARG002
    ) -> tuple["WordTokenizer", list[str]]:
        """A new tokenizer with every unknown word of the texts `tokens`, and those words.

        No id changes.
        """
        words = dict.fromkeys(chain.from_iterable(map(split, tokens)))
        new = [word for word in words if self._inner.token_to_id(word) is None]
        return WordTokenizer.of_words([*self.words()[len(SPECIAL) :], *new]), new


# Encodes and decodes text, for any model: two classes with the same functions.
Tokenizer = WordTokenizer | SubwordTokenizer


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of the model in `folder`. Raises UserError."""
    refuse_untrusted(folder)
    try:
        text = (folder / FILE).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        text = ""
    # Searched, not parsed: the library parses it anyway, which takes a second for a large
    # vocabulary.
    if re.search(r'"type":\s*"WordLevel"', text) and all(f'"{token}"' in text for token in SPECIAL):
        return WordTokenizer.load(folder)
    return SubwordTokenizer.load(folder)


def _without_marks(renderings: Renderings | UserError) -> Renderings | UserError:
    if isinstance(renderings, UserError):
        return renderings
    return [r if isinstance(r, UserError) else Rendered(r) for r in renderings]


def split(text: str) -> list[str]:
    """Words of the tokenizer: NFC, lower case, split at white space."""
    normalized = NORMALIZER.normalize_str(text)
    # Unlike str.split, this does not split at the control characters U+001C to U+001F.
    return [word for word, _ in pre_tokenizers.WhitespaceSplit().pre_tokenize_str(normalized)]
