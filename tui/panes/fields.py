"""What a field of a form is, and the values that typed texts stand for."""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import yaml
from textual.content import Content

from pipeline.project.params.edit import dump_inline

Kind = Literal["integer", "number", "boolean", "text", "choice", "list", "mapping", "files"]
Step = Callable[[str, int], str]  # (text, +1 or -1) → the next text


@dataclass(frozen=True)
class Field:
    """A field of a form: what it holds, what is valid, and what it means."""

    key: str
    kind: Kind = "text"
    default: Any = ""
    label: str = ""  # in place of the key
    rule: str = ""  # the valid values in words
    # What is wrong with a value, or "". It also gets texts that are no value of this kind.
    problem: Callable[[Any], str] | None = None
    # Of a "choice" it has one of these, shown by its name in `names`; others suggest them.
    choices: Sequence[str] = ()
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    items: Kind = "text"  # of a list
    step: Step | None = None  # what page up and page down make of a text
    # Values for what is typed, each with a word about it, listed below while one types.
    search: Callable[[str], Mapping[str, str]] | None = None
    placeholder: str = ""  # stands for an empty text
    meaning: str = ""
    source: str = ""  # where its value is set
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
        match self.kind:
            case "list":
                return [_parse_scalar(self.items, item) for item in parse_names(text)]
            case "files":
                return parse_files(text)
            case "mapping":
                return parse_mapping(text)
            case kind:
                return _parse_scalar(kind, text)

    @property
    def steps_by_signs(self) -> bool:
        """Whether + and − are never typed in it."""
        return self.kind == "choice" or self.step in (counting, doubling)

    def stepped(self, text: str, by: int) -> str:
        """The next value of a choice, or of what steps; else the same."""
        step = self.step or (cycling(self.choices) if self.choices else None)
        return step(text.strip() or self.placeholder, by) if step else text


class _YamlLoader(yaml.SafeLoader):
    """Reads 1e-3 as a number: PyYAML takes it for a text."""


_SCIENTIFIC = re.compile(r"[+-]?\d+(\.\d*)?e[+-]?\d+$", re.IGNORECASE)
_YamlLoader.add_implicit_resolver("tag:yaml.org,2002:float", _SCIENTIFIC, list("+-0123456789"))


def _parse_scalar(kind: Kind, text: str) -> Any:
    """Numbers are Python's: in YAML, 023 is 19 and 1:30 is 90. Those of other scripts are texts."""
    kinds: dict[Kind, Callable[[str], Any]] = {
        "boolean": yaml.safe_load,
        "integer": int,
        "number": float,
    }
    read = kinds.get(kind, str)
    try:
        return read(text.strip()) if text.isascii() else text.strip()
    except (yaml.YAMLError, ValueError):
        return text


def parse_names(text: str) -> list[str]:
    """Split comma-separated names. Names may be quoted, as `"[INST]"` must be."""
    items = _parse_list(text)
    if len(items) == 1 and isinstance(items[0], list):  # the text has brackets
        items = items[0]
    if not items or not all(isinstance(name, str) for name in items):
        items = [name.strip() for name in text.split(",")]
    return [name for name in items if name]


def parse_files(text: str) -> Any:
    """A path, or several as a list: each a path, or a mapping such as `{path: a.csv, weight:
    2}`.
    """
    items = _parse_flow(f"[{text}]", _YamlLoader) or []
    return (
        items if len(items) > 1 or any(isinstance(item, dict) for item in items) else text.strip()
    )


def _parse_list(text: str) -> list[Any]:
    """The items of a YAML list typed without brackets, all as strings; empty if it is not one."""
    items = _parse_flow(f"[{text}]", yaml.BaseLoader)
    return items if isinstance(items, list) else []


def parse_mapping(text: str) -> Any:
    """`v_proj: 8, fc1: 2` or `rank: [1, 2]` as a mapping, `{…}, {…}` as a list of them; any other
    text unchanged.
    """
    if text.strip().startswith("{"):
        items = _parse_flow(f"[{text}]", _YamlLoader) or [text]
        return items[0] if len(items) == 1 else items
    mapping = _parse_flow(f"{{{text}}}", _YamlLoader)
    return text if mapping is None else mapping


def _parse_flow(text: str, loader: type[Any]) -> Any:
    """A list or mapping in one line of YAML; None if it is neither."""
    try:
        found = yaml.load(text, loader)
    except (yaml.YAMLError, ValueError):
        return None
    return found if isinstance(found, list | dict) else None


def format_value(value: Any) -> str:
    """A value as it is typed into a form."""
    if isinstance(value, Mapping):
        return dump_inline(to_yaml_value(value))[1:-1]
    if isinstance(value, tuple | list):
        return ", ".join(map(_format_item, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def _format_item(item: Any) -> str:
    """An item of a list, quoted if it would be read as something else."""
    if isinstance(item, Mapping):
        return dump_inline(to_yaml_value(item))
    plain = not isinstance(item, str) or _parse_list(f"{item}, x") == [item, "x"]
    if plain:
        return str(item)
    quoted: str = yaml.safe_dump(item, default_style='"', allow_unicode=True, width=float("inf"))
    return quoted.strip()


def to_yaml_value(value: Any) -> Any:
    """The value with lists for tuples, also inside a mapping, as YAML loads it."""
    if isinstance(value, Mapping):
        return {key: to_yaml_value(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value


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
