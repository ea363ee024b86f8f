"""Keys of `lora-tui` in a terminal of 200 × 60: from key to paint, and a burst that must not lose
its order.
"""

import os
import select
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from bench.measure import Row
from bench.terminal import SETTLE, TUI, read_until, started

SIZE = (200, 60)
KEYS, BURSTS = 40, 10
QUIET = 0.15  # seconds without output after which the answer to a key is complete
TYPICAL, WORST = 0.030, 0.100  # seconds


def keyboard() -> Iterator[Row]:
    """Seconds from a key to the first byte of its answer, in the demo's list of stages; bursts into
    a text field.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with started([*TUI, "--demo", "minigpt"], folder, SIZE) as (_, master):
            _read_quiet(master, SETTLE)
            seconds = [_seconds_to_paint(master, key) for key in (b"j", b"k") * (KEYS // 2)]
        typical, worst = median(seconds), max(seconds)
        yield Row(
            "key to paint, 200 × 60, median",
            typical,
            "",
            None,
            f"{TYPICAL * 1e3:.0f} ms",
            typical <= TYPICAL,
        )
        yield Row(
            f"key to paint, worst of {KEYS}",
            worst,
            "",
            None,
            f"{WORST * 1e3:.0f} ms",
            worst <= WORST,
        )
        start = time.monotonic()
        right = _bursts(folder)
        spent = time.monotonic() - start
        share = right / BURSTS
        yield Row(
            "abc Ctrl+U def in one burst",
            spent,
            f"{BURSTS} bursts",
            share,
            "all are def",
            right == BURSTS,
        )


def _seconds_to_paint(master: int, key: bytes) -> float:
    start = time.perf_counter()
    os.write(master, key)
    select.select([master], [], [], 5)
    seconds = time.perf_counter() - start
    _read_quiet(master, QUIET)
    return seconds


def _read_quiet(master: int, quiet: float) -> None:
    """Read what is drawn until nothing was for so long."""
    while select.select([master], [], [], quiet)[0]:
        os.read(master, 65536)


def _bursts(folder: Path) -> int:
    """How many of the bursts arrive as typed: the form of a new project repeats its base model in a
    message.
    """
    right = 0
    with started(TUI, folder, SIZE, b"New project") as (_, master):
        os.write(master, b"n")
        read_until(master, b"base model")
        _read_quiet(master, QUIET)
        os.write(master, b"\x1b[B")  # down, to the base model
        _read_quiet(master, QUIET)
        for number in range(BURSTS):
            os.write(master, f"abc\x15def{number}\r".encode())
            output = read_until(master, b"needs data")
            _read_quiet(master, QUIET)
            right += f" def{number} needs data".encode() in output
    return right
