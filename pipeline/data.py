"""Examples and prompts as files, and the windows that training cuts from them."""

import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from pipeline.errors import UserError

IGNORED = -100  # the label that cross-entropy skips

Rule = Literal["must_change", "must_keep", "must_learn"]


@dataclass(frozen=True)
class Example:
    """One line of a data file, and where it stands."""

    text: str
    file: str
    line: int

    @property
    def place(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True)
class Prompt:
    """A prompt, the first choice expected of the pretrained (or, for must_learn, the tuned) model,
    and the first choice after the group's correction (the same, unless the rule is must_change)."""

    group: str
    rule: Rule
    prompt: str
    answer: str
    corrected: str


@dataclass(frozen=True)
class Window:
    """Up to `size` consecutive tokens that keep their positions, and the token after each."""

    start: int
    ids: tuple[int, ...]
    labels: tuple[int, ...]


def read_examples(path: Path, name: str) -> list[Example]:
    """One example a line, UTF-8. `name` is the path as the user wrote it. Raises UserError."""
    text = _read_text(path, name)
    lines = text.rstrip().split("\n") if text.strip() else []
    if not lines:
        raise UserError(f"{name}: the file is empty. Write one example a line.")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            raise UserError(f"{name}:{number}: blank line. Write one example a line, with none between them.")
    return [Example(" ".join(line.split()), name, number) for number, line in enumerate(lines, 1)]


def _read_text(path: Path, name: str) -> str:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(f"{name}: {error.strerror}. Name an existing file in params.yaml.") from None
    try:
        return raw.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise UserError(f"{name}:{line}: not UTF-8 (byte {error.start}). Save the file as UTF-8.") from None


def windows(ids: tuple[int, ...], size: int) -> Iterator[Window]:
    """Every run of `size` tokens with a next token each (the document's §9.2, sequence length).

    A shorter sequence is one shorter window; a sequence of one token has nothing to predict.
    """
    last = max(0, len(ids) - 1 - size)
    for start in range(last + 1):
        stop = min(start + size, len(ids) - 1)
        if stop > start:
            yield Window(start, ids[start:stop], ids[start + 1 : stop + 1])


def read_prompts(path: Path, name: str) -> list[Prompt]:
    """prompts.yaml: group → rule → list of {prompt, answer[, corrected]}. Raises UserError."""
    try:
        tree = yaml.safe_load(_read_text(path, name))
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{name} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict) or not tree:
        raise UserError(f"{name} must hold groups of prompts, got {tree!r}.")
    prompts = [
        _prompt(entry, str(group), rule, name)
        for group, rules in tree.items()
        for rule, entries in _mapping(rules, f"{name}: {group}").items()
        for entry in _list(entries, f"{name}: {group}.{rule}")
    ]
    if not prompts:
        raise UserError(f"{name} holds no prompts. Write at least one.")
    return prompts


def _mapping(value: Any, place: str) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{place} must hold {', '.join(get_args(Rule))}, got {value!r}.")
    return value


def _list(value: Any, place: str) -> list[Any]:
    if not isinstance(value, list):
        raise UserError(f"{place} must be a list of prompts, got {value!r}.")
    return value


def _prompt(entry: Any, group: str, rule: Any, name: str) -> Prompt:
    place = f"{name}: {group}.{rule}"
    if rule not in get_args(Rule):
        raise UserError(f"{place}: unknown rule. Use one of {', '.join(get_args(Rule))}.")
    required = {"prompt", "answer"} | ({"corrected"} if rule == "must_change" else set())
    if not isinstance(entry, dict) or set(entry) != required:
        raise UserError(f"{place}: each prompt needs exactly {', '.join(sorted(required))}, got {entry!r}.")
    if not all(isinstance(value, str) and value.strip() for value in entry.values()):
        raise UserError(f"{place}: every value must be a text (quote yes, no and numbers), got {entry!r}.")
    words = {key: _normal(value) for key, value in entry.items() if key != "prompt"}
    return Prompt(group, rule, entry["prompt"], **{"corrected": words["answer"], **words})


def _normal(word: str) -> str:
    """As the tokenizer sees it, so that answers and predictions compare."""
    return unicodedata.normalize("NFC", word.strip()).lower()
