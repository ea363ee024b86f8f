"""Follow a CSV file that grows, is truncated, replaced or deleted, one chunk at a time."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Generic, Literal, TypeVar

T = TypeVar("T")
CHUNK_SIZE = 256 * 1024  # bytes read per call at most: about 5,000 lines, 10 ms
TAIL_SIZE = 256  # bytes before the offset that must be unchanged, or the file was rewritten
Change = Literal["", "restarted", "replaced", "gone"]


@dataclass(frozen=True)
class Chunk(Generic[T]):
    """Rows that are new since the last call.

    A `change` invalidates all earlier rows: the file was truncated or rewritten in place ("restarted"), another file
    took its path ("replaced"), or it was deleted ("gone"). `more`: another call would read more.
    """

    rows: list[T]
    change: Change = ""
    more: bool = False


class CsvTail(Generic[T]):
    """Complete lines of a CSV, read by `parse`; lines for which it raises ValueError are counted in `skipped`.

    If columns differ from file to file, `parser_for` returns the parser for the lines below a given header.
    """

    def __init__(
        self, path: Path, parse: Callable[[str], T], parser_for: Callable[[str], Callable[[str], T]] | None = None
    ) -> None:
        self.path, self.skipped = path, 0
        self._parse, self._parser_for = parse, parser_for
        self._stamp: tuple[int, ...] | None = None
        self._start_over()

    def _start_over(self) -> None:
        self.skipped = self._offset = 0
        self._tail = b""
        self._file: tuple[int, int] | None = None
        self._skip_line = True  # the next line is the header, or the rest of a line longer than a chunk

    def changed(self) -> bool:
        """Whether the file changed since the last `read`. Costs one os.stat."""
        return _stamp(self.path) != self._stamp

    def read(self) -> Chunk[T]:
        """The next rows. Never raises: an unreadable file counts as empty."""
        self._stamp = _stamp(self.path)
        try:
            with self.path.open("rb") as file:
                return self._read(file)
        except OSError:
            existed = self._file is not None
            self._start_over()
            return Chunk([], "gone" if existed else "")

    def _read(self, file: BinaryIO) -> Chunk[T]:
        change = self._detect_change(file)
        if change:
            self._start_over()
        info = os.fstat(file.fileno())
        self._file = (info.st_dev, info.st_ino)
        file.seek(self._offset)
        data = file.read(CHUNK_SIZE)
        end = data.rfind(b"\n") + 1
        rows: list[T] = []
        if end or len(data) == CHUNK_SIZE:
            rows = self._parse_lines(data[: end or CHUNK_SIZE], complete=end > 0)
        return Chunk(rows, change, len(data) == CHUNK_SIZE)

    def _detect_change(self, file: BinaryIO) -> Change:
        if self._file is None:
            return ""
        info = os.fstat(file.fileno())
        if (info.st_dev, info.st_ino) != self._file:
            return "replaced"
        file.seek(self._offset - len(self._tail))
        return "" if file.read(len(self._tail)) == self._tail else "restarted"

    def _parse_lines(self, data: bytes, complete: bool) -> list[T]:
        """Parse `data`: `complete` lines, or else a part of a line longer than a chunk, which is skipped."""
        at_start = self._offset == 0
        self._offset += len(data)
        self._tail = (self._tail + data)[-TAIL_SIZE:]
        if self._skip_line:
            header, _, data = data.partition(b"\n")
            if at_start and complete and self._parser_for is not None:
                self._parse = self._parser_for(header.decode(errors="replace"))
        self._skip_line = not complete
        if not complete:
            self.skipped += 1
            return []
        rows: list[T] = []
        for line in data.decode(errors="replace").split("\n")[:-1]:
            try:
                rows.append(self._parse(line))
            except ValueError:
                self.skipped += 1
        return rows


def _stamp(path: Path) -> tuple[int, ...] | None:
    try:
        info = path.stat()
    except OSError:
        return None
    return info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns
