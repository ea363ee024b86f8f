"""YAML in which no key stands twice.

A file of its own, imported when there is a text to read: the calculator reads no params, and PyYAML takes longer to
import than the calculator takes to count.
"""

from typing import Any

import yaml


def load(text: str) -> Any:
    """The text's value. Raises ValueError for a text that is not YAML, for an invalid date and for too deep nesting."""
    try:
        try:
            return yaml.load(text, _UniqueKeysInC)
        except yaml.YAMLError:  # read again in Python, whose message quotes the line
            return yaml.load(text, _UniqueKeys)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def has_alias(text: str) -> bool:
    """Whether a valid text refers to a value by `*name`: a few lines of these can stand for billions of values."""
    return any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, _UniqueKeysInC))


class _Unique(yaml.constructor.SafeConstructor):
    """Rejects duplicate keys, of which PyYAML silently keeps the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a text", key_node.start_mark)
            key = key_node.value
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


class _UniqueKeys(_Unique, yaml.SafeLoader):
    pass


# Every command reads the params, and the C loader takes a tenth of the time. Not every build of PyYAML has it.
class _UniqueKeysInC(_Unique, getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    pass
