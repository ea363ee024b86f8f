"""Follow a text file that grows, is truncated, replaced or deleted, one chunk at a time."""

import asyncio
import os
from collections.abc import AsyncIterator, Callable
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

    A `change` invalidates all earlier rows: the file was truncated or rewritten in place
    ("restarted"), another file took its path ("replaced"), or it was deleted ("gone"). `more`:
    another call would read more.
    """

    rows: list[T]
    change: Change = ""
    more: bool = False


class FileTail(Generic[T]):
    """Complete lines of a file as rows.

    `skipped` counts the lines that the parser rejects by ValueError or that exceed a chunk.

    `parser_for(header)` returns the parser of the lines below the first; with `header=False`, the
    parser of all lines, given "". With `latest`, a reader that is further behind skips to the last
    `latest` bytes; its first line then begins with "... ".
    """

    def __init__(
        self,
        path: Path,
        parser_for: Callable[[str], Callable[[str], T]],
        *,
        header: bool = True,
        latest: int = 0,
    ) -> None:
        self.path, self._parser_for, self._header, self._latest = path, parser_for, header, latest
        self._parse = parser_for("")
        self._stamp: tuple[int, ...] | None = None
        self._start_over()

    def _start_over(self) -> None:
        self.skipped = 0
        self._offset = 0
        self._tail = b""
        self._file: tuple[int, int] | None = None
        # the next line is the header, or the rest of a line longer than a chunk
        self._skip_line = self._header

    def changed(self) -> bool:
        """Whether the file changed since the last `read`. Costs one os.stat."""
        return file_stamp(self.path) != self._stamp

    def read(self) -> Chunk[T]:
        """The next rows. Never raises: an unreadable file counts as empty."""
        self._stamp = file_stamp(self.path)
        try:
            with self.path.open("rb") as file:
                return self._read(file)
        except OSError:
            existed = self._file is not None
            self._start_over()
            return Chunk([], "gone" if existed else "")

    async def chunks(self) -> AsyncIterator[Chunk[T]]:
        """All new rows by chunks, which a thread reads."""
        more = self.changed()
        while more:
            chunk = await asyncio.to_thread(self.read)
            yield chunk
            more = chunk.more

    def _read(self, file: BinaryIO) -> Chunk[T]:
        info = os.fstat(file.fileno())
        identity = (info.st_dev, info.st_ino)
        change: Change = ""
        if self._file is not None:
            # A resumed run truncates its log and writes the same lines again, so the size alone
            # says nothing: compare the bytes before the offset.
            file.seek(self._offset - len(self._tail))
            if identity != self._file:
                change = "replaced"
            elif file.read(len(self._tail)) != self._tail:
                change = "restarted"
            if change:
                self._start_over()
        self._file = identity
        limit = self._latest or CHUNK_SIZE
        mark = b""
        if self._latest and info.st_size - self._offset > self._latest:
            self._offset = info.st_size - self._latest
            self._tail = b""
            mark = b"... "
        file.seek(self._offset)
        data = file.read(limit)
        more = len(data) == limit
        end = data.rfind(b"\n") + 1  # of the last complete line
        if not end and not more:  # half a line: wait for the rest
            return Chunk([], change)
        data = data[: end or limit]
        at_start = self._offset == 0
        self._offset += len(data)
        self._tail = (self._tail + data)[-TAIL_SIZE:]
        if not end:  # a part of a line longer than a chunk, which its first part counts
            self.skipped += not self._skip_line
            self._skip_line = True
            return Chunk([], change, more)
        data = mark + data
        if self._skip_line:
            header, _, data = data.partition(b"\n")
            if at_start:
                self._parse = self._parser_for(header.decode(errors="replace"))
        self._skip_line = False
        rows: list[T] = []
        for line in data.decode(errors="replace").split("\n")[:-1]:
            try:
                rows.append(self._parse(line))
            except ValueError:
                self.skipped += 1
        return Chunk(rows, change, more)


def file_stamp(path: Path) -> tuple[int, ...] | None:
    """What changes when a file or folder does: device, inode, size, time; None without one."""
    try:
        info = path.stat()
    except OSError:
        return None
    return info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns
