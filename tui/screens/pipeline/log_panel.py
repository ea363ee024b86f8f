"""The last lines of a growing log file."""

from pathlib import Path

from rich.text import Text
from textual.events import Resize
from textual.widgets import RichLog

MAX_READ = 64 * 1024  # bytes per read; of a stage that prints 100 MB only the end is shown
LINES = 1000


class LogView(RichLog):
    """Shows the last LINES lines of a file; `follow` reads what is new."""

    DEFAULT_CSS = "LogView { height: 1fr; background: transparent; }"

    def __init__(self) -> None:
        super().__init__(max_lines=LINES, wrap=True, min_width=20)
        self._offset, self._inode, self._partial_line = 0, 0, b""

    def on_resize(self, event: Resize) -> None:  # noqa: ARG002  # RichLog's handler runs as well
        """Read the file again: lines are wrapped for the width at which they were written."""
        self._inode = 0

    def follow(self, path: Path) -> None:
        if not self.size.width:  # hidden: RichLog would queue the lines until it has a width
            return
        try:
            stat = path.stat()
            if stat.st_ino != self._inode or stat.st_size < self._offset:
                self.clear()
                self._offset, self._inode, self._partial_line = 0, stat.st_ino, b""
            if stat.st_size == self._offset:
                return
            with path.open("rb") as file:
                if stat.st_size - self._offset > MAX_READ:
                    self._offset, self._partial_line = stat.st_size - MAX_READ, b"... "
                file.seek(self._offset)
                data = file.read(MAX_READ)
        except OSError:
            return
        self._offset += len(data)
        *lines, self._partial_line = (self._partial_line + data).split(b"\n")
        for line in lines:
            self.write(_render_line(line))


def _render_line(line: bytes) -> Text:
    """The line as a terminal shows it: only what follows its last carriage return."""
    last = line.rstrip(b"\r").rpartition(b"\r")[2]
    return Text.from_ansi(last.decode("utf-8", "replace")[:2000])
