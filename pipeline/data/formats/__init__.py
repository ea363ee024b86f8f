"""Data files as examples, row by row in constant memory, and the shapes that a row may have.

Each shape is one file here with its `FORMAT`; they are asked in their order. Every problem is a
UserError with file and line or row.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.data.columns import rename, some
from pipeline.data.containers import MAX_LINE_BYTES, Reading, Row, describe_type, read_rows
from pipeline.data.examples import Example
from pipeline.errors import UserError
from pipeline.extensions import Registry

Note = Callable[[str], None]
Record = Mapping[str, Any]  # the keys and values of a row
SIMILAR = 0.85  # of a key to one that is missing: "compleation", but not "prompt_id"
MAX_UNUSED = 1000  # keys that are counted


class EmptyValue(UserError):
    """A text or a list without content where there must be some."""


class Format(NamedTuple):
    """`shape`: its keys, for messages. `keys`: all that it reads. `detect`: whether a record is of
    this format.

    `read(record, file, line)`: the example. Raises UserError with the line and the reason. `mixes`:
    a file may have this format in some of its rows and another in others. `trained`: what of it is
    trained on.
    """

    order: int
    shape: str
    keys: frozenset[str]
    detect: Callable[[Record], bool]
    read: Callable[[Record, str, int], Example]
    mixes: bool = False
    trained: str = "the assistant's turns"

    @property
    def name(self) -> str:
        """That of its file."""
        return self.read.__module__.rpartition(".")[2]


def read_examples(
    path: Path,
    name: str,
    prompts: bool = False,
    columns: Mapping[str, str] | None = None,
    on_note: Note | None = None,
    templated: bool = True,
) -> list[Example]:
    """All of `iter_examples`."""
    return list(iter_examples(path, name, prompts, columns, on_note, templated=templated))


def iter_examples(
    path: Path,
    name: str,
    prompts: bool = False,
    columns: Mapping[str, str] | None = None,
    on_note: Note | None = None,
    reading: Reading | None = None,
    templated: bool = True,
) -> Iterator[Example]:
    """The examples of a file or folder, in constant memory. `name` is the path as the user wrote
    it.

    With `prompts`, a row may also be {"prompt"} alone, for the model itself to complete. `columns`:
    key of a format → the file's name for it. `on_note` gets, at the end, what was skipped or not
    used; `reading` counts it. `templated`: whether a plain prompt and its answer are turns where
    the base has a chat template. Raises UserError with the file, the line or row, and the reason.
    """
    columns, reading = columns or {}, reading or Reading()
    first: tuple[Format, int] | None = None  # of the file's rows that are no text lines
    for number, value in read_rows(path, name, reading):
        if isinstance(value, str):
            if columns:
                raise UserError(f"{name}: columns are set, but a .txt file has none. Remove them.")
            reading.format = "text"
            yield Example(value, name, number)
            continue
        try:
            record, extra_of_turns = rename(
                value, columns, f"{name}:{number}", is_first=first is None
            )
            each = _detect(record, columns, f"{name}:{number}")
            _count_unused(reading, extra_of_turns)
            if extra := record.keys() - each.keys:
                _refuse_similar(extra, each.keys - record.keys(), f"{name}:{number}")
                _count_unused(reading, extra)
            first = first or (each, number)
            if each is not first[0] and not (each.mixes and first[0].mixes):
                raise UserError(
                    f"{name}:{number}: this row is {each.shape}, but {name}:{first[1]} is "
                    f"{first[0].shape}. Put them "
                    "into two files."
                )
            example = _read(each, record, name, number, templated)
            if example.prompt == example.text and not prompts:
                raise UserError(
                    f'{example.location}: "prompt" needs a "completion". Add one, or use {{"text": …}} to train on '
                    "the whole line. Only finetune_lora.retention_data takes prompts alone: the "
                    "base model completes "
                    "them."
                )
        except UserError as error:
            reading.refuse(number, error)
            continue
        reading.format = each.name
        yield example
    if on_note:
        for note in notes(name, reading):
            on_note(note)


def _count_unused(reading: Reading, keys: Set[str]) -> None:
    # A file in which every row has other keys is not worth the memory of them all.
    reading.unused.update(
        sorted(keys) if len(reading.unused) < MAX_UNUSED else keys & reading.unused.keys()
    )


def _read(each: Format, record: Record, name: str, number: int, templated: bool) -> Example:
    example = each.read(record, name, number)
    # Of a pair without a prompt nobody knows where a user's turn would end; a prompt alone is to be
    # continued.
    plain = (
        isinstance(record.get("prompt"), str)
        and not example.messages
        and example.prompt != example.text
    )
    return replace(example, templated=True) if templated and plain else example


def example_of(
    row: Row, name: str, columns: Mapping[str, str] | None = None, templated: bool = True
) -> Example:
    """The example of one row, by itself; its prompt may stand alone. Raises UserError, as
    `iter_examples`.

    Whether rows of its format may stand beside the file's others only a reading of the whole file
    knows.
    """
    if isinstance(row.value, str):
        return Example(row.value, name, row.number)
    location = f"{name}:{row.number}"
    record, _ = rename(row.value, columns or {}, location, is_first=False)
    each = _detect(record, columns or {}, location)
    _refuse_similar(record.keys() - each.keys, each.keys - record.keys(), location)
    return _read(each, record, name, row.number, templated)


def notes(name: str, reading: Reading) -> Iterator[str]:
    """What was skipped or not used in a file."""
    if reading.blank:
        yield f"{name}: {reading.blank:,} blank {'line' if reading.blank == 1 else 'lines'} skipped"
    if reading.unused:
        counts = [
            f"{key} ({n:,} {'row' if n == 1 else 'rows'})"
            for key, n in reading.unused.most_common()
        ]
        yield f"{name}: not used: {some(counts)}"


def _detect(record: Record, columns: Mapping[str, str], location: str) -> Format:
    """The format of a record: of the keys that the user named, otherwise of all."""
    for part in ([{key: record[key] for key in columns if key in record}] if columns else []) + [
        record
    ]:
        for each in FORMATS.values():
            if each.detect(part):
                return each
    known = {key for each in FORMATS.values() for key in each.keys}
    _refuse_similar(record.keys() - known, known - record.keys(), location)
    *others, last = (form.shape for form in FORMATS.values())
    shapes = f"{', '.join(others)} or {last}"
    raise UserError(
        f"{location}: the keys must be {shapes}, got {some(map(repr, record)) or 'none'}. Rename "
        "them, or say which "
        "is which in columns, such as --columns prompt=question,completion=answer or "
        "messages=dialog."
    )


def _refuse_similar(keys: Set[str], missing: Set[str], location: str) -> None:
    """Raises UserError if one of `keys` is nearly one that is missing."""
    for key in sorted(keys, key=str):
        if close := get_close_matches(str(key)[:60].lower(), [*missing], 1, SIMILAR):
            raise UserError(
                f"{location}: unknown key {key!r}. Did you mean {close[0]!r}? Rename it."
            )


def read_string(record: Record, key: str, location: str) -> str:
    """A text that is not empty. Raises UserError."""
    value = record.get(key)
    if not isinstance(value, str):
        kind = EmptyValue if value is None else UserError
        raise kind(f"{location}: {key} must be a string, got {describe_type(value)}.")
    if not value.strip():
        raise EmptyValue(f"{location}: {key} is empty. Fill it in, or remove the line.")
    if len(value) > MAX_LINE_BYTES:  # in a table: lines of text were measured as they were read
        raise UserError(
            f"{location}: {key} must have at most {MAX_LINE_BYTES:,} characters. Split its text."
        )
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UserError(
            f"{location}: {key} contains an unpaired surrogate, which is not a character. Remove "
            "it."
        ) from None
    return value


def read_optional(record: Record, key: str, location: str) -> str:
    """A text; "" if it is missing, null or blank. Raises UserError."""
    value = record.get(key)
    blank = value is None or (isinstance(value, str) and not value.strip())
    return "" if blank else read_string(record, key, location)


def read_list(record: Record, key: str, location: str, of: str = "") -> list[Any]:
    """A list, which may be written as JSON in a text; [] if it is missing or null, unless it must
    be a list `of` something. Raises UserError.
    """
    value = record.get(key)
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            value = record[key]
    if isinstance(value, list) and (value or not of):
        return value
    if value in (None, "") and not of:
        return []
    kind = EmptyValue if value in (None, "", []) else UserError
    raise kind(f"{location}: {key} must be a list{of and f' of {of}'}, got {describe_type(value)}.")


def refuse_unknown(entry: Record, known: Sequence[str], location: str) -> None:
    """Raises UserError for a key that is not `known`."""
    if unknown := [key for key in entry if key not in known]:
        _refuse_similar(set(unknown), set(known), location)
        raise UserError(f"{location}: unknown key {unknown[0]!r:.80}. Known: {', '.join(known)}.")


FORMATS = Registry[Format]("data_format", order=lambda form: form.order)
