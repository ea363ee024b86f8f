"""Validation of params.yaml: rules that annotate the types of a dataclass, and the check of values against them.

Every violation is a UserError with key, rule, value and next step.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from pipeline.errors import UserError
from pipeline.files.patterns import end_pattern, problem


@dataclass(frozen=True)
class AtLeast:
    bound: float

    def violation(self, value: float) -> str | None:
        return None if value >= self.bound else f"must be at least {self.bound:g}"


@dataclass(frozen=True)
class MoreThan:
    bound: float

    def violation(self, value: float) -> str | None:
        return None if value > self.bound else f"must be more than {self.bound:g}"


@dataclass(frozen=True)
class Below:
    bound: int

    def violation(self, value: float) -> str | None:
        return None if value < self.bound else f"must be below {self.bound}"


@dataclass(frozen=True)
class GridOf:
    """A mapping of some keys of a section to lists of values; `rule` introduces the allowed keys in an error."""

    kind: type
    keys: tuple[str, ...]
    rule: str

    def violation(self, _value: Any) -> str | None:
        return None


@dataclass(frozen=True)
class AllowEmpty:
    """A text, list or mapping that may be empty."""

    def violation(self, _value: Any) -> str | None:
        return None


@dataclass(frozen=True)
class AllowDuplicates:
    """A list that may contain a value twice, such as the numbers of a matrix."""

    def violation(self, _value: Any) -> str | None:
        return None


@dataclass(frozen=True)
class Because:
    """The reason why no other value is allowed, for the error text."""

    reason: str

    def violation(self, _value: Any) -> str | None:
        return None


@dataclass(frozen=True)
class ValueSource:
    """Where values come from: `file`, or `--set` for the keys and sections in `overridden`."""

    file: str
    overridden: frozenset[str] = frozenset()

    def edit(self, key: str) -> str:
        """The next step for a wrong value of `key`."""
        return "Change it in --set." if self.of(key) == "--set" else f"Edit {self.file}."

    def of(self, key: str) -> str:
        """Where `key` is set: "--set" or the file. `key`: section, section.key, or a key deeper in a mapping."""
        return "--set" if ".".join(key.split(".")[:2]) in self.overridden else self.file


TOP_LEVEL = "top_level"  # in a field's metadata: its key stands above the sections, and names no section
LARGEST = 1e30  # of a float, so that products stay finite in fp32
Count = Annotated[int, AtLeast(1), Below(2**31)]
Seed = Annotated[int, AtLeast(0), Below(2**63)]
Rate = Annotated[float, MoreThan(0)]
File = Annotated[str, AllowEmpty()]
Names = Annotated[tuple[str, ...], AllowEmpty()]
Share = Annotated[float, AtLeast(0), Below(1)]
Steps = Annotated[int, AtLeast(0), Below(2**31)]


def reject_unknown_keys(tree: Mapping[str, Any], known: Sequence[str], prefix: str, origin: ValueSource) -> None:
    for key in tree:
        if key not in known:
            from pipeline.project.params.aliases import KEYS, suggest  # only for a message

            meant = suggest(str(key), known, KEYS, prefix.rstrip("."))
            hint = f"Did you mean {meant}?" if meant else f"Known: {', '.join(known) or 'none'}."
            raise UserError(f"{origin.of(f'{prefix}{key}')}: unknown key {prefix}{key}. {hint}")


def type_name(hint: Any) -> str:
    hint, rules = _split(hint)
    violations = (rule_.violation(math.nan) for rule_ in rules)
    description = ", ".join([_convert(hint, None)[1], *(text.removeprefix("must be ") for text in violations if text)])
    return f"{description}, or empty" if AllowEmpty() in rules else description


def _split(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """The type without its annotation, and the annotated rules."""
    if get_origin(hint) is not Annotated:
        return hint, ()
    hint, *rules = get_args(hint)
    return hint, tuple(rules)


def section(kind: type, tree: Any, name: str, origin: ValueSource) -> Any:
    tree = {} if tree is None else tree  # `section:` without keys has all defaults
    if not isinstance(tree, dict):
        raise UserError(f"{origin.of(name)}: {name} must be a section of key: value lines, got {tree!r}.")
    reject_unknown_keys(tree, [f.name for f in fields(kind) if not f.metadata.get(TOP_LEVEL)], f"{name}.", origin)
    hints = get_type_hints(kind, include_extras=True)
    values = {key: validate(hints[key], value, f"{name}.{key}", origin) for key, value in tree.items()}
    return kind(**values)


def validate(hint: Any, value: Any, key: str, origin: ValueSource) -> Any:
    """Convert `value` to the annotated type. Raises UserError if it violates the type or a rule."""
    hint, rules = _split(hint)
    if value in (None, "", [], {}) and AllowEmpty() in rules:
        return {tuple: (), Mapping: {}}.get(get_origin(hint), "")
    if get_origin(hint) is Mapping and isinstance(value, dict):
        grid = next((rule for rule in rules if isinstance(rule, GridOf)), None)
        if grid is not None:
            return _validate_grid(grid, value, key, origin)
        return _validate_patterns(get_args(hint)[1], value, key, origin)
    if get_origin(hint) is tuple and (item := get_args(hint)[0]) is not str:
        return _validate_list(item, value, key, origin, AllowDuplicates() in rules)
    typed, expected = _convert(hint, value)
    problem = f"must be {expected}" if typed is None else next(filter(None, (r.violation(typed) for r in rules)), None)
    if problem:
        because = "".join(f": {rule.reason}" for rule in rules if isinstance(rule, Because))
        raise UserError(f"{key} {problem}, got {value!r}{because}. {origin.edit(key)}")
    return typed


def _validate_list(hint: Any, values: Any, key: str, origin: ValueSource, repeats: bool = False) -> tuple[Any, ...]:
    """Validate each value of a list. Raises UserError, also for duplicates unless `repeats`."""
    if not isinstance(values, list) or not values:
        raise UserError(f"{key} must be a list of values, such as [0, 1], got {values!r}. {origin.edit(key)}")
    typed = tuple(validate(hint, value, key, origin) for value in values)
    twice = next((value for n, value in enumerate(typed) if value in typed[:n]), None)
    if twice is not None and not repeats:
        raise UserError(f"{key} has {twice!r} twice. Remove one of them from {origin.of(key)}.")
    return typed


def _validate_patterns(hint: Any, values: dict[Any, Any], key: str, origin: ValueSource) -> dict[str, Any]:
    """Validate a mapping of regular expressions to values. Raises UserError."""
    for pattern in values:
        if why := problem(pattern) or problem(end_pattern(pattern)) if isinstance(pattern, str) else "it is not a text":
            raise UserError(
                f"{key}: {pattern!r} is not a regular expression for module names: {why}. {origin.edit(key)}"
            )
    return {pattern: validate(hint, value, f"{key}.{pattern}", origin) for pattern, value in values.items()}


def _validate_grid(grid: GridOf, values: dict[Any, Any], key: str, origin: ValueSource) -> dict[str, tuple[Any, ...]]:
    """Validate a mapping of a section's keys to lists of their values. Raises UserError."""
    hints = get_type_hints(grid.kind, include_extras=True)
    for name, options in values.items():
        if name not in grid.keys:
            raise UserError(f"{key}.{name}: {grid.rule} {', '.join(grid.keys)} only. {origin.edit(key)}")
        if not isinstance(options, list) or not options:
            raise UserError(
                f"{key}.{name} must be a list of values, such as [1, 2], got {options!r}. {origin.edit(key)}"
            )
    return {
        name: tuple(validate(hints[name], value, f"{key}.{name}", origin) for value in options)
        for name, options in values.items()
    }


