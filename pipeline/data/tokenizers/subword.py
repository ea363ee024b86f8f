"""The tokenizer of any model that transformers opens: subwords, special tokens, a chat template."""

import copy
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline.data.tokenizers import chat_template
from pipeline.data.tokenizers.chat_template import Asked, Messages, Rendered, Renderings
from pipeline.errors import UserError
from pipeline.files.artifact import read_json, write_json
from pipeline.files.safetensors_header import as_os_error

CONFIG, GENERATION = "tokenizer_config.json", "generation_config.json"
BROKEN = "\ufffd"  # what bytes that are no whole character decode to
# A text before a text, so that the second is neither joined to it nor taken for the beginning.
_BEFORE = ("\n", ".", "a")
_PROBE = "Zq7"  # an answer that no template writes of itself
# Byte-level vocabularies write printable Latin-1 as it is, and the other bytes as the letters from U+0100 (GPT-2's).
_AS_THEY_ARE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_BYTE_OF = {chr(byte): byte for byte in _AS_THEY_ARE}
_BYTE_OF |= {chr(0x100 + n): byte for n, byte in enumerate(b for b in range(0x100) if b not in _AS_THEY_ARE)}
# Of one machine or one run, not of the tokenizer.
_LOCAL = ("name_or_path", "is_local", "local_files_only", "special_tokens_map_file", "tokenizer_file", "cache_dir")


