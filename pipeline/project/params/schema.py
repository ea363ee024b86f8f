"""What a value of params.yaml must be: rules that a dataclass's types are annotated with, and their check.

Every problem is a UserError that names key, rule, value and next step.
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
    """A mapping of some of a section's keys to lists of values; `rule` says before them why these alone."""

    kind: type
    keys: tuple[str, ...]
    rule: str

    def violation(self, _value: Any) -> str | None:
        return None


@dataclass(frozen=True)
class AllowEmpty:
    """A text, a list or a mapping that may be left out."""

    def violation(self, _value: Any) -> str | None:
        return None


@dataclass(frozen=True)
class AllowDuplicates:
    """A list in which a value may stand twice: numbers of a matrix, not settings to try."""

    def violation(self, _value: Any) -> str | None:
        return None


@dataclass(frozen=True)
class Because:
    """Why no other value is allowed: an error says it."""

    reason: str

    def violation(self, _value: Any) -> str | None:
        return None


@dataclass(frozen=True)
class ValueSource:
    """Where values were written: in `file`, or with `--set` for the keys and sections in `overridden`."""

    file: str
    overridden: frozenset[str] = frozenset()

    def edit(self, key: str) -> str:
        """What to do about a wrong value of `key`."""
        return "Change it in --set." if self.of(key) == "--set" else f"Edit {self.file}."

    def of(self, key: str) -> str:
        """What to edit to change `key`: section, section.key, or a key deeper in a mapping."""
        return "--set" if ".".join(key.split(".")[:2]) in self.overridden else self.file


TOP_LEVEL = "top_level"  # in a field's metadata: its key stands above the sections, and names no section
LARGEST = 1e30  # of a float: products with it must still be numbers in fp32
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
            hint = f"Did you mean {meant}?" if meant else f"Known: {', '.join(known)}."
            raise UserError(f"{origin.of(f'{prefix}{key}')}: unknown key {prefix}{key}. {hint}")


def type_name(hint: Any) -> str:
    hint, rules = _split(hint)
    broken = (rule_.violation(math.nan) for rule_ in rules)
    said = ", ".join([_converted(hint, None)[1], *(text.removeprefix("must be ") for text in broken if text)])
    return f"{said}, or empty" if AllowEmpty() in rules else said


def _split(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """(the type, the rules that it is annotated with)."""
    if get_origin(hint) is not Annotated:
        return hint, ()
    hint, *rules = get_args(hint)
    return hint, tuple(rules)


def section(kind: type, tree: Any, name: str, origin: ValueSource) -> Any:
    tree = {} if tree is None else tree  # `section:` alone has every default
    if not isinstance(tree, dict):
        raise UserError(f"{origin.of(name)}: {name} must be a section of key: value lines, got {tree!r}.")
    reject_unknown_keys(tree, [f.name for f in fields(kind) if not f.metadata.get(TOP_LEVEL)], f"{name}.", origin)
    hints = get_type_hints(kind, include_extras=True)
    values = {key: validate(hints[key], value, f"{name}.{key}", origin) for key, value in tree.items()}
    return kind(**values)


def validate(hint: Any, value: Any, key: str, origin: ValueSource) -> Any:
    """`value` as the schema's type, or a UserError."""
    hint, rules = _split(hint)
    if value in (None, "", [], {}) and AllowEmpty() in rules:
        return {tuple: (), Mapping: {}}.get(get_origin(hint), "")
    if get_origin(hint) is Mapping and isinstance(value, dict):
        of = next((rule for rule in rules if isinstance(rule, GridOf)), None)
        if of is not None:
            return _checked_values(of, value, key, origin)
        return _checked_patterns(get_args(hint)[1], value, key, origin)
    if get_origin(hint) is tuple and (of := get_args(hint)[0]) is not str:
        return _checked_list(of, value, key, origin, AllowDuplicates() in rules)
    typed, expected = _converted(hint, value)
    problem = f"must be {expected}" if typed is None else next(filter(None, (r.violation(typed) for r in rules)), None)
    if problem:
        because = "".join(f": {rule.reason}" for rule in rules if isinstance(rule, Because))
        raise UserError(f"{key} {problem}, got {value!r}{because}. {origin.edit(key)}")
    return typed


def _checked_list(hint: Any, values: Any, key: str, origin: ValueSource, repeats: bool = False) -> tuple[Any, ...]:
    """Each value as the schema's type, none of them twice unless it `repeats`, or a UserError."""
    if not isinstance(values, list) or not values:
        raise UserError(f"{key} must be a list of values, such as [0, 1], got {values!r}. {origin.edit(key)}")
    typed = tuple(validate(hint, value, key, origin) for value in values)
    twice = next((value for n, value in enumerate(typed) if value in typed[:n]), None)
    if twice is not None and not repeats:
        raise UserError(f"{key} has {twice!r} twice. Leave one of them out of {origin.of(key)}.")
    return typed


def _checked_patterns(hint: Any, values: dict[Any, Any], key: str, origin: ValueSource) -> dict[str, Any]:
    """Each value as the schema's type, each key a regular expression, or a UserError."""
    for pattern in values:
        if why := problem(pattern) or problem(end_pattern(pattern)) if isinstance(pattern, str) else "it is no text":
            raise UserError(f"{key}: {pattern!r} is no pattern of names: {why}. {origin.edit(key)}")
    return {pattern: validate(hint, value, f"{key}.{pattern}", origin) for pattern, value in values.items()}


def _checked_values(of: GridOf, values: dict[Any, Any], key: str, origin: ValueSource) -> dict[str, tuple[Any, ...]]:
    """Lists of values of a section's keys, each as its schema has it, or a UserError."""
    hints = get_type_hints(of.kind, include_extras=True)
    for name, wanted in values.items():
        if name not in of.keys:
            raise UserError(f"{key}.{name}: {of.rule} {', '.join(of.keys)} alone. {origin.edit(key)}")
        if not isinstance(wanted, list) or not wanted:
            raise UserError(
                f"{key}.{name} must be a list of values, such as [1, 2], got {wanted!r}. {origin.edit(key)}"
            )
    return {
        name: tuple(validate(hints[name], value, f"{key}.{name}", origin) for value in wanted)
        for name, wanted in values.items()
    }


def _converted(hint: Any, value: Any) -> tuple[Any, str]:
    """(the value as `hint`, or None if it is not one; what was expected, in words)."""
    if get_origin(hint) is Literal:
        choices = get_args(hint)
        return (value if value in choices else None), "one of " + ", ".join(choices)
    if get_origin(hint) is tuple and get_args(hint)[0] is not str:  # a list itself is checked value by value
        return None, f"a list, of each of which: {type_name(get_args(hint)[0])}"
    if get_origin(hint) is tuple:
        items = [value] if isinstance(value, str) else value
        good = isinstance(items, list) and items and all(isinstance(i, str) and i for i in items)
        return (tuple(items) if good else None), "a name or a list of names"
    if get_origin(hint) is Mapping and get_origin(get_args(hint)[1]) is tuple:
        return None, "a mapping of keys to lists of values, such as {rank: [1, 2, 4]}"
    if get_origin(hint) is Mapping:  # a mapping itself is checked value by value
        return None, f"a mapping of patterns of names, such as {{q_proj: 8}}, to {type_name(get_args(hint)[1])}"
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
    """A float; `1e-4`, which PyYAML reads as a string, is the number that its writer meant."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
