"""Files of lines: texts, JSON objects, and delimited cells under a header."""

import csv
import io
import json
import re
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, BinaryIO, NamedTuple

from pipeline.data.containers.rows import (
    HTML,
    MAX_LINE_BYTES,
    Reading,
    Row,
    html_error,
    json_error,
    object_row,
    reject_duplicate_keys,
)
from pipeline.errors import UserError

# A cell of a .csv file that holds messages as JSON. Other texts that look like JSON stay texts.
TURNS = re.compile(r'\s*\[\s*\{\s*"(?:role|content)"\s*:')


class Line(NamedTuple):
    """A line that is not blank; `start`: how many bytes of the file come before it."""

    number: int
    start: int
    raw: bytes  # with its end; of a line that is too long only the beginning


def iter_lines(file: BinaryIO, number: int = 0, start: int = 0) -> Iterator[Line]:
    """The lines that are not blank. `number` lines, `start` bytes in all, come before."""
    while raw := read_piece(file):
        number, size = number + 1, len(raw)
        if raw.isspace() and not is_too_long(raw):
            blank, blank_size = skip_blank_lines(file)
            number, size = number + blank, size + blank_size
        else:
            yield Line(number, start, raw)
            size += skip_rest(file, raw)
        start += size


def read_piece(file: BinaryIO) -> bytes:
    """The next line with its end, or the beginning of one that is too long."""
    return file.readline(MAX_LINE_BYTES + 3)  # +2 for \r\n, +1 to detect more


def skip_rest(file: BinaryIO, raw: bytes) -> int:
    """Read to the end of the line that `raw` begins. Returns the number of bytes."""
    size = 0
    while raw and not raw.endswith(b"\n"):
        raw = read_piece(file)
        size += len(raw)
    return size


def skip_blank_lines(file: BinaryIO, blank: bytes | None = None) -> tuple[int, int]:
    """Skip the blank lines that come next, which may be millions. Returns lines and bytes.

    `blank`: the characters that they consist of, by default all white space.
    """
    assert isinstance(file, io.BufferedReader)
    lines = size = 0
    while ahead := file.peek():
        blank_bytes = len(ahead) - len(ahead.lstrip(blank))
        end = ahead.rfind(b"\n", 0, blank_bytes) + 1
        if not end:
            break
        file.read(end)
        lines, size = lines + ahead.count(b"\n", 0, end), size + end
    return lines, size


def is_too_long(raw: bytes) -> bool:
    return len(raw.removesuffix(b"\n").removesuffix(b"\r")) > MAX_LINE_BYTES


def decode_line(raw: bytes, number: int, start: int, name: str) -> str:
    """A line as text; `start`: how many bytes of the file come before it.

    Raises UserError if it is too long, binary or not UTF-8.
    """
    # A long line is refused and not cut: the text behind the cut may change the tokens before it.
    if is_too_long(raw):
        raise UserError(
            f"{name}:{number}: a line must have at most {MAX_LINE_BYTES:,} bytes, got more. "
            "Split its text into several lines."
        )
    try:
        line = raw.decode("utf-8" if start else "utf-8-sig")
    except UnicodeDecodeError as error:
        byte = start + error.start
        raise UserError(
            f"{name}:{number}: not UTF-8 (byte {byte}). Save the file as UTF-8 text."
        ) from None
    if "\0" in line:
        raise UserError(
            f"{name}:{number}: not a text file: byte {start + raw.index(0)} is zero. Save it as "
            "UTF-8 text."
        )
    return line


def _filled_lines(file: BinaryIO, name: str, reading: Reading) -> Iterator[tuple[int, str]]:
    """The numbered lines that are not blank; the blank ones before them are counted."""
    expected = 1
    for number, start, raw in iter_lines(file):
        line = decode_line(raw, number, start, name)
        if line.strip():
            reading.blank += number - expected
            expected = number + 1
            yield number, line


def text_rows(file: BinaryIO, name: str, reading: Reading) -> Iterator[Row]:
    """One text per line. Only a newline ends a line; all other white space belongs to the text."""
    for number, line in _filled_lines(file, name, reading):
        yield row_of_text(number, line)


def row_of_text(number: int, line: str) -> Row:
    # Windows editors end lines with \r\n. A \r anywhere else is part of the text.
    return Row(number, line.removesuffix("\r\n" if line.endswith("\r\n") else "\n"))


def jsonl_rows(file: BinaryIO, name: str, reading: Reading) -> Iterator[Row]:
    """One JSON object per line."""
    for number, line in _filled_lines(file, name, reading):
        try:
            row = row_of_json(number, line, name)
        except UserError as error:
            if HTML.match(line):  # an HTML page: its other lines are no JSON either
                raise
            reading.refuse(number, error)
            continue
        yield row


def row_of_json(number: int, line: str, name: str) -> Row:
    """The row of a line of .jsonl. Raises UserError."""
    try:
        value = json.loads(line.removesuffix("\n"), object_pairs_hook=reject_duplicate_keys)
    except (ValueError, RecursionError) as error:
        advice = "Write one JSON object per line."
        raise json_error(f"{name}:{number}", error, line, advice) from None
    return object_row(number, value, name)


def delimited_rows(file: BinaryIO, name: str, reading: Reading, delimiter: str) -> Iterator[Row]:
    """Rows under a header, each with a text for every column. A cell may hold turns as JSON."""
    number = start = size = 0  # lines that were read, their bytes, and characters of this row

    def lines() -> Iterator[str]:
        nonlocal number, start, size
        while raw := read_piece(file):
            number += 1
            line = decode_line(raw, number, start, name)
            start, size = start + len(raw), size + len(line)
            if size > MAX_LINE_BYTES:  # of a row, whose texts may have many lines
                raise UserError(
                    f"{name}:{number}: a row must have at most {MAX_LINE_BYTES:,} characters, got "
                    "more. Is a quote not closed? Otherwise split its text into several rows."
                )
            yield line

    # holds for the whole process, where nothing else reads csv with long fields
    csv.field_size_limit(MAX_LINE_BYTES)
    reader = csv.reader(lines(), delimiter=delimiter, strict=True)
    header: list[str] = []
    while True:
        first, size = number + 1, 0
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise UserError(
                f"{name}:{first}: {error}. Quote texts that contain quotes, {delimiter!r} or "
                "line breaks."
            ) from None
        if cells is None:
            break
        if not cells:
            blank, blank_size = skip_blank_lines(file, b"\r\n")
            number, start = number + blank, start + blank_size
            reading.blank += 1 + blank
        elif not header:
            header = _read_header(cells, name, first)
        elif len(cells) != len(header):
            ragged = (
                f"{name}:{first}: {len(cells)} values, but the header has {len(header)} columns. "
                f"Quote texts that contain {delimiter!r}, quotes or line breaks."
            )
            reading.refuse(first, UserError(ragged))
        else:
            yield Row(first, dict(zip(header, map(_read_cell, cells), strict=True)))


def _read_header(cells: list[str], name: str, number: int) -> list[str]:
    header = [cell.strip() for cell in cells]
    if HTML.match("".join(header)):
        raise html_error(f"{name}:{number}")
    if not all(header) or len(set(header)) < len(header):
        raise UserError(
            f"{name}:{number}: the first line must name every column, each name once, got "
            f"{', '.join(map(repr, header))[:200]}."
        )
    return header


def _read_cell(cell: str) -> Any:
    if TURNS.match(cell):
        with suppress(ValueError, RecursionError):
            return json.loads(cell)
    return cell
