"""The shapes that a line of a .jsonl file may have: one file each, found here and asked in their order.

A format's file has `FORMAT`; an example names the line of the file that it was read from. Every problem is a UserError
with file and line.
"""

import json
import pkgutil
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, NamedTuple

from pipeline.data.examples import Example
from pipeline.errors import UserError

Record = Mapping[str, Any]  # the JSON object of a line


class Format(NamedTuple):
    """`shape`: its keys, for messages. `detect`: whether a record is of this format, by its keys alone.

    `read(record, file, line)`: the example. Raises UserError with the line and the reason.
    """

    order: int
    shape: str
    detect: Callable[[Record], bool]
    read: Callable[[Record, str, int], Example]


def read_line(line: str, file: str, number: int) -> Example:
    """The example in a line of JSON. Raises UserError with the file, the line and the reason."""
    location, shapes = f"{file}:{number}", " or ".join([", ".join(SHAPES[:-1]), SHAPES[-1]])
    try:
        record = json.loads(line, object_pairs_hook=_reject_duplicate_keys)
    except (ValueError, RecursionError) as error:
        reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)[:200]
        raise UserError(f"{location}: not JSON: {reason}. Write one JSON object per line.") from None
    if not isinstance(record, dict):
        raise UserError(f"{location}: must be a JSON object, {shapes}, got {describe_type(record)}.")
    for each in FORMATS:
        if each.detect(record):
            return each.read(record, file, number)
    raise UserError(f"{location}: the keys must be {shapes}, got {', '.join(map(repr, record)) or 'none'}.")


def _reject_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        raise ValueError("duplicate key")
    return record


def read_string(record: Record, key: str, location: str) -> str:
    value = record[key]
    if not isinstance(value, str):
        raise UserError(f"{location}: {key} must be a string, got {describe_type(value)}.")
    if not value.strip():
        raise UserError(f"{location}: {key} is empty. Fill it in, or remove the line.")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UserError(
            f"{location}: {key} contains an unpaired surrogate, which is not a character. Remove it."
        ) from None
    return value


def describe_type(value: Any) -> str:
    """The JSON type of a value; null, true, false, [] and {} as they are."""
    if value is None or isinstance(value, bool) or value in ([], {}):
        return json.dumps(value)
    names = {dict: "an object", list: "a list", str: "a string", int: "a number", float: "a number"}
    return names[type(value)]


FORMATS: tuple[Format, ...] = tuple(  # last, as the modules import the names above
    sorted(
        (import_module(f"{__name__}.{module.name}").FORMAT for module in pkgutil.iter_modules(__path__)),
        key=lambda each: each.order,
    )
)
SHAPES = [each.shape for each in FORMATS]
