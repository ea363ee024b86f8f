"""What a value of params.yaml may be: sections as msgspec structs, rules, errors for wrong values.

A field is declared once, with its type, its rules and its meaning:

    rank: Annotated[Count, "rank of the update: A is (rank, inputs), B is (outputs, rank)"] = 4

Errors, forms, `lora params` and the reference all read that declaration.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from operator import ge, gt, le, lt
from types import MappingProxyType
from typing import (
    Annotated,
    Any,
    ClassVar,
    Literal,
    NamedTuple,
    Self,
    get_args,
    get_origin,
    get_type_hints,
)

import msgspec
from msgspec import Meta

from pipeline.errors import UserError
from pipeline.files.patterns import end_pattern, problem


class Pretrained(NamedTuple):
    """An imported base, as far as defaults depend on it."""

    width: int | None = None  # of its hidden states; None where it is not known


class Section(msgspec.Struct, frozen=True, kw_only=True):
    """A section of params.yaml: one stage's settings, all with defaults.

    The declared defaults are those of MiniGPT.
    """

    # key → its default on a pretrained base, where that is another
    PRETRAINED: ClassVar[Mapping[str, Any]] = {}

    @classmethod
    def pretrained(cls, base: Pretrained, given: Mapping[str, Any]) -> dict[str, Any]:  # noqa: ARG003 (some need them)
        """The defaults on this base that are not the declared ones; `given`: the set keys."""
        return dict(cls.PRETRAINED)

    @classmethod
    def defaults(
        cls, base: Pretrained | None, given: Mapping[str, Any] = MappingProxyType({})
    ) -> Self:
        """The section with the `given` keys, and its defaults on this base; None: MiniGPT."""
        defaults = cls.pretrained(base, given) if base else {}
        return cls(**{**defaults, **given})


class Because(NamedTuple):
    """The reason why no other value is allowed, for the error text."""

    reason: str


class ReadBy(NamedTuple):
    """A field that is read by a function of its own."""

    # (value, key, origin) → typed value; None, or a UserError, for one that breaks the rule
    read: Callable[[Any, str, "ValueSource"], Any]
    rule: str  # a description of the valid values


ALLOW_EMPTY = object()  # a text, list or mapping that may be empty
ALLOW_DUPLICATES = object()  # a list that may have a value twice, such as the numbers of a matrix
LARGEST = 1e30  # of a float, so that products stay finite in fp32
# No larger count could run, and some overflow inside a library; torch takes seeds of 63 bits.
Count = Annotated[int, Meta(ge=1, lt=2**31)]
Steps = Annotated[int, Meta(ge=0, lt=2**31)]
Seed = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Rate = Annotated[float, Meta(gt=0)]
Weight = Annotated[float, Meta(ge=0)]
Share = Annotated[float, Meta(ge=0, lt=1)]
File = Annotated[str, ALLOW_EMPTY]
Names = Annotated[tuple[str, ...], ALLOW_EMPTY]


class ValueSource(NamedTuple):
    """Where values come from: `file`, or `--set` for the keys and sections in `overridden`."""

    file: str
    overridden: frozenset[str] = frozenset()

    def edit(self, key: str) -> str:
        """The next step for a wrong value of `key`."""
        return "Change it in --set." if self.of(key) == "--set" else f"Edit {self.file}."

    def of(self, key: str) -> str:
        """Where `key` is set: "--set" or the file.

        `key`: section, section.key, or a key deeper in a mapping or list, such as
        section.key[0].path.
        """
        section_key = ".".join(key.split(".")[:2])
        without_index = section_key.partition("[")[0]
        return "--set" if {section_key, without_index} & self.overridden else self.file


@cache
def hints(kind: type[Section]) -> Mapping[str, Any]:
    """Field → its annotated type, in the order of declaration."""
    types = get_type_hints(kind, include_extras=True)
    return {name: types[name] for name in kind.__struct_fields__}


def value_type(kind: type[Section], key: str) -> Any:
    """The type of a field's value, without its rules: int, tuple[str, ...], Literal["a", "b"], …"""
    return _split(hints(kind)[key])[0]


def meaning(kind: type[Section], key: str) -> str:
    """What a field is for, as its declaration says; empty if it says nothing."""
    _, notes = _split(hints(kind)[key])
    texts = [note for note in notes if isinstance(note, str)]
    return texts[-1] if texts else ""


def rule(kind: type[Section], key: str) -> str:
    """A description of a field's valid values, such as "a whole number, at least 1"."""
    return _describe(hints(kind)[key])


def reject_unknown_keys(
    tree: Mapping[str, Any], known: Sequence[str], prefix: str, origin: ValueSource
) -> None:
    """Raises UserError for a key of `tree` that is not `known`, and says which one is meant."""
    key = next((str(key) for key in tree if key not in known), None)
    if key is None:
        return
    from pipeline.project.params.aliases import KEYS, suggest, why_none  # only for the message

    path = f"{prefix}{key}"
    where = origin.of(path)
    if why := why_none(key):
        raise UserError(f"{where}: there is no key {path}: {why}. Remove it.")
    meant = suggest(key, known, KEYS, prefix.rstrip("."))
    hint = f"Did you mean {meant}?" if meant else f"Known: {', '.join(known) or 'none'}."
    raise UserError(f"{where}: unknown key {path}. {hint}")


def duplicate(values: Sequence[Any]) -> Any:
    """The first value that is equal to one before it; None if there is none."""
    return next((value for n, value in enumerate(values) if value in values[:n]), None)


