"""The words that a word-level model knows, read without a library: others are marked while they are
typed.
"""

import json
import re
import unicodedata
from collections.abc import Collection, Iterator
from functools import lru_cache
from pathlib import Path

from pipeline.files.file_tail import file_stamp

# a word-level vocabulary of this project is far smaller
FILE, MAX_BYTES = "tokenizer.json", 2_000_000
# None: any text can be encoded, or the file is too large to tell
Vocabulary = Collection[str] | None


def vocabulary(base: Path) -> Vocabulary:
    """The words of the model in `base`, in lower case; None if it has no word-level tokenizer."""
    path = base / FILE
    stamp = file_stamp(path)
    return _read(path, stamp) if stamp else None


@lru_cache(maxsize=64)
def _read(path: Path, _: tuple[int, ...]) -> Vocabulary:
    try:
        if path.stat().st_size > MAX_BYTES:
            return None
        model = json.loads(path.read_text(encoding="utf-8"))["model"]
        return frozenset(map(str, model["vocab"])) if model["type"] == "WordLevel" else None
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        return None


def unknown_words(text: str, words: Vocabulary) -> Iterator[tuple[int, int]]:
    """Start and stop of each word of `text` that is not in the vocabulary."""
    if words is None:
        return
    for match in re.finditer(r"\S+", text):
        if unicodedata.normalize("NFC", match[0]).lower() not in words:
            yield match.span()
