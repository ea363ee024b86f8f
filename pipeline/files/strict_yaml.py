"""YAML in which no key stands twice.

A file of its own, imported when there is a text to read: the calculator reads no params, and PyYAML
takes longer to import than the calculator takes to count.
"""

import math
from pathlib import Path
from typing import Any

import yaml

from pipeline.errors import UserError

MOST_CHARACTERS = 10_000_000  # of a file: PyYAML takes a second for each million
# values that a text may stand for through its aliases: a few lines of `*name` can mean billions
MOST_VALUES = 1_000_000
LONG_TEXT = 100  # characters of a text count as one more value: aliases repeat long texts too
LONGEST_NUMBER = 1_000  # characters


def read(path: Path, name: str, most: int = MOST_CHARACTERS) -> Any:
    """The value of a file that messages call `name`, of at most `most` characters.

    Raises UserError.
    """
    try:
        with path.open("rb") as file:
            data = file.read(4 * most + 1)  # a character has up to 4 bytes
        if len(data) > 4 * most or len(text := data.decode()) > most:
            raise UserError(f"{name} must have at most {most:,} characters. Make it shorter.")
        return load(text)
    except OSError as error:
        raise UserError(f"{name}: {error.strerror}. Name a file that exists.") from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"{name}: not UTF-8 (byte {error.start}). Save the file as UTF-8."
        ) from None
    except ValueError as error:
        raise UserError(f"{name} is not valid YAML: {' '.join(str(error).split())[:300]}") from None


def load(text: str) -> Any:
    """The text's value. Raises ValueError for what is not YAML.

    That includes invalid dates, too deep nesting, and aliases for more than `MOST_VALUES`.
    """
    try:
        try:
            if "&" in text and _written_out(yaml.compose(text, _UniqueKeysInC), {}) > MOST_VALUES:
                raise ValueError(f"its aliases (*name) stand for more than {MOST_VALUES:,} values")
            return yaml.load(text, _UniqueKeysInC)
        except yaml.YAMLError:  # read again in Python, whose message quotes the line
            return yaml.load(text, _UniqueKeys)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None
    except (AttributeError, IndexError, KeyError, OverflowError):  # PyYAML's, of `!!bool x`
        raise ValueError("a value does not fit its type") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _written_out(node: yaml.Node | None, known: dict[int, float]) -> float:
    """The number of values below a node, each alias counted as what it stands for.

    A text counts as a value for each `LONG_TEXT` characters. It is infinite if a value holds
    itself.
    """
    if id(node) not in known:
        known[id(node)] = math.inf  # while it is counted
        pairs = node.value if isinstance(node, yaml.CollectionNode) else ()
        below = (part for pair in pairs for part in (pair if isinstance(pair, tuple) else (pair,)))
        size = 1 + len(node.value) // LONG_TEXT if isinstance(node, yaml.ScalarNode) else 1
        known[id(node)] = size + sum(_written_out(part, known) for part in below)
    return known[id(node)]


class _Unique(yaml.constructor.SafeConstructor):
    """Rejects duplicate keys, of which PyYAML silently keeps the last."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Put what `<<` names into the node. Called again where another node merges this one."""
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(
                    None, None, "a key must be a text", key_node.start_mark
                )
            key = key_node.value
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} twice", key_node.start_mark
                )
            seen.add(key)
        super().flatten_mapping(node)
        # the last of equal keys is the node's own; a second call would find the merged one twice
        node.value = [*{(key.tag, key.value): (key, value) for key, value in node.value}.values()]

    def construct_short_int(self, node: yaml.ScalarNode) -> int:
        """An integer that Python can also write: it reads 0x… of any length, but `repr` fails."""
        if len(node.value) > LONGEST_NUMBER:
            why = f"a number must have at most {LONGEST_NUMBER} digits"
            raise yaml.constructor.ConstructorError(None, None, why, node.start_mark)
        value: int = self.construct_yaml_int(node)
        return value


_Unique.add_constructor("tag:yaml.org,2002:int", _Unique.construct_short_int)  # type: ignore[type-var]  # for loaders


class _UniqueKeys(_Unique, yaml.SafeLoader):
    pass


# Every command reads the params, and the C loader takes a tenth of the time. Not every build of
# PyYAML has it.
class _UniqueKeysInC(_Unique, getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    pass
