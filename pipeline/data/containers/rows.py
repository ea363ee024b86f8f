"""What every container gives: numbered rows, and one error for each that is bad."""

import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from pipeline.errors import UserError

MAX_LINE_BYTES = 2**20  # a tokenizer needs up to about 350 bytes of memory per byte of text
CHUNK = 2**16
HTML = re.compile(r"\s*<(?:!doctype html|html|head|body)\b", flags=re.IGNORECASE)


class Row(NamedTuple):
    """A row of a data file: the text of a line of .txt, or keys and values.

    `number` is the line where it begins; in a .json list and in a table the number of the row, from
    1.
    """

    number: int
    value: str | dict[str, Any]


def _raise(row: int, error: UserError) -> None:  # noqa: ARG001
    raise error


@dataclass
class Reading:
    """What a reading counts, and what it does about a bad row.

    `on_error(row, error)`: if it does not raise, the row is skipped. What makes the rest of a file
    unreadable is raised all the same.
    """

    on_error: Callable[[int, UserError], None] = _raise
    refused: int = 0  # rows
    blank: int = 0  # lines that were skipped
    format: str = ""  # of the last row
    unused: Counter[str] = field(default_factory=Counter)  # key that no format reads → rows

    def refuse(self, row: int, error: UserError) -> None:
        self.refused += 1
        self.on_error(row, error)


def row_of_error(error: UserError, name: str) -> int | None:
    """The row or line that the message of an error about the file `name` begins with."""
    match = re.match(rf"{re.escape(name)}:(?: row )?(\d+):", str(error))
    return int(match[1]) if match else None


def describe_type(value: Any) -> str:
    """The JSON type of a value; null, true, false, [] and {} as they are."""
    if value is None or isinstance(value, bool) or value in ([], {}):
        return json.dumps(value)
    names = {dict: "an object", list: "a list", str: "a string", int: "a number", float: "a number"}
    return names.get(type(value), f"a value of type {type(value).__name__}")


def object_row(number: int, value: Any, name: str) -> Row:
    """The row of a JSON value. Raises UserError for another value than an object."""
    if not isinstance(value, dict):
        raise UserError(
            f'{name}:{number}: must be a JSON object, such as {{"text": …}} or '
            f'{{"messages": […]}}, got {describe_type(value)}.'
        )
    return Row(number, value)


def reject_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The pairs as an object, for json's `object_pairs_hook`. Raises ValueError."""
    record = dict(pairs)
    if len(record) < len(pairs):
        raise ValueError("duplicate key")
    return record


def html_error(location: str) -> UserError:
    return UserError(f"{location}: this is an HTML page, not data. Download the file itself.")


def json_error(location: str, error: Exception, text: str, advice: str) -> UserError:
    """Why `text` could not be decoded."""
    if HTML.match(text):
        return html_error(location)
    reason = str(error)[:200]
    if isinstance(error, json.JSONDecodeError):
        reason = f"{error.msg} at column {error.colno}"
    return UserError(f"{location}: not JSON: {reason}. {advice}")
