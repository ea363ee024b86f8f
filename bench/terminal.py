"""`lora-tui` in a terminal: first paint against a bare Textual program, and CPU time without user
input.

Keys have a benchmark of their own, `keyboard`.
"""

import fcntl
import os
import pty
import select
import shutil
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from bench.measure import Row, in_turns
from tui.registry import SCREENS

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
TUI = (sys.executable, "-m", "tui")
HELLO = """
from textual.app import App
from textual.widgets import Static
class Hello(App):
    def compose(self):
        yield Static("pretrain")
Hello().run()
"""
FIRST_SCREEN_TEXT = b"pretrain"  # appears on the first screen of both
WATCH_SECONDS, IDLE_SECONDS = 20.0, 8.0
SETTLE = 4.0  # seconds until a screen that was opened has read its files
PATIENCE = 60.0  # seconds until a program that drew nothing has failed


def terminal() -> Iterator[Row]:
    """Time to first paint; CPU share of each idle screen of a finished project, and of one that
    watches a run.
    """
    with tempfile.TemporaryDirectory() as folder:
        project = Path(folder) / "project"
        project.mkdir()
        shutil.copy(ROOT / "params.yaml", project)
        shutil.copytree(ROOT / "data", project / "data")
        hello = Path(folder) / "hello.py"
        hello.write_text(HELLO, encoding="utf-8")
        times = in_turns(
            {
                "tui": lambda: _first_paint(TUI, project),
                "hello": lambda: _first_paint([sys.executable, str(hello)], project),
            },
            rounds=9,
        )
        first_paint, ratio = times["tui"], times["tui"] / times["hello"]
        yield Row(
            "lora-tui, first paint",
            first_paint,
            "bare Textual hello",
            ratio,
            "at most 1.8 ×",
            ratio <= 1.8,
        )
        for number, name in enumerate(SCREENS, 1):
            share = _cpu_share([*TUI, "--demo", "minigpt"], project, IDLE_SECONDS, str(number))
            yield _row(f"{name}, idle", share, 0.01, IDLE_SECONDS)
        _lora(project, "pretrain", "--set", "pretrain.epochs=2").wait()
        _lora(project, "expand-vocab").wait()
        run = _lora(project, "finetune", "lora", "--set", "finetune_lora.epochs=100000")
        try:
            yield _row(
                "a run is watched", _cpu_share(TUI, project, WATCH_SECONDS), 0.05, WATCH_SECONDS
            )
        finally:
            run.kill()
            run.wait()


def _row(what: str, share: float, goal: float, of: float) -> Row:
    return Row(
        f"lora-tui, {what}",
        share * of,
        f"{of:.0f} s of a core",
        share,
        f"under {goal:.0%}",
        share < goal,
    )


def _lora(project: Path, *words: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [BIN / "lora", *words], cwd=project, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def _first_paint(command: Sequence[str], folder: Path) -> None:
    with started(command, folder):
        pass


def _cpu_share(command: Sequence[str], folder: Path, seconds: float, keys: str = "") -> float:
    """The share of one core that the program uses after `keys`, without further input."""
    with started(command, folder) as (process, master):
        threading.Thread(target=_drain, args=(master,), daemon=True).start()
        time.sleep(SETTLE)
        os.write(master, keys.encode())
        time.sleep(SETTLE)
        before = _cpu_seconds(process.pid)
        time.sleep(seconds)
        return (_cpu_seconds(process.pid) - before) / seconds


def _drain(master: int) -> None:
    try:
        while os.read(master, 65536):
            pass
    except OSError:
        return


def read_until(master: int, text: bytes) -> bytes:
    """What the program draws, until it has drawn `text`."""
    output, end = b"", time.monotonic() + PATIENCE
    while text not in output:
        if not select.select([master], [], [], max(end - time.monotonic(), 0))[0]:
            raise SystemExit(
                f"{text!r} was not drawn within {PATIENCE:.0f} s, but:\n{output[-2000:]!r}"
            )
        output += os.read(master, 65536)
    return output


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def started(
    command: Sequence[str],
    folder: Path,
    size: tuple[int, int] = (80, 24),
    text: bytes = FIRST_SCREEN_TEXT,
) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """The program in a terminal of (columns, rows), after it drew `text`."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", *reversed(size), 0, 0))
    homes = dict.fromkeys(("XDG_CONFIG_HOME", "XDG_STATE_HOME", "XDG_CACHE_HOME"), str(folder))
    environment = {**os.environ, "TERM": "xterm-256color", "PYTHONPATH": str(ROOT), **homes}
    # users have cached bytecode from the second start on
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    process = subprocess.Popen(
        command,
        cwd=folder,
        stdin=slave,
        stdout=slave,
        stderr=slave,
        env=environment,
        start_new_session=True,
    )
    try:
        read_until(master, text)
        yield process, master
    finally:
        process.kill()
        process.wait()
        os.close(slave)
        os.close(master)
