"""Columns: what a file calls the keys of a format, the keys of its turns, and the roles in them.

`{messages: dialog, role: speaker, content: text, user: customer}` reads `{"dialog": [{"speaker":
"customer", "text": …}]}`. A column may be a path (`data.dialog`, `answers.0.text`), and a role may
have several names (`user: customer|client`).
"""

import json
from collections.abc import Mapping
from difflib import get_close_matches
from shlex import quote
from typing import Any, NamedTuple, get_args

from pipeline.data.examples import Role
from pipeline.errors import UserError

MAX_SHOWN = 8  # keys in a message
# keys that may hold turns
LISTS = ("messages", "conversations", "prompt", "completion", "chosen", "rejected")
KEYS = (*LISTS, "text", "instruction", "input", "output")
TURN_KEYS = {
    "role",
    "content",
    "from",
    "value",
    "tool_calls",
    "reasoning_content",
    "tool_call_id",
    "name",
    "train",
    "training",
    "weight",
}
ABOUT_TURNS = {*TURN_KEYS, "messages", "conversations", "user", "assistant"}
MISSING = object()


class _Names(NamedTuple):
    """What a file calls a format's keys and roles."""

    keys: dict[str, str]  # key of a row → column
    turn_keys: dict[str, str]  # key of a turn → column
    roles: dict[str, str]  # name, in lower case → role


def columns_option(columns: Mapping[str, str]) -> str:
    """The option for these columns, to repeat in a command that is suggested; empty without any."""
    text = ",".join(f"{key}={column}" for key, column in columns.items())
    return f" --columns {quote(text)}" if text else ""


def clean_command(name: str, columns: Mapping[str, str]) -> str:
    """The command that writes the file without rows that spoil a training."""
    return f"lora data clean {quote(name)} OUT{columns_option(columns)}"


def rename(
    record: dict[str, Any], columns: Mapping[str, str], location: str, is_first: bool
) -> tuple[dict[str, Any], set[str]]:
    """The record with the keys and roles of a format, and the keys of turns that are not used.

    In later rows, a column may be missing where its key is optional. Raises UserError.
    """
    if not columns:
        return record, set()
    names = _names(columns)
    renamed = _rename_keys(record, names.keys)
    if is_first:
        _refuse_absent(record, names.keys, location)
    unused = set[str]()
    if names.turn_keys or names.roles:
        for key in LISTS:
            if key in renamed:
                renamed[key] = _rename_turns(renamed[key], names, key, unused)
    return renamed, unused


def _rename_keys(record: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """The record with the values of the columns under their keys."""
    used = {column if column in record else column.partition(".")[0] for column in columns.values()}
    renamed = {key: value for key, value in record.items() if key not in used}
    for key, column in columns.items():
        value = _look_up(record, column)
        if value is not MISSING:
            renamed[key] = value
    return renamed


def _names(columns: Mapping[str, str]) -> _Names:
    # `system` is a key of Alpaca's rows; where another column is about turns, it is a role
    is_about_turns = not ABOUT_TURNS.isdisjoint(columns)
    names = _Names({}, {}, {})
    for key, column in columns.items():
        if key in TURN_KEYS:
            names.turn_keys[key] = column
        elif key in get_args(Role) and (key != "system" or is_about_turns):
            for name in column.split("|"):
                names.roles[name.strip().casefold()] = key
        else:
            names.keys[key] = column
    return names


def _refuse_absent(record: Mapping[str, Any], keys: Mapping[str, str], location: str) -> None:
    absent = [key for key, column in keys.items() if _look_up(record, column) is MISSING]
    if not absent:
        return
    first = absent[0]
    close = get_close_matches(keys[first], [*record], 1)
    hint = f"Did you mean {close[0]}? " if close else ""
    if first in record and keys[first] in KEYS:  # said the other way round
        hint = f"A key comes first, its column second: {keys[first]}={first}. "
    missing = ", ".join(keys[key] for key in absent)
    raise UserError(
        f"{location}: no column {missing}, which columns names. {hint}It has: {some(record)}. "
        "Edit columns."
    )


def _look_up(record: Mapping[str, Any], column: str) -> Any:
    """The value of a key, or at the end of a path of keys and numbers."""
    if column in record or "." not in column:
        return record.get(column, MISSING)
    value: Any = record
    for part in column.split("."):
        if isinstance(value, dict):
            value = value.get(part, MISSING)
        elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            return MISSING
    return value


def _rename_turns(value: Any, names: _Names, key: str, unused: set[str]) -> Any:
    turns = value
    # a cell of a table may hold turns as JSON
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            turns = json.loads(value)
        except (ValueError, RecursionError):
            return value
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        return value
    return [_rename_turn(turn, names, key, unused) for turn in turns]


def _rename_turn(
    turn: Mapping[str, Any], names: _Names, list_key: str, unused: set[str]
) -> dict[str, Any]:
    renamed = _rename_keys(turn, names.turn_keys)
    if names.turn_keys:  # naming keys of turns drops all others
        unused |= {f"{list_key}.{key}" for key in renamed if key not in TURN_KEYS}
        renamed = {key: value for key, value in renamed.items() if key in TURN_KEYS}
    for key in ("role", "from"):
        if isinstance(speaker := renamed.get(key), str):
            renamed[key] = names.roles.get(speaker.strip().casefold(), speaker)
    return renamed


def some(keys: Any) -> str:
    """A list of names that may be long, for a message."""
    names = [str(key)[:60] for key in keys]
    if len(names) > MAX_SHOWN:
        names[MAX_SHOWN:] = [f"and {len(names) - MAX_SHOWN} more"]
    return ", ".join(names)


def parse_columns(text: str) -> dict[str, str]:
    """`prompt=question, completion=answer` as key of a format → name in the file; empty for an empty
    text. Raises UserError.
    """
    pairs = [part.partition("=") for part in text.split(",")] if text.strip() else []
    columns = {key.strip(): column.strip() for key, _, column in pairs}
    if not all(columns) or not all(columns.values()) or len(columns) < len(pairs):
        raise UserError(
            f"{text!r} must be KEY=COLUMN,…, each key once, such as "
            "prompt=question,completion=answer."
        )
    return columns