class SubwordTokenizer:
    """A fast tokenizer of transformers, with the project's rules on what begins and ends a text.

    It may know fewer tokens than the model has rows. transformers is imported by `load` alone.
    """

    def __init__(self, theirs: Any, name: str, ends: Iterable[int] = ()) -> None:
        """`ends`: ids that end what the model says, beside the tokenizer's own. Raises UserError if there is none."""
        self._theirs, self._name, self._inner = theirs, name, theirs.backend_tokenizer
        self._inner.no_truncation()  # some files switch these on; nothing here is cut or filled in silence
        self._inner.no_padding()
        own, self._ends = theirs.eos_token_id, tuple(ends)
        if own is None and not self._ends:
            raise UserError(f"{name}: its tokenizer has no end-of-text token. Name eos_token in {CONFIG}.")
        self.end_id: int = self._ends[0] if own is None else own
        self._prefix = _written_before(self._inner)
        self.bos_id = self._prefix[0] if self._prefix else None
        self._added: dict[int, Any] = self._inner.get_added_tokens_decoder()

    @classmethod
    def load(cls, folder: Path) -> "SubwordTokenizer":
        """The tokenizer in `folder`; nothing is downloaded, none of its code is run. Raises UserError."""
        from transformers import AutoTokenizer

        if not folder.is_dir():
            raise UserError(f"{folder} is not a folder. A model folder needs its tokenizer.")
        try:
            theirs = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # whatever the library raises
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"{folder}: its tokenizer does not open: {reason}. A model folder needs its tokenizer."
            ) from None
        if not theirs.is_fast:
            raise UserError(
                f"{folder}: {type(theirs).__name__} is a slow tokenizer: it cannot say which characters a token stands "
                "for, which masks need. Convert it to a tokenizer.json first."
            )
        return cls(theirs, str(folder), _ends_of(folder))

    def save(self, folder: Path, max_length: int) -> None:
        with as_os_error(folder / "tokenizer.json"):
            self._theirs.save_pretrained(folder)
        config = read_json(folder / CONFIG, "The tokenizer was not written")
        kept = {key: value for key, value in config.items() if key not in _LOCAL}
        kept["model_max_length"] = min(max_length, config.get("model_max_length") or max_length)
        write_json(folder / CONFIG, kept)

    def __len__(self) -> int:
        return self._size

    @cached_property
    def _size(self) -> int:
        return 1 + int(max(self._inner.get_vocab(with_added_tokens=True).values()))

    @cached_property
    def end_ids(self) -> frozenset[int]:
        """The end-of-text token, those of generation_config.json, and what the chat template ends a turn with."""
        return frozenset({self.end_id, *self._ends, *self._turn_end()})

    def _turn_end(self) -> list[int]:
        """The first special token that the template writes after an answer, if any."""
        if not self.has_template:
            return []
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _PROBE}]
        try:
            ids, spans = self.spans(text := self.render(turns, reply=False))
        except UserError:
            return []  # a template that wants more than this; training says so, where it is used
        end = text.rfind(_PROBE) + len(_PROBE)
        special = [id_ for id_, (start, _) in zip(ids, spans, strict=True) if start >= end and self._special(id_)]
        return special[:1] if _PROBE in text else []

    def _special(self, id_: int) -> bool:
        return id_ in self._added and bool(self._added[id_].special)

    def words(self) -> list[str]:
        return list(self._words)

    @cached_property
    def _words(self) -> list[str]:
        ids = range(len(self))
        texts = self._inner.decode_batch([[*self._anchor, id_] for id_ in ids], skip_special_tokens=False)
        return [self._shown(id_, text) for id_, text in zip(ids, texts, strict=True)]

    def word(self, id_: int) -> str:
        return self._shown(id_, self._inner.decode([*self._anchor, id_], skip_special_tokens=False))

    def _shown(self, id_: int, decoded: str) -> str:
        """A token's text as it reads after other text; bytes that are no whole character show as <0xE2>."""
        if id_ in self._added:
            return str(self._added[id_].content)
        text = decoded[len(self._anchor_text) :]
        return text if text and BROKEN not in text else _bytes(str(self._inner.id_to_token(id_) or f"<{id_}>"))

    @cached_property
    def _anchor(self) -> list[int]:
        return list(self._ids("a"))

    @cached_property
    def _anchor_text(self) -> str:
        return str(self._inner.decode(self._anchor, skip_special_tokens=False))

    def id_of_token(self, token: str) -> int | None:
        return self._id_of.get(token)

    @cached_property
    def _id_of(self) -> dict[str, int]:
        return {word: id_ for id_, word in reversed(list(enumerate(self._words)))}  # the first id wins

    def encode(self, text: str) -> tuple[int, ...]:
        ids = self._ids(text)
        begun = isinstance(text, Rendered) or ids[: len(self._prefix)] == self._prefix
        return ids if begun else self._prefix + ids

    def spans(self, text: str) -> tuple[tuple[int, ...], Sequence[tuple[int, int]]]:
        encoding = self._inner.encode(text, add_special_tokens=False)
        return tuple(encoding.ids), encoding.offsets

    def _ids(self, text: str) -> tuple[int, ...]:
        return self.spans(text)[0]

    def following(self, text: str) -> tuple[int, ...]:
        for before in _BEFORE:
            ids, alone = self._ids(before + text), self._ids(before)
            if alone and ids[: len(alone)] == alone:
                return ids[len(alone) :]
        return self._ids(text)

    def continuation(self, prompt: str, answer: str) -> tuple[int, ...]:
        begun = isinstance(prompt, Rendered) or not prompt or prompt[-1].isspace() or answer[:1].isspace()
        return self.following(answer if begun else f" {answer}")

    def decode(self, ids: Iterable[int]) -> str:
        return str(self._inner.decode(list(ids), skip_special_tokens=True))

    def stream(self) -> Callable[[int], str]:
        from tokenizers.decoders import DecodeStream

        def begun() -> Any:
            return DecodeStream(ids=self._anchor, skip_special_tokens=True)  # as after a prompt: the space stays

        decoder = begun()

        def text(id_: int) -> str:
            nonlocal decoder
            if id_ >= len(self):  # a row of the model that no token has
                return ""
            try:
                return decoder.step(self._inner, id_) or ""
            except Exception:  # the library's own, where bytes before this token make no character
                decoder = begun()
                return BROKEN + (decoder.step(self._inner, id_) or "")

        return text

    def unknown_words(self, text: str) -> list[str]:  # noqa: ARG002  # every text has tokens
        return []

    def normal(self, text: str) -> str:
        return " ".join(text.split())

    @property
    def has_template(self) -> bool:
        return bool(self._theirs.chat_template)

    def render(self, messages: Messages, reply: bool) -> Rendered:
        return chat_template.only(self.render_each(messages, [(len(messages), reply)]))

    def render_each(self, messages: Messages, asked: Asked) -> Renderings:
        if not self.has_template:
            raise chat_template.no_template(self._name)
        return chat_template.render_with(self._theirs, messages, asked, self._name)

    def _knows(self, token: str) -> bool:
        """Whether it is one token, and not the one that stands for all that is unknown."""
        ids = self._ids(token)
        return len(ids) == 1 and (ids[0] != self._theirs.unk_token_id or token == self._theirs.unk_token)

    def expanded(self, tokens: Iterable[str], special: bool = False) -> tuple["SubwordTokenizer", list[str]]:
        """Each token is matched as it is written; one that is a whole word, only where it stands alone.

        Special ones are left out of decoded text.
        """
        from tokenizers import AddedToken

        new = [token for token in dict.fromkeys(tokens) if not self._knows(token)]
        theirs = copy.deepcopy(self._theirs)
        for token in new:
            word = not special and token[:1].isalnum() and token[-1:].isalnum()
            theirs.add_tokens([AddedToken(token, single_word=word, normalized=False, special=special)])
        return SubwordTokenizer(theirs, self._name, self._ends), new


def _bytes(token: str) -> str:
    """A token of a byte-level vocabulary, which has a letter for each byte, with its bytes as numbers."""
    values = [_BYTE_OF.get(letter) for letter in token]
    if None in values or max(map(ord, token), default=0) < 128:  # SentencePiece's <0xE2> is written so already
        return token
    return "".join(chr(value) if value < 128 else f"<0x{value:02X}>" for value in values if value is not None)


def _written_before(inner: Any) -> tuple[int, ...]:
    """What the tokenizer's post-processor puts before a plain text."""
    whole, bare = inner.encode("a").ids, inner.encode("a", add_special_tokens=False).ids
    for start in range(len(whole)):
        if bare and whole[start : start + len(bare)] == bare:
            return tuple(whole[:start])
    return ()


def _ends_of(folder: Path) -> list[int]:
    """eos_token_id of generation_config.json, a number or a list of them. Raises UserError for anything else."""
    if not (folder / GENERATION).is_file():
        return []
    value = read_json(folder / GENERATION, "Restore it, or remove it").get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(id_) is int and id_ >= 0 for id_ in ids):
        raise UserError(f"{folder / GENERATION}: eos_token_id must be token ids, got {value!r}. Restore the file.")
    return ids
