"""Subword tokenizers: the fast tokenizer of any transformers model, with its chat template."""

import copy
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline.data.tokenizers import chat_template
from pipeline.data.tokenizers.chat_template import Answers, Messages, Tools
from pipeline.data.tokenizers.template_process import RENDERER, Conversation, Rendered
from pipeline.errors import UserError
from pipeline.files.artifact import read_json, write_json
from pipeline.files.patterns import full_match, problem
from pipeline.files.safetensors_file import as_os_error

CONFIG, GENERATION = "tokenizer_config.json", "generation_config.json"
BROKEN = "\ufffd"  # what an incomplete UTF-8 character decodes to
# Context before a text, so that it is not tokenized as a beginning; the first that does not merge
# with it is used.
_BEFORE = ("\n", ".", "a")
_PROBE = "Zq7"  # an answer that no template contains itself
# GPT-2's byte-level alphabet: printable Latin-1 bytes are themselves, the others are the letters
# from U+0100.
_PRINTABLE_BYTES = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
BYTE_LETTERS = {chr(byte): byte for byte in _PRINTABLE_BYTES}
_OTHER_BYTES = sorted({*range(0x100)}.difference(_PRINTABLE_BYTES))
BYTE_LETTERS |= {chr(0x100 + n): byte for n, byte in enumerate(_OTHER_BYTES)}
# Keys that describe a machine or a run, not the tokenizer.
_MACHINE_KEYS = (
    "name_or_path",
    "is_local",
    "local_files_only",
    "special_tokens_map_file",
    "tokenizer_file",
    "cache_dir",
)


_ESCAPED_LETTER = re.compile(rb"\\u00[4-7]")  # of ASCII, which no library escapes
# times that a tokenizer may lengthen a text; those published make at most 3 characters of one
MOST_GROWTH = 1_000


@contextmanager
def _panics_reported(name: str) -> Iterator[None]:
    """Raises UserError where the library panics, as on a pattern that takes too many steps.

    Its PanicException is no Exception, so that no handler of a library's errors would see it.
    """
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        reason = chat_template.one_line(error)
        raise UserError(
            f"{name}: its tokenizer fails: {reason}. Copy it again, or choose another model."
        ) from None


def _refuse_growth(folder: Path) -> None:
    """Raises UserError for a tokenizer.json whose replacements lengthen texts too much.

    40 times "a" → "aa" would take a terabyte. To be called before the library reads the file,
    because it normalizes added tokens then.
    """
    path = folder / "tokenizer.json"
    raw = path.read_bytes() if path.is_file() else b""
    # most have none, and parsing takes a second
    if b'"Replace"' not in raw and not _ESCAPED_LETTER.search(raw):
        return
    tree = read_json(path, "Copy the tokenizer again")
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        if (growth := _growth(tree.get(part))) > MOST_GROWTH:
            raise UserError(
                f"{path}: its {part} must lengthen a text at most {MOST_GROWTH:,} times, but may "
                f"do so {growth:.3g} times. Copy the tokenizer again, or choose another model."
            )


def _growth(part: Any) -> float:
    """The most that a part of tokenizer.json lengthens a text, as a factor."""
    if not isinstance(part, dict):
        return 1.0
    steps = next(
        (part[key] for key in ("normalizers", "pretokenizers", "decoders") if key in part), None
    )
    if isinstance(steps, list):
        return math.prod(map(_growth, steps))
    content, pattern = part.get("content"), part.get("pattern")
    if part.get("type") != "Replace" or not isinstance(content, str):
        return 1.0
    text = pattern.get("String") if isinstance(pattern, dict) else None
    if isinstance(text, str) and text:
        return max(1.0, len(content) / len(text))
    # A regular expression may match each character. If it also matches the empty text, the content
    # comes between all characters too.
    expression = pattern.get("Regex") if isinstance(pattern, dict) else None
    fills = (
        not isinstance(expression, str)
        or problem(expression) is not None
        or full_match(expression, "", "pattern")
    )
    return max(1.0, len(content) + fills)