def check_value(hint: Any, value: Any, key: str, origin: ValueSource) -> Any:
    """`value`, as YAML loads it, as the annotated type. Raises UserError."""
    kind, notes = _split(hint)
    container = get_origin(kind)
    if (text := _unwritable(value)) is not None:
        raise UserError(
            f"{key} must not have a NUL or half a surrogate pair in a text, got {text!r}. "
            f"{origin.edit(key)}"
        )
    if value in (None, "", [], {}) and ALLOW_EMPTY in notes:
        return {tuple: (), Mapping: {}}.get(container, "")

    reader = next((note for note in notes if isinstance(note, ReadBy)), None)
    typed: Any
    if reader:
        typed = reader.read(value, key, origin)
    elif container is tuple and get_args(kind)[0] is not str:
        typed = _check_list(get_args(kind)[0], value, key, origin, ALLOW_DUPLICATES in notes)
    elif container is Mapping and isinstance(value, dict):
        typed = _check_mapping(get_args(kind)[1], value, key, origin)
    else:
        typed = _convert(kind, value)

    if typed is None:
        broken = [reader.rule if reader else _type_name(kind, value)]
    else:
        bounds = _bounds(notes)
        broken = [f"{words} {limit}" for words, holds, limit in bounds if not holds(typed, limit)]
    if not broken:
        return typed
    rule, because = broken[0], [f": {note.reason}" for note in notes if isinstance(note, Because)]
    raise UserError(f"{key} must be {rule}, got {value!r}{''.join(because)}. {origin.edit(key)}")


def _unwritable(value: Any) -> str | None:
    """A text in a value that no file can have as its name or a line: with a NUL, or not UTF-8."""
    if isinstance(value, str):
        return value if "\0" in value or value.encode(errors="replace").decode() != value else None
    parts = [*value, *value.values()] if isinstance(value, dict) else value
    if not isinstance(parts, list):
        return None
    return next((text for text in map(_unwritable, parts) if text is not None), None)


def _check_list(
    item: Any, values: Any, key: str, origin: ValueSource, duplicates: bool
) -> tuple[Any, ...]:
    if not isinstance(values, list) or not values:
        raise UserError(
            f"{key} must be a list of values, such as [1, 2], got {values!r}. {origin.edit(key)}"
        )
    typed = tuple(check_value(item, value, key, origin) for value in values)
    twice = duplicate(typed)
    if twice is not None and not duplicates:
        raise UserError(f"{key} has {twice!r} twice. Remove one of them from {origin.of(key)}.")
    return typed


def _check_mapping(
    item: Any, values: dict[Any, Any], key: str, origin: ValueSource
) -> dict[str, Any]:
    """A mapping of regular expressions to values."""
    for pattern in values:
        why: str | None = "it is not a text"
        if isinstance(pattern, str):
            why = problem(pattern) or problem(end_pattern(pattern))
        if why:
            raise UserError(
                f"{key}: {pattern!r} is not a regular expression for module names: {why}. "
                f"{origin.edit(key)}"
            )
    return {
        pattern: check_value(item, value, f"{key}.{pattern}", origin)
        for pattern, value in values.items()
    }


def _convert(kind: Any, value: Any) -> Any:
    """The value as `kind`, or None. PyYAML reads 1e-4 as a text; a name is a list of one."""
    if kind is float:
        try:
            value = float(value) if isinstance(value, str) else value
        except ValueError:
            return None
        if isinstance(value, int | float) and not abs(value) <= LARGEST:  # also nan
            return None
    if get_origin(kind) is tuple and isinstance(value, str):
        value = [value]
    try:
        typed = msgspec.convert(value, kind)
    except msgspec.ValidationError:
        return None
    empty = typed in ("", ()) or (isinstance(typed, tuple) and "" in typed)
    return None if empty else typed


def _bounds(notes: Sequence[Any]) -> list[tuple[str, Callable[[Any, Any], bool], float]]:
    """A field's bounds: words, comparison, limit. msgspec's own error has neither key nor value."""
    bounds: list[tuple[str, Callable[[Any, Any], bool], float | None]] = []
    for note in notes:
        if isinstance(note, Meta):
            bounds += [("at least", ge, note.ge), ("more than", gt, note.gt)]
            bounds += [("at most", le, note.le), ("below", lt, note.lt)]
    return [(words, holds, limit) for words, holds, limit in bounds if limit is not None]


def _describe(hint: Any) -> str:
    kind, notes = _split(hint)
    rules = [note.rule for note in notes if isinstance(note, ReadBy)] or [_type_name(kind)]
    rules += [f"{words} {limit}" for words, _, limit in _bounds(notes)]
    if ALLOW_EMPTY in notes:
        rules.append("or empty")
    return ", ".join(rules)


def _split(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """The type without its annotation, and the annotated notes."""
    if get_origin(hint) is not Annotated:
        return hint, ()
    kind, *notes = get_args(hint)
    return kind, tuple(notes)


def _type_name(kind: Any, value: Any = 0) -> str:
    """A description of the values of a type; `value`: the one that is not among them."""
    container, arguments = get_origin(kind), get_args(kind)
    if container is Literal:
        return "one of " + ", ".join(arguments)
    if container is tuple and arguments[0] is str:
        return "a name or a list of names"
    if container is tuple:
        return f"a list, each value {_describe(arguments[0])}"
    if container is Mapping:
        item = _describe(arguments[1])
        return f"a mapping of patterns of module names, such as {{q_proj: 8}}, to {item}"
    if kind is float:
        with suppress(TypeError, ValueError, OverflowError):
            if LARGEST < abs(float(value)) < math.inf:
                return f"at most {LARGEST:g} in size"
    names = {bool: "true or false", int: "a whole number", float: "a finite number"}
    return names.get(kind, "a text")
