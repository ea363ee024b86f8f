"""The last lines of a file that grows, however fast."""

from pathlib import Path

from rich.text import Text
from textual.events import Resize
from textual.widgets import RichLog

LAST = 64 * 1024  # bytes read at once: of a stage that prints 100 MB only the end is of use
LINES = 1000


class LogView(RichLog):
    """`follow` reads what is new and keeps the last thousand lines."""

    DEFAULT_CSS = "LogView { height: 1fr; background: transparent; }"

    def __init__(self) -> None:
        super().__init__(max_lines=LINES, wrap=True, min_width=20)
        self._offset, self._inode, self._rest = 0, 0, b""

    def on_resize(self, event: Resize) -> None:  # noqa: ARG002  # RichLog's own runs as well
        """Lines are broken for the width that they were written at: read again."""
        self._inode = 0

    def follow(self, path: Path) -> None:
        if not self.size.width:  # hidden, where lines would wait without bound for a width
            return
        try:
            stat = path.stat()
            if stat.st_ino != self._inode or stat.st_size < self._offset:
                self.clear()
                self._offset, self._inode, self._rest = 0, stat.st_ino, b""
            if stat.st_size == self._offset:
                return
            with path.open("rb") as file:
                if stat.st_size - self._offset > LAST:
                    self._offset, self._rest = stat.st_size - LAST, b"... "
                file.seek(self._offset)
                data = file.read(LAST)
        except OSError:
            return
        self._offset += len(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self.write(_shown(line))


def _shown(line: bytes) -> Text:
    """What a terminal would show of it: the last of what was written over one another."""
    last = line.rstrip(b"\r").rpartition(b"\r")[2]
    return Text.from_ansi(last.decode("utf-8", "replace")[:2000])
