"""A JSON list of objects, decoded one by one in little more memory than one of them takes.

Written by hand: `ijson` (3.6, yajl) takes quadratic time and memory on hostile files, 970 MiB for
20 kB of "[", 274 s for a text of 300 MiB without an end. Both take 2 ms here. On honest files it is
as fast as this. It also reads "\\ud800" as "?", keeps the last of two equal keys, and rejects a
byte-order mark.
"""

import json
import re
from codecs import getincrementaldecoder
from collections.abc import Iterator
from typing import Any, BinaryIO

from pipeline.data.containers.rows import (
    CHUNK,
    MAX_LINE_BYTES,
    Reading,
    Row,
    json_error,
    object_row,
    reject_duplicate_keys,
)
from pipeline.errors import UserError

# a list cannot be split between processes or read from its middle: larger data has other forms
MAX_JSON_BYTES = 2**30
SPACE = re.compile(r"[ \t\r\n]*")


def json_rows(file: BinaryIO, name: str, reading: Reading) -> Iterator[Row]:
    """The objects of the list, numbered from 1."""
    text = _TextBuffer(file, name)
    if not text.peek():
        return
    if text.peek() != "[":
        advice = "Write the objects as a list, or one per line in a .jsonl file."
        if text.peek() == "{":
            raise UserError(
                f"{name}: a .json file must hold a list of objects, got one object. {advice}"
            )
        raise json_error(name, ValueError("it does not begin with ["), text.data, advice)
    text.position += 1
    number = 0
    ended = text.peek() == "]"
    if ended:
        text.position += 1
    while not ended:
        number += 1
        value = text.decode_value(number)
        mark = text.peek()
        if mark not in (",", "]"):
            got = repr(mark) if mark else "the end of the file"
            raise UserError(
                f"{name}: row {number} must be followed by a comma or ], got {got}. Is the file "
                "complete?"
            )
        text.position += 1
        ended = mark == "]"
        try:
            row = object_row(number, value, name)
        except UserError as error:
            reading.refuse(number, error)
            continue
        yield row
    if rest := text.peek():
        raise UserError(
            f"{name}: {rest!r} after the end of the list. A .json file must hold one list."
        )


class _TextBuffer:
    """UTF-8 text that is read as it is needed; what lies before `position` is dropped."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        self.data, self.position = "", 0
        self._file, self._name, self._bytes = file, name, 0
        self._decode = getincrementaldecoder("utf-8-sig")().decode
        self._scan = json.JSONDecoder(object_pairs_hook=reject_duplicate_keys).raw_decode

    def peek(self) -> str:
        """The next character that is not white space; "" at the end."""
        while True:
            if match := SPACE.match(self.data, self.position):
                self.position = match.end()
            if self.position < len(self.data):
                return self.data[self.position]
            if not self._read_more():
                return ""

    def decode_value(self, number: int) -> Any:
        """The JSON value that comes next, of row `number`. Raises UserError."""
        self.peek()  # skips white space
        where = f"{self._name}: row {number}"
        while True:
            try:
                value, self.position = self._scan(self.data, self.position)
                return value
            except (ValueError, RecursionError) as error:
                # a JSONDecodeError may mean half an object: decide when there is no more to read
                if not isinstance(error, json.JSONDecodeError) or not self._read_more():
                    raise json_error(where, error, "", "Write a list of JSON objects.") from None
            if len(self.data) - self.position > MAX_LINE_BYTES + CHUNK:
                raise UserError(
                    f"{where}: not JSON, or more than {MAX_LINE_BYTES:,} characters. Split its "
                    "text into several rows."
                )

    def _read_more(self) -> bool:
        """Append a piece as long as what is left, to scan a long object few times.

        Up to the longest row, which is scanned before it is refused. False at the end.
        """
        left = len(self.data) - self.position
        raw = self._file.read(max(CHUNK, min(left, MAX_LINE_BYTES + CHUNK - left)))
        self._bytes += len(raw)
        if self._bytes > MAX_JSON_BYTES:
            raise too_large(self._name)
        try:
            self.data = self.data[self.position :] + self._decode(raw, not raw)
        except UnicodeDecodeError as error:
            byte = self._bytes - len(raw) + error.start
            raise UserError(
                f"{self._name}: not UTF-8 (near byte {byte}). Save the file as UTF-8 text."
            ) from None
        self.position = 0
        return bool(raw)


def too_large(name: str) -> UserError:
    return UserError(
        f"{name}: a .json file must have at most {MAX_JSON_BYTES // 2**30} GiB. Save it as .jsonl "
        "or .parquet instead."
    )
