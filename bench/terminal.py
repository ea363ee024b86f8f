"""`lora-tui` in a terminal: first paint against a bare Textual program, and CPU time without user input."""

import fcntl
import os
import pty
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

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
HELLO = """
from textual.app import App
from textual.widgets import Static
class Hello(App):
    def compose(self):
        yield Static("pretrain")
Hello().run()
"""
FIRST_SCREEN_TEXT = b"pretrain"  # appears on the first screen of both
WATCH_SECONDS = 20.0


def terminal() -> Iterator[Row]:
    """Time to first paint; CPU share of an idle screen, and of one that watches a run."""
    with tempfile.TemporaryDirectory() as folder:
        project = Path(folder) / "project"
        project.mkdir()
        shutil.copy(ROOT / "params.yaml", project)
        shutil.copytree(ROOT / "data", project / "data")
        hello = Path(folder) / "hello.py"
        hello.write_text(HELLO, encoding="utf-8")
        tui = [str(BIN / "lora-tui")]
        times = in_turns(
            {
                "tui": lambda: _first_paint(tui, project),
                "hello": lambda: _first_paint([sys.executable, str(hello)], project),
            },
            rounds=9,
        )
        first_paint, ratio = times["tui"], times["tui"] / times["hello"]
        yield Row("lora-tui, first paint", first_paint, "bare Textual hello", ratio, "under 500 ms", first_paint < 0.5)
        idle = _cpu_share(tui, project)
        yield _row("nothing runs", idle, 0.01)
        _lora(project, "pretrain", "--set", "pretrain.epochs=2").wait()
        _lora(project, "expand-vocab").wait()
        run = _lora(project, "finetune", "lora", "--set", "finetune_lora.epochs=100000")
        try:
            yield _row("a run is watched", _cpu_share(tui, project), 0.05)
        finally:
            run.kill()
            run.wait()


def _row(what: str, share: float, goal: float) -> Row:
    seconds = share * WATCH_SECONDS
    return Row(
        f"lora-tui, {what}", seconds, f"{WATCH_SECONDS:.0f} s of a core", share, f"under {goal:.0%}", share < goal
    )


def _lora(project: Path, *words: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([BIN / "lora", *words], cwd=project, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _first_paint(command: Sequence[str], folder: Path) -> None:
    with _started(command, folder):
        pass


def _cpu_share(command: Sequence[str], folder: Path) -> float:
    """The share of one core that the program uses without user input."""
    with _started(command, folder) as (process, master):
        threading.Thread(target=_drain, args=(master,), daemon=True).start()
        time.sleep(3)
        before = _cpu_seconds(process.pid)
        time.sleep(WATCH_SECONDS)
        return (_cpu_seconds(process.pid) - before) / WATCH_SECONDS


def _drain(master: int) -> None:
    try:
        while os.read(master, 65536):
            pass
    except OSError:
        return


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def _started(command: Sequence[str], folder: Path) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """The program in a terminal of 80 × 24, after it drew its first screen."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    environment = {
        **os.environ,
        "TERM": "xterm-256color",
        "XDG_CONFIG_HOME": str(folder),
        "XDG_STATE_HOME": str(folder),
    }
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # users have cached bytecode from the second start on
    process = subprocess.Popen(
        command, cwd=folder, stdin=slave, stdout=slave, stderr=slave, env=environment, start_new_session=True
    )
    try:
        output = b""
        while FIRST_SCREEN_TEXT not in output:
            output += os.read(master, 65536)
        yield process, master
    finally:
        process.kill()
        process.wait()
        os.close(slave)
        os.close(master)
