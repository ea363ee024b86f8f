"""A record of a data file: one JSON object, its fields checked. Every problem is a UserError with file and line."""

import json
from collections.abc import Mapping
from typing import Any

from pipeline.errors import UserError

Record = Mapping[str, Any]


def parse_record(line: str, location: str, shapes: str) -> Record:
    """The JSON object in `line`; `shapes` are the keys that it may have, for the message."""
    try:
        record = json.loads(line, object_pairs_hook=_reject_duplicate_keys)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{location}: not JSON: {error.msg} at column {error.colno}. Write one JSON object per line."
        ) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{location}: not JSON: {str(error)[:200]}. Write one JSON object per line.") from None
    if not isinstance(record, dict):
        raise UserError(f"{location}: must be a JSON object, {shapes}, got {describe_type(record)}.")
    return record


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
