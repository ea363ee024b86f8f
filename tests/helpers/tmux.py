"""A terminal that a test types into and reads: tmux on a socket of its own."""

import os
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.helpers.projects import ROOT

BIN = Path(sys.executable).parent
needs_tmux = pytest.mark.skipif(shutil.which("tmux") is None, reason="tmux is not installed")


class Terminal:
    """One window; `screen` is what a user sees now."""

    def __init__(self, socket: str) -> None:
        self._socket = socket

    def _tmux(self, *words: str) -> str:
        command = ["tmux", "-L", self._socket, "-f", "/dev/null", *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    def open(
        self, command: str, folder: Path, size: tuple[int, int], environment: dict[str, str]
    ) -> None:
        # the server lives on when the program ends
        self._tmux("new-session", "-d", "-s", "keep", "sleep 3600")
        settings = [word for pair in environment.items() for word in ("-e", "=".join(pair))]
        columns, rows = map(str, size)
        self._tmux(
            "new-session",
            "-d",
            "-s",
            "app",
            "-x",
            columns,
            "-y",
            rows,
            "-c",
            str(folder),
            *settings,
            command,
        )

    def screen(self) -> str:
        return self._tmux("capture-pane", "-p", "-t", "app")

    def keys(self, *names: str) -> None:
        """Press keys by tmux's names: r, Enter, Escape, C-c.

        Wait for what Escape does: a program that stalls reads it and the key after it as Alt and
        that key.
        """
        assert "Escape" not in names[:-1]
        for name in names:
            self._tmux("send-keys", "-t", "app", name)
            time.sleep(0.1)  # a person's pace

    def type(self, text: str) -> None:
        self._tmux("send-keys", "-t", "app", "-l", text)

    def resize(self, columns: int, rows: int) -> None:
        self._tmux("resize-window", "-t", "app", "-x", str(columns), "-y", str(rows))

    def see(self, *texts: str, seconds: float = 30) -> str:
        """Wait until all of `texts` are on the screen, and return it."""
        end = time.monotonic() + seconds
        while True:
            screen = self.screen()
            if all(text in screen for text in texts):
                return screen
            assert time.monotonic() < end, f"{texts} did not appear:\n{screen}"
            time.sleep(0.05)

    def miss(self, text: str, seconds: float = 30) -> str:
        """Wait until `text` has gone from the screen."""
        end = time.monotonic() + seconds
        while text in (screen := self.screen()):
            assert time.monotonic() < end, f"{text} is still there:\n{screen}"
            time.sleep(0.05)
        return screen

    def field(self, text: str, seconds: float = 30) -> None:
        """Wait until the cursor, which Textual keeps in the field that has the keys, is in a line
        with `text`.
        """
        end = time.monotonic() + seconds
        while text not in (line := self.screen().splitlines()[self._row()]):
            assert time.monotonic() < end, f"the cursor is not at {text} but here: {line}"
            time.sleep(0.05)

    def drawn(self, text: str) -> str:
        """The first line with `text`, its colours included."""
        lines = self._tmux("capture-pane", "-p", "-e", "-t", "app").splitlines()
        return next((line for line in lines if text in line), "")

    def redrawn(self, text: str, before: str, seconds: float = 30) -> None:
        """Wait until the first line with `text` is no longer drawn as `before`: a focus that moved
        is a colour.
        """
        end = time.monotonic() + seconds
        while self.drawn(text) in ("", before):
            assert time.monotonic() < end, f"{text} is still drawn as before:\n{self.screen()}"
            time.sleep(0.05)

    def _row(self) -> int:
        return int(self._tmux("display-message", "-p", "-t", "app", "#{cursor_y}"))

    def close(self) -> None:
        subprocess.run(
            ["tmux", "-L", self._socket, "kill-server"], capture_output=True, check=False
        )


@contextmanager
def lora_tui(folder: Path, size: tuple[int, int] = (80, 24)) -> Iterator[Terminal]:
    """The real program on the project in `folder`, whose own code it and its stages run."""
    terminal = Terminal(f"lora-{uuid.uuid4().hex[:8]}")
    environment = {
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(folder if (folder / "tui").is_dir() else ROOT),
        "XDG_CONFIG_HOME": str(folder / ".home"),
        "XDG_STATE_HOME": str(folder / ".home"),
        "XDG_CACHE_HOME": str(folder / ".home"),
        "LANG": "C.UTF-8",
    }
    try:
        program = f"env -u COLUMNS -u LINES {BIN / 'lora-tui'}"  # the terminal's own size counts
        terminal.open(f"{program}; echo ended; sleep 3600", folder, size, environment)
        terminal.see("1 Pipe")
        yield terminal
    finally:
        terminal.close()