def _convert(hint: Any, value: Any) -> tuple[Any, str]:
    """The value converted to `hint`, or None if that fails; and a description of the expected type."""
    if get_origin(hint) is Literal:
        choices = get_args(hint)
        return (value if value in choices else None), "one of " + ", ".join(choices)
    if get_origin(hint) is tuple and get_args(hint)[0] is not str:  # lists are validated value by value
        return None, f"a list, each value {type_name(get_args(hint)[0])}"
    if get_origin(hint) is tuple:
        items = [value] if isinstance(value, str) else value
        good = isinstance(items, list) and items and all(isinstance(i, str) and i for i in items)
        return (tuple(items) if good else None), "a name or a list of names"
    if get_origin(hint) is Mapping and get_origin(get_args(hint)[1]) is tuple:
        return None, "a mapping of keys to lists of values, such as {rank: [1, 2, 4]}"
    if get_origin(hint) is Mapping:  # mappings are validated value by value
        return None, f"a mapping of patterns of module names, such as {{q_proj: 8}}, to {type_name(get_args(hint)[1])}"
    if hint is bool:
        return (value if isinstance(value, bool) else None), "true or false"
    if hint is int:
        return (value if isinstance(value, int) and not isinstance(value, bool) else None), "a whole number"
    if hint is float:
        number = _number(value)
        if number is not None and abs(number) > LARGEST:
            return None, f"at most {LARGEST:g} in size"
        return number, "a finite number"
    return (value if isinstance(value, str) and value else None), "a text"


def _number(value: Any) -> float | None:
    """A float, also from a string such as `1e-4`, which PyYAML does not read as a number; None if not finite."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
