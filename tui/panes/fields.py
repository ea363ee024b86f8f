"""What a field of a form is, and the values that typed texts stand for."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import yaml
from textual.content import Content

from pipeline.files import strict_yaml
from pipeline.project.params.edit import dump_inline

Kind = Literal[
    "integer", "number", "boolean", "text", "choice", "names", "list", "mapping", "files"
]
Step = Callable[[str, int], str]  # (text, +1 or -1) → the next text
# Numbers are Python's: in YAML, 023 is 19 and 1:30 is 90.
READERS: Mapping[Kind, Callable[[str], Any]] = {
    "boolean": strict_yaml.load,
    "integer": int,
    "number": float,
}


@dataclass(frozen=True)
class Field:
    """A field of a form: what it holds, what is valid, and what it means."""

    key: str
    kind: Kind = "text"
    default: Any = ""
    label: str = ""  # in place of the key
    rule: str = ""  # the valid values in words
    # What is wrong with a value, or "". It also gets texts that are no value of this kind.
    problem: Callable[[Any], str] = lambda _: ""
    # Of a "choice" it has one of these, shown by its name in `names`; others suggest them.
    choices: Sequence[str] = ()
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    step: Step | None = None  # what page up and page down make of a text
    # Values for what is typed, each with a word about it, listed below while one types.
    search: Callable[[str], Mapping[str, str]] | None = None
    placeholder: str = ""  # stands for an empty text
    meaning: str = ""
    path: str = ""  # its name in messages, such as finetune_lora.rank
    group: str = ""  # the head that it is folded below
    sign: str = ""  # before its label, such as ●
    note: Content | str = ""  # after its value
    quiet: bool = False  # its value is written in grey, as a default

    @property
    def title(self) -> str:
        return self.label or self.key

    def parse(self, text: str) -> Any:
        """The text as a value, or unchanged if it is none. Lists and mappings need no brackets and
        braces.
        """
        text = text.strip()
        match self.kind:
            case "names":
                return parse_names(text)
            case "list":
                return _items(text) or parse_names(text)
            case "files":  # each a path, or a mapping such as {path: a.csv, weight: 2}
                items = _items(text)
                return (
                    items
                    if len(items) > 1 or any(isinstance(item, dict) for item in items)
                    else text
                )
            case "mapping" if text.startswith("{"):  # one, or several as a list
                items = _items(text) or [text]
                return items[0] if len(items) == 1 else items
            case "mapping":
                mapping = _load(f"{{{text}}}")
                return text if mapping is None else mapping
        with suppress(ValueError):
            if text.isascii() and self.kind in READERS:
                return READERS[self.kind](text)
        return text

    @property
    def steps_by_signs(self) -> bool:
        """Whether + and − are never typed in it."""
        return self.kind == "choice" or self.step in (counting, doubling)

    def stepped(self, text: str, by: int) -> str:
        """The next value of a choice, or of what steps; else the same."""
        step = self.step or (cycling(self.choices) if self.choices else None)
        return step(text.strip() or self.placeholder, by) if step else text


def parse_names(text: str) -> list[str]:
    """Split comma-separated names. Names may be quoted, as `"[INST]"` must be."""
    items = _items(text)
    if not items or not all(isinstance(name, str) for name in items):
        items = [name.strip() for name in text.split(",")]
    return [name for name in items if name]


def _items(text: str) -> list[Any]:
    """The items of a list, with brackets or without; empty if it is none."""
    items = _load(f"[{text}]") or []
    has_brackets = len(items) == 1 and isinstance(items[0], list)
    found: list[Any] = items[0] if has_brackets else items
    return found


def _load(text: str) -> Any:
    """A list or a mapping in one line of YAML, as `--set` reads it; None if it is none."""
    with suppress(ValueError):
        return strict_yaml.load(text)
    return None


def format_value(value: Any) -> str:
    """A value as it is typed into a form."""
    if isinstance(value, Mapping):
        return dump_inline(value)[1:-1]
    if isinstance(value, tuple | list):
        return ", ".join(map(_format_item, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def _format_item(item: Any) -> str:
    """An item of a list, quoted if it would be read as something else."""
    if isinstance(item, Mapping):
        return dump_inline(item)
    if not isinstance(item, str) or _items(f"{item}, x") == [item, "x"]:
        return str(item)
    quoted: str = yaml.safe_dump(item, default_style='"', allow_unicode=True, width=float("inf"))
    return quoted.strip()


def counting(text: str, by: int) -> str:
    """1, 2, 3, …; anything that is not a number becomes 1."""
    return str(max(1, int(text) + by)) if text.isdecimal() and len(text) < 12 else "1"


def doubling(text: str, by: int) -> str:
    """1, 2, 4, 8, …: the next power of two above or below."""
    if not text.isdecimal() or len(text) >= 12:
        return "1"
    number = int(text)
    if by > 0:
        return str(1 << number.bit_length())
    return str(1 << max(0, (number - 1).bit_length() - 1))


def cycling(values: Sequence[str]) -> Step:
    """Cycle through `values`; any other text goes to the first."""
    return lambda text, by: (
        values[(values.index(text) + by) % len(values)] if text in values else values[0]
    )
