"""The screen of models with a folder of many adapters: time from its key to the names, and to the
last verdict.
"""

import fcntl
import json
import os
import pty
import re
import select
import shutil
import struct
import subprocess
import tempfile
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from bench.measure import Row
from bench.terminal import BIN, ROOT
from tui.registry import SCREENS

# adapters → goals in seconds: the names, all verdicts
COUNTS = {300: (1.0, 5.0), 2_000: (5.0, 10.0)}
ESCAPES = re.compile(rb"\x1b\[[0-9;?]*[A-Za-z]")
# of the pane; the header has a screen's name there
TITLE = re.compile(rb"Models  [\d,]+(  checking| \xe2)")
SETTLED = 2.5  # seconds until files are so old that what was read of them is kept
PATIENCE = 120.0


def models() -> Iterator[Row]:
    """A first start, which reads and hashes all of them, and a second one, at 120 × 40."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        project = root / "project"
        project.mkdir()
        shutil.copy(ROOT / "params.yaml", project)
        shutil.copytree(ROOT / "data", project / "data")
        for words in (
            "pretrain --set pretrain.epochs=2",
            "expand-vocab",
            "finetune lora --set finetune_lora.epochs=2",
        ):
            quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            subprocess.run([BIN / "lora", *words.split()], cwd=project, check=True, **quiet)  # type: ignore[call-overload]
        for count, (names_goal, verdicts_goal) in COUNTS.items():
            folder = root / f"many-{count}"
            for number in range(count):
                shutil.copytree(project / "artifacts/lora_adapter", folder / f"a-{number:04}")
            time.sleep(SETTLED)
            for start in ("first", "second"):
                names, verdicts = _open_screen(project, root / f"home-{count}", folder, count)
                what = f"{count:,} adapters, {start} start"
                yield Row(
                    f"{what}, names",
                    names,
                    "",
                    None,
                    f"under {names_goal:.0f} s",
                    names < names_goal,
                )
                met = verdicts < verdicts_goal
                yield Row(
                    f"{what}, all verdicts", verdicts, "", None, f"under {verdicts_goal:.0f} s", met
                )


def _open_screen(project: Path, home: Path, folder: Path, count: int) -> tuple[float, float]:
    """Seconds from the key to the folder's line, and until nothing is left to check."""
    state = home / "lora-workbench" / "tui.json"
    state.parent.mkdir(parents=True, exist_ok=True)
    state.write_text(
        json.dumps({"theme": None, "folders": [str(folder)], "prompts": []}), encoding="utf-8"
    )
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    homes = {f"XDG_{kind}_HOME": str(home) for kind in ("CACHE", "STATE", "CONFIG")}
    environment = {**os.environ, "TERM": "xterm-256color", **homes}
    process = subprocess.Popen(
        [BIN / "lora-tui"],
        cwd=project,
        stdin=slave,
        stdout=slave,
        stderr=slave,
        env=environment,
        start_new_session=True,
    )
    os.close(slave)
    try:
        _read_until(master, lambda text: b"pretrain" in text)
        time.sleep(SETTLED)  # the first look at the project's files is over
        started = time.perf_counter()
        os.write(master, str(list(SCREENS).index("models") + 1).encode())
        text = _read_until(master, lambda text: b"(%d)" % count in text)
        names = time.perf_counter() - started
        _read_until(master, lambda text: _is_checked(text), text)
        return names, time.perf_counter() - started
    finally:
        process.kill()
        process.wait()
        os.close(master)


def _is_checked(text: bytes) -> bool:
    titles = TITLE.findall(text)
    return bool(titles) and titles[-1] != b"  checking"


def _read_until(master: int, holds: Callable[[bytes], bool], output: bytes = b"") -> bytes:
    """What the program has drawn, without escape sequences, once it holds."""
    end = time.perf_counter() + PATIENCE
    while not holds(text := ESCAPES.sub(b"", output)):
        if time.perf_counter() > end:
            raise TimeoutError(f"not drawn within {PATIENCE:.0f} s")
        if select.select([master], [], [], 0.05)[0]:
            output += os.read(master, 65536)
    return text
