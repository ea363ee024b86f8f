"""A word-level tokenizer on the `tokenizers` library; its file opens in transformers.AutoTokenizer."""

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from pipeline.artifact import write_json
from pipeline.data import Example
from pipeline.errors import UserError

PAD, UNKNOWN, END = "<pad>", "<unk>", "<eos>"
SPECIAL = (PAD, UNKNOWN, END)


class WordTokenizer:
    """Words to ids and back. Ids never change once given: `expanded` only appends."""

    def __init__(self, inner: Tokenizer) -> None:
        self._inner = inner
        vocabulary: dict[str, int] = inner.get_vocab()
        self.pad_id, self.unknown_id, self.end_id = (vocabulary[token] for token in SPECIAL)

    @classmethod
    def of_words(cls, words: Iterable[str]) -> "WordTokenizer":
        """The special tokens, then each word once, in order of first appearance."""
        vocabulary = {token: id_ for id_, token in enumerate(dict.fromkeys([*SPECIAL, *words]))}
        inner = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
        inner.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
        inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        inner.add_special_tokens(list(SPECIAL))
        return cls(inner)

    @classmethod
    def load(cls, folder: Path) -> "WordTokenizer":
        path = folder / "tokenizer.json"
        try:
            inner = Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}. A model folder needs its tokenizer.") from None
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{path} is not a tokenizer file: {error}") from None
        missing = [token for token in SPECIAL if inner.token_to_id(token) is None]
        if missing:
            raise UserError(f"{path} lacks {', '.join(missing)}: it is not a word-level tokenizer of this project.")
        return cls(inner)

    def save(self, folder: Path, max_length: int) -> None:
        (folder / "tokenizer.json").write_text(self._inner.to_str(pretty=True), encoding="utf-8")
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

    def id(self, word: str) -> int | None:
        """The id of one word, or None."""
        ids = self.encode(word)
        return ids[0] if len(ids) == 1 and ids[0] != self.unknown_id else None

    def id_of_token(self, token: str) -> int | None:
        """The id of a token as `word` gives it, or None."""
        id_: int | None = self._inner.token_to_id(token)
        return id_

    def encode(self, text: str) -> tuple[int, ...]:
        """Word ids, without an end token; an unknown word is `unknown_id`."""
        return tuple(self._inner.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Iterable[int]) -> str:
        """Words, without special tokens."""
        return " ".join(word for word in map(self.word, ids) if word not in SPECIAL)

    def unknown_words(self, text: str) -> list[str]:
        encoding = self._inner.encode(text, add_special_tokens=False)
        spans = zip(encoding.ids, encoding.offsets, strict=True)
        return [text[start:stop] for id_, (start, stop) in spans if id_ == self.unknown_id]

    def encode_example(self, example: Example, max_positions: int) -> tuple[int, ...]:
        """The example's ids and an end token. Raises UserError on an unknown word or too many tokens."""
        unknown = self.unknown_words(example.text)
        if unknown:
            raise UserError(
                f"{example.place}: not in the vocabulary: {', '.join(unknown)}. "
                f"Add {example.file} to expand_vocab.data in params.yaml and run `lora expand-vocab`."
            )
        ids = (*self.encode(example.text), self.end_id)
        if len(ids) > max_positions:
            raise UserError(
                f"{example.place}: {len(ids)} tokens with the end token, more than the model's "
                f"{max_positions} positions. Shorten the line or raise pretrain.max_positions."
            )
        return ids

    def expanded(self, texts: Iterable[str]) -> tuple["WordTokenizer", list[str]]:
        """A new tokenizer with every unknown word of `texts` appended, and those words."""
        new = dict.fromkeys(word for text in texts for word in split(text) if self._inner.token_to_id(word) is None)
        return WordTokenizer.of_words([*self.words()[len(SPECIAL) :], *new]), list(new)


def split(text: str) -> list[str]:
    """Words as the tokenizer sees them: NFC, lower case, split at white space."""
    normal = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()]).normalize_str(text)
    return normal.split()
