"""The pipeline and the command line as processes."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from bench.measure import Row, in_turns

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
HELLO = """
import typer
app = typer.Typer()
@app.command()
def hello(name: str) -> None:
    print(name)
app()
"""


def commands() -> Iterator[Row]:
    """Cold and no-op `dvc repro` in a fresh clone, and `lora` commands against a bare Typer
    program.
    """
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "clone"
        subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
        start = time.perf_counter()
        _run(clone, BIN / "dvc", "repro")
        cold = time.perf_counter() - start
        hello = Path(folder) / "hello.py"
        hello.write_text(HELLO, encoding="utf-8")
        times = in_turns(
            {
                "no-op": lambda: _run(clone, BIN / "dvc", "repro"),
                "dvc": lambda: _run(clone, BIN / "dvc", "--version"),
                "help": lambda: _run(clone, BIN / "lora", "--help"),
                "calc": lambda: _run(
                    clone, BIN / "lora", "calc", "--model", "qwen3-8b", "--r", "8"
                ),
                "hello": lambda: _run(clone, sys.executable, hello, "you"),
                "cached": lambda: _run(clone, BIN / "lora", "pretrain"),
            },
            rounds=7,
        )
    yield Row("dvc repro, cold", cold, "", None, "under 45 s", cold < 45)
    noop = times["no-op"]
    yield Row(
        "dvc repro, nothing to do",
        noop,
        "dvc --version",
        noop / times["dvc"],
        "under 1.0 s",
        noop < 1,
    )
    ratio = times["help"] / times["hello"]
    yield Row("lora --help", times["help"], "bare Typer hello", ratio, "under 1.1 ×", ratio < 1.1)
    ratio = times["calc"] / times["hello"]
    yield Row(
        "lora calc --model qwen3-8b --r 8",
        times["calc"],
        "bare Typer hello",
        ratio,
        "under 2.3 ×",
        ratio < 2.3,
    )
    cached = times["cached"]
    yield Row(
        "lora pretrain, cached",
        cached,
        "bare Typer hello",
        cached / times["hello"],
        "under 1 s",
        cached < 1,
    )


def _run(folder: Path, *command: object) -> None:
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PYTHONPATH": str(folder), "PATH": path}
    # users have cached bytecode from the second call on
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    subprocess.run(
        list(map(str, command)), cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL
    )
