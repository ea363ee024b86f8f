"""The real program in a pseudo-terminal: keys go in, and the screen is read back with pyte."""

import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from fcntl import ioctl
from pathlib import Path

import pyte

# Sequences that pyte would print: modes of the keyboard (CSI > 1 u), questions (CSI ? 2026 $ p),
# pictures.
UNREAD = re.compile(rb"\x1b\[[<=>][\d;]*[a-zA-Z]|\x1b\[\?[\d;]*\$p|\x1b[P_].*?\x1b\\", re.DOTALL)
UNFINISHED = re.compile(rb"\x1b(?:\[[\d;?<=>$]*)?\Z")


class Terminal:
    """A command on a screen of `size` (columns, rows). Close it, or use it as a context manager."""

    def __init__(
        self, command: str, folder: Path, size: tuple[int, int], environment: Mapping[str, str]
    ) -> None:
        columns, rows = size
        self.screen = pyte.Screen(columns, rows)
        self._stream = pyte.ByteStream(self.screen)
        self._unfinished = b""
        self._end, theirs = pty.openpty()
        ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        # programs take these for the screen's size, where they are set
        inherited = {
            name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")
        }
        self.process = subprocess.Popen(
            ["bash", "-c", command],
            cwd=folder,
            env={**inherited, "TERM": "xterm-256color", "COLORTERM": "truecolor", **environment},
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
        )
        os.close(theirs)

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        os.close(self._end)

    def text(self) -> str:
        return "\n".join(line.rstrip() for line in self.screen.display)

    def read(self, seconds: float) -> bool:
        """Draw what comes within `seconds`; False once the program has ended."""
        if not select.select([self._end], [], [], seconds)[0]:
            return True
        try:
            data = os.read(self._end, 1 << 16)
        except OSError:  # Linux says so when nobody holds the other end
            return False
        data = self._unfinished + data
        self._unfinished = cut[0] if (cut := UNFINISHED.search(data)) else b""
        self._stream.feed(UNREAD.sub(b"", data.removesuffix(self._unfinished)))
        return bool(data)

    def see(
        self,
        holds: Callable[[str], object],
        seconds: float = 120,
        drawn: Callable[[], object] = lambda: None,
    ) -> None:
        """Wait until something holds of the text on the screen, and call `drawn` whenever it may
        have changed.

        Raises TimeoutError with the screen.
        """
        end = time.monotonic() + seconds
        while not holds(self.text()):
            if time.monotonic() > end or not self.read(0.05):
                raise TimeoutError(self.text())
            drawn()

    def press(self, keys: str) -> None:
        os.write(self._end, keys.encode())

    def wait(self, seconds: float = 60) -> int:
        """Read to the end; the program's exit code."""
        end = time.monotonic() + seconds
        while self.read(0.1):
            if time.monotonic() > end:
                raise TimeoutError(self.text())
        return self.process.wait(seconds)