class SubwordTokenizer:
    """A fast transformers tokenizer, with this project's rules for beginning and end tokens.

    It may have fewer tokens than the model has embedding rows. Only `load` imports transformers.
    """

    def __init__(self, hf_tokenizer: Any, name: str, ends: Iterable[int] = ()) -> None:
        """`ends`: ids that stop generation beside EOS. Raises UserError without an end token."""
        self._hf_tokenizer, self._name = hf_tokenizer, name
        self._inner = hf_tokenizer.backend_tokenizer
        # some tokenizer.json enable these; nothing here is truncated or padded silently
        self._inner.no_truncation()
        self._inner.no_padding()
        eos_id = hf_tokenizer.eos_token_id
        self._extra_end_ids = tuple(ends)
        if eos_id is None and not self._extra_end_ids:
            raise UserError(
                f"{name}: its tokenizer has no end-of-text token. Set eos_token in {CONFIG}."
            )
        self.end_id: int = self._extra_end_ids[0] if eos_id is None else eos_id
        # What the tokenizer's post-processor puts before a text, such as BOS: no attribute of a
        # tokenizer tells.
        with _panics_reported(name):
            full = self._inner.encode("a").ids
            bare = self._inner.encode("a", add_special_tokens=False).ids
        start = next((n for n in range(len(full)) if bare and full[n : n + len(bare)] == bare), 0)
        self.prefix: tuple[int, ...] = tuple(full[:start])
        self.bos_id = self.prefix[0] if self.prefix else None
        self._added: dict[int, Any] = self._inner.get_added_tokens_decoder()

    @classmethod
    def load(cls, folder: Path) -> "SubwordTokenizer":
        """The tokenizer in `folder`, without downloads or its code. Raises UserError."""
        # almost every use renders, and the process takes as long to start as transformers here
        if chat_template.has_template(folder):
            with suppress(OSError):  # what renders says it
                RENDERER.start()
        from transformers import AutoTokenizer

        if not folder.is_dir():
            raise UserError(f"{folder} is not a folder. A model folder needs its tokenizer.")
        _refuse_growth(folder)
        try:
            with _panics_reported(str(folder)):
                hf_tokenizer = AutoTokenizer.from_pretrained(
                    folder, local_files_only=True, trust_remote_code=False
                )
        except UserError:
            raise
        except Exception as error:  # whatever the library raises
            reason = chat_template.one_line(error)
            raise UserError(
                f"{folder}: cannot open its tokenizer: {reason}. A model folder needs its "
                "tokenizer."
            ) from None
        if not hf_tokenizer.is_fast:
            raise UserError(
                f"{folder}: {type(hf_tokenizer).__name__} is a slow tokenizer, which has no "
                "character offsets for label masks. Convert it to a tokenizer.json first."
            )
        return cls(hf_tokenizer, str(folder), _generation_end_ids(folder))

    def save(self, folder: Path, max_length: int) -> None:
        with as_os_error(folder / "tokenizer.json"):
            self._hf_tokenizer.save_pretrained(folder)
        config = read_json(folder / CONFIG, "The tokenizer was not written")
        portable = {key: value for key, value in config.items() if key not in _MACHINE_KEYS}
        portable["model_max_length"] = min(max_length, config.get("model_max_length") or max_length)
        write_json(folder / CONFIG, portable)

    def __len__(self) -> int:
        return self._size

    @cached_property
    def _size(self) -> int:
        return 1 + int(max(self._inner.get_vocab(with_added_tokens=True).values()))

    @cached_property
    def end_ids(self) -> frozenset[int]:
        """The end-of-text tokens, and the chat template's end-of-turn token.

        Many instruct models end a turn with another token than a text, and name it nowhere but in
        their template: it is the first special token that the template writes after an answer.
        """
        ends = {self.end_id, *self._extra_end_ids}
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _PROBE}]
        try:
            text = self.render(turns, add_generation_prompt=False) if self.has_template else ""
        except UserError:
            text = ""  # the template needs more than these turns; training reports it
        if _PROBE in text:
            ids, spans = self.spans(text)
            answered = text.rfind(_PROBE) + len(_PROBE)
            for id_, (start, _) in zip(ids, spans, strict=True):
                if start >= answered and id_ in self._added and self._added[id_].special:
                    ends.add(id_)
                    break
        return frozenset(ends)

    def words(self) -> list[str]:
        anchored = [[*self._anchor, id_] for id_ in range(len(self))]
        with _panics_reported(self._name):
            texts = self._inner.decode_batch(anchored, skip_special_tokens=False)
        return [self._display_text(id_, text) for id_, text in enumerate(texts)]

    def word(self, id_: int) -> str:
        text = self._inner.decode([*self._anchor, id_], skip_special_tokens=False)
        return self._display_text(id_, text)

    def _display_text(self, id_: int, decoded: str) -> str:
        """A token's text as after other text; bytes of an incomplete character as <0xE2>."""
        if id_ in self._added:
            return str(self._added[id_].content)
        text = decoded[len(self._anchor_text) :]
        if text and BROKEN not in text:
            return text
        return _format_bytes(str(self._inner.id_to_token(id_) or f"<{id_}>"))

    @cached_property
    def _anchor(self) -> list[int]:
        return list(self._ids("a"))

    @cached_property
    def _anchor_text(self) -> str:
        return str(self._inner.decode(self._anchor, skip_special_tokens=False))

    def id_of_token(self, token: str) -> int | None:
        return self._id_by_word.get(token)

    @cached_property
    def _id_by_word(self) -> dict[str, int]:
        # the first id wins
        return {word: id_ for id_, word in reversed(list(enumerate(self.words())))}

    def encode(self, text: str) -> tuple[int, ...]:
        ids = self._ids(text)
        has_prefix = isinstance(text, Rendered) or ids[: len(self.prefix)] == self.prefix
        return ids if has_prefix else self.prefix + ids

    def spans(self, text: str) -> tuple[tuple[int, ...], Sequence[tuple[int, int]]]:
        with _panics_reported(self._name):
            encoding = self._inner.encode(text, add_special_tokens=False)
        return tuple(encoding.ids), encoding.offsets

    def _ids(self, text: str) -> tuple[int, ...]:
        return self.spans(text)[0]

    def encode_following(self, text: str) -> tuple[int, ...]:
        for before in _BEFORE:
            ids, alone = self._ids(before + text), self._ids(before)
            if alone and ids[: len(alone)] == alone:
                return ids[len(alone) :]
        return self._ids(text)

    def continuation(self, prompt: str, answer: str) -> tuple[int, ...]:
        has_space = not prompt or prompt[-1].isspace() or answer[:1].isspace()
        spaced = has_space or isinstance(prompt, Rendered)
        return self.encode_following(answer if spaced else f" {answer}")

    def decode(self, ids: Iterable[int]) -> str:
        with _panics_reported(self._name):
            return str(self._inner.decode(list(ids), skip_special_tokens=True))

    def stream(self) -> Callable[[int], str]:
        from tokenizers.decoders import DecodeStream

        def new_decoder() -> Any:
            # as after a prompt: keeps the space
            return DecodeStream(ids=self._anchor, skip_special_tokens=True)

        decoder = new_decoder()

        def text(id_: int) -> str:
            nonlocal decoder
            if id_ >= len(self):  # an embedding row without a token
                return ""
            try:
                return decoder.step(self._inner, id_) or ""
            except Exception:  # of the library: the bytes before this token are not a character
                decoder = new_decoder()
                return BROKEN + (decoder.step(self._inner, id_) or "")

        return text

    def unknown_words(self, text: str) -> list[str]:  # noqa: ARG002  # subwords cover every text
        return []

    def normalize(self, text: str) -> str:
        return " ".join(text.split())

    @property
    def has_template(self) -> bool:
        return bool(self._hf_tokenizer.chat_template)

    @property
    def template(self) -> str | None:
        """The chat template that `render` uses."""
        template = self._hf_tokenizer.chat_template  # some have several, by name
        return template.get("default") if isinstance(template, dict) else template

    def describe(self) -> dict[str, Any]:
        """tokenizer.json."""
        return dict(json.loads(self._inner.to_str()))

    def special_ids(self) -> dict[str, int]:
        """Those of bos, unk and pad that are set → id."""
        names = ("bos", "unk", "pad")
        ids = {name: getattr(self._hf_tokenizer, f"{name}_token_id") for name in names}
        return {name: id_ for name, id_ in ids.items() if id_ is not None}

    def with_template(self, template: str) -> "SubwordTokenizer":
        """The same tokenizer with another chat template."""
        hf_tokenizer = copy.deepcopy(self._hf_tokenizer)
        hf_tokenizer.chat_template = template
        return SubwordTokenizer(hf_tokenizer, self._name, self._extra_end_ids)

    def render(
        self, messages: Messages, add_generation_prompt: bool, tools: Tools = ()
    ) -> Rendered:
        return chat_template.render_one(self.render_each, messages, add_generation_prompt, tools)

    def render_each(self, conversations: Sequence[Conversation]) -> Answers:
        if not self.has_template:
            raise chat_template.no_template(self._name)
        return chat_template.render_with(self._hf_tokenizer, conversations, self._name)

    def expanded(
        self, tokens: Iterable[str], special: bool = False
    ) -> tuple["SubwordTokenizer", list[str]]:
        """A tokenizer with these tokens added, and those that it did not have.

        They match exactly as written, and one like a word only as a whole word. Special tokens are
        left out of decoded text.
        """
        from tokenizers import AddedToken

        hf_tokenizer = copy.deepcopy(self._hf_tokenizer)
        new = []
        for token in dict.fromkeys(tokens):
            ids = self._ids(token)
            is_unknown = ids == (hf_tokenizer.unk_token_id,) and token != hf_tokenizer.unk_token
            if len(ids) == 1 and not is_unknown:  # it is one token already
                continue
            new.append(token)
            word = not special and token[:1].isalnum() and token[-1:].isalnum()
            added = AddedToken(token, single_word=word, normalized=False, special=special)
            hf_tokenizer.add_tokens([added])
        return SubwordTokenizer(hf_tokenizer, self._name, self._extra_end_ids), new


def _format_bytes(token: str) -> str:
    """A token of a byte-level vocabulary with its non-ASCII bytes as <0xE2>."""
    # SentencePiece already writes <0xE2>
    if token.isascii() or not BYTE_LETTERS.keys() >= {*token}:
        return token
    values = (BYTE_LETTERS[letter] for letter in token)
    return "".join(chr(value) if value < 128 else f"<0x{value:02X}>" for value in values)


def _generation_end_ids(folder: Path) -> list[int]:
    """eos_token_id of generation_config.json, an id or a list of ids. Raises UserError."""
    if not (folder / GENERATION).is_file():
        return []
    value = read_json(folder / GENERATION, "Restore it, or remove it").get("eos_token_id")
    if value is None:
        return []
    ids = value if isinstance(value, list) else [value]
    if not all(type(id_) is int and id_ >= 0 for id_ in ids):
        raise UserError(
            f"{folder / GENERATION}: eos_token_id must be a token id or a list of ids, got "
            f"{value!r}. Restore it."
        )
    return ids
