"""Rows of a data file by their position.

Nothing is read that is not asked for: a file of lines is entered at a byte, a table at a row group;
what can only be read from its beginning (compressed, .json, .csv, a saved folder) is read on from
the last row that was asked for.
"""

import json
import sys
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

from pipeline.data.containers import TABLES, Reading, Row, read_rows, suffix_of
from pipeline.data.containers.lines import (
    decode_line,
    is_too_long,
    iter_lines,
    read_piece,
    row_of_json,
    row_of_text,
    skip_blank_lines,
    skip_rest,
)
from pipeline.data.containers.rows import row_of_error
from pipeline.data.containers.tables import count_rows
from pipeline.errors import UserError
from pipeline.files.problems import without_location

LINES = (".txt", ".jsonl")
STEP = 64  # the index keeps the place of every STEP-th row
LONGEST = 2**17  # characters that are kept of a line that cannot be read
ESCAPED = {*"\"'\\/<>&+`"}  # ASCII characters that some writers of JSON escape
Stopped = Callable[[], bool]


class Entry(NamedTuple):
    """A row, or why it cannot be read. `raw`: the text of such a line, as far as it goes."""

    row: Row
    problem: str = ""
    raw: str = ""


UNREAD = Entry(Row(0, ""))


class RowFile:
    """A data file whose rows are numbered from 0, those that cannot be read included.

    `count` grows while `index` runs. Several threads may read at once.
    """

    def __init__(self, path: Path, name: str) -> None:
        self.path, self.name = path, name
        suffix, compression = suffix_of(path)
        self.count, self.complete = 0, False
        self.is_table = suffix in TABLES and not compression and path.is_file()
        self.has_lines = suffix in LINES and not compression and path.is_file()
        self.is_text = suffix == ".txt"
        self._places = array("q")  # of every STEP-th row: lines and bytes before it
        self._lock = Lock()
        # the rows from `_at` on: reading on is cheaper than entering
        self._following: Iterator[Entry] = iter(())
        self._at = sys.maxsize

    def index(self, stopped: Stopped) -> Iterator[int]:
        """Count the rows; yields how many there are so far, many times. Raises UserError."""
        if self.is_table:
            self.count = count_rows(self.path, self.name)
        elif self.has_lines:
            yield from self._index_lines(stopped)
        else:
            for number, _ in enumerate(self.rows(), 1):
                self.count = number
                if number % STEP == 0:
                    yield number
                    if stopped():
                        return
        self.complete = not stopped()
        yield self.count

    def _index_lines(self, stopped: Stopped) -> Iterator[int]:
        # its own, since an index that was stopped may still take a few steps beside the next one
        count, places = 0, array("q")
        self._places = places
        with self.path.open("rb") as file:
            for line in iter_lines(file):
                if count % STEP == 0:
                    places.extend((line.number - 1, line.start))
                    yield count
                    if stopped():
                        return
                count += 1
                self.count = count

    def read(self, first: int, count: int, stopped: Stopped = lambda: False) -> list[Entry]:
        """The rows from `first` on, at most `count`. Raises UserError."""
        with self._lock:
            ahead = first - self._at
            if ahead < 0 or (ahead > STEP and (self.is_table or self.has_lines)):
                self._at, self._following = self._entered(first)
            try:
                while self._at < first and not stopped():
                    if next(self._following, None) is None:
                        break
                    self._at += 1
                entries = list(islice(self._following, count)) if self._at == first else []
            except OSError as error:
                self._at = sys.maxsize  # it has ended: the next reading enters again
                raise UserError(f"{self.name}: {error.strerror or error}. Open it again.") from None
            self._at += len(entries)
            return entries

    def position_of(self, number: int, stopped: Stopped = lambda: False) -> int | None:
        """The position of the row with this number, or of the next one; None without any."""
        if self.is_table:
            return number - 1 if 0 < number <= self.count else None
        # the last indexed row whose number is at most `number`
        step = max(0, bisect_left(self._places[::2], number) - 1) if self.has_lines else 0
        at, entries = self._entered(step * STEP)
        for position, entry in enumerate(entries, at):
            if entry.row.number >= number:
                return position
            if stopped():
                break
        return None

    def _entered(self, first: int) -> tuple[int, Iterator[Entry]]:
        """The position of a row at or before `first`, and the rows from it on."""
        if self.is_table:
            return first, self._rows(first)
        places = self._places  # a new index replaces them
        if self.has_lines and places:
            step = min(first // STEP, len(places) // 2 - 1)
            number, start = places[2 * step : 2 * step + 2]
            return step * STEP, self._lines(number, start)
        return 0, self.rows()

    def rows(self, keep: Callable[[bytes], bool] | None = None) -> Iterator[Entry]:
        """All rows. Of a file of lines, those that `keep` refuses are not parsed: UNREAD."""
        return self._lines(0, 0, keep) if self.has_lines else self._rows()

    def _lines(
        self, number: int, start: int, keep: Callable[[bytes], bool] | None = None
    ) -> Iterator[Entry]:
        """The lines after the first `number`, which take `start` bytes.

        Unlike in training, a bad one ends nothing.
        """
        with self.path.open("rb") as file:
            file.seek(start)
            for line in iter_lines(file, number, start):
                is_wanted = keep is None or keep(line.raw)
                yield self._read_line(*line) if is_wanted else UNREAD

    def _read_line(self, number: int, start: int, raw: bytes) -> Entry:
        try:
            line = decode_line(raw, number, start, self.name)
            if self.is_text:
                return Entry(row_of_text(number, line))
            return Entry(row_of_json(number, line, self.name))
        except UserError as error:
            text = raw[: 4 * LONGEST].decode("utf-8", errors="replace")[:LONGEST].rstrip("\r\n")
            return Entry(Row(number, ""), without_location(error, self.name, number), text)

    def _rows(self, start: int = 0) -> Iterator[Entry]:
        """The rows, those that are refused among them. What ends the reading is the last."""
        refused: list[Entry] = []

        def refuse(number: int, error: UserError) -> None:
            text = without_location(error, self.name, number)
            refused.append(Entry(Row(number, ""), text))

        try:
            for row in read_rows(self.path, self.name, Reading(refuse), start):
                yield from refused
                refused.clear()
                yield Entry(row)
            yield from refused
        except UserError as error:
            yield from refused
            number = row_of_error(error, self.name) or 0
            text = without_location(error, self.name, number)
            yield Entry(Row(number, ""), f"{text} Nothing behind it is read.")


def as_json(value: str | Mapping[str, Any]) -> str:
    """A row as a line of .jsonl."""
    return json.dumps(
        {"text": value} if isinstance(value, str) else value, ensure_ascii=False, default=str
    )


def copied(source: RowFile, position: int, line: str) -> Iterator[bytes]:
    """The rows as .jsonl, the one at `position` as `line`.

    A piece for each, empty for one that cannot be read. Lines of .jsonl stay as they are, also
    those that cannot be read. Raises UserError.
    """
    if source.has_lines and not source.is_text:
        yield from _copied_lines(source.path, position, line)
        return
    for number, entry in enumerate(source.rows()):
        if number == position:
            yield _encoded(line)
        else:
            yield b"" if entry.problem else _encoded(as_json(entry.row.value))


def _encoded(line: str) -> bytes:
    # a surrogate without its pair is no character, and its escape stands for it in JSON
    return line.encode(errors="backslashreplace") + b"\n"


def _copied_lines(path: Path, position: int, line: str) -> Iterator[bytes]:
    with path.open("rb") as file:
        number = 0
        while raw := read_piece(file):
            if raw.isspace() and not is_too_long(raw):
                skip_blank_lines(file)
                continue
            if number == position:
                skip_rest(file, raw)
                yield _encoded(line)
            else:
                yield raw
                # a line that is too long, or the last without an end
                while raw and not raw.endswith(b"\n"):
                    raw = read_piece(file)
                    yield raw or b"\n"
            number += 1


def find(source: RowFile, text: str, stopped: Stopped) -> Iterator[tuple[int, Entry | None]]:
    """Position and entry of each row that has `text` in it; every STEP rows (position, None).

    Case does not count.
    """
    wanted = text.casefold()
    # Parsing a line takes ten times as long as looking into it. What may be escaped in it, as
    # characters beyond ASCII may be, is only found by parsing.
    is_plain = wanted.isascii() and wanted.isprintable() and ESCAPED.isdisjoint(wanted)
    raw_wanted = wanted.encode(errors="replace")
    keep = (lambda raw: raw_wanted in raw.lower()) if is_plain else None
    for position, entry in enumerate(source.rows(keep)):
        if stopped():
            return
        texts = (*_texts(entry.row.value), entry.raw)
        if any(wanted in part.casefold() for part in texts):
            yield position, entry
        elif position % STEP == 0:
            yield position, None


def _texts(value: Any) -> Iterator[str]:
    """The texts in a row, without the names of roles."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            waiting += [part for key, part in value.items() if key not in ("role", "from")]
        elif isinstance(value, list):
            waiting += value
