"""Follow a CSV that grows, is cut back, is replaced or vanishes, a piece at a time."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Generic, Literal, TypeVar

T = TypeVar("T")
PIECE = 256 * 1024  # bytes a call reads at most: some 5,000 lines, 10 ms
REMEMBERED = 256  # bytes before the place reached that must still be there
Change = Literal["", "restarted", "replaced", "gone"]


@dataclass(frozen=True)
class Piece(Generic[T]):
    """Rows that are new since the last call.

    `change` says that all rows before are void: the file was cut back or rewritten in place (restarted), is another
    file (replaced), or is no more (gone). `more`: there is more to read at once.
    """

    rows: list[T]
    change: Change = ""
    more: bool = False


class CsvTail(Generic[T]):
    """Whole lines of a CSV as `parse` reads them; a line for which it raises ValueError is counted in `skipped`.

    Where logs differ in their columns, `below` gives the parser of the lines below a header.
    """

    def __init__(
        self, path: Path, parse: Callable[[str], T], below: Callable[[str], Callable[[str], T]] | None = None
    ) -> None:
        self.path, self.skipped = path, 0
        self._parse, self._below = parse, below
        self._stamp: tuple[int, ...] | None = None
        self._start_over()

    def _start_over(self) -> None:
        self.skipped = self._place = 0
        self._last = b""
        self._file: tuple[int, int] | None = None
        self._inside = True  # of a line that is not read: the header first

    def changed(self) -> bool:
        """Whether the file is another than at the last call of `read`: one os.stat."""
        return _stamp(self.path) != self._stamp

    def read(self) -> Piece[T]:
        """The next rows. Never raises: a file that cannot be read is an empty one."""
        self._stamp = _stamp(self.path)
        try:
            with self.path.open("rb") as file:
                return self._read(file)
        except OSError:
            had = self._file is not None
            self._start_over()
            return Piece([], "gone" if had else "")

    def _read(self, file: BinaryIO) -> Piece[T]:
        change = self._change(file)
        if change:
            self._start_over()
        info = os.fstat(file.fileno())
        self._file = (info.st_dev, info.st_ino)
        file.seek(self._place)
        data = file.read(PIECE)
        end = data.rfind(b"\n") + 1
        rows: list[T] = []
        if end or len(data) == PIECE:
            rows = self._rows(data[: end or PIECE], whole=end > 0)
        return Piece(rows, change, len(data) == PIECE)

    def _change(self, file: BinaryIO) -> Change:
        if self._file is None:
            return ""
        info = os.fstat(file.fileno())
        if (info.st_dev, info.st_ino) != self._file:
            return "replaced"
        file.seek(self._place - len(self._last))
        return "" if file.read(len(self._last)) == self._last else "restarted"

    def _rows(self, data: bytes, whole: bool) -> list[T]:
        """Parse `data`, which ends with a line's end, or (not `whole`) is a part of a line too long to be one."""
        first = self._place == 0
        self._place += len(data)
        self._last = (self._last + data)[-REMEMBERED:]
        if self._inside:
            header, _, data = data.partition(b"\n")
            if first and whole and self._below is not None:
                self._parse = self._below(header.decode(errors="replace"))
        self._inside = not whole
        if not whole:
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
