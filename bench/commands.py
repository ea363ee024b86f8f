"""The pipeline and the command line as processes."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from bench.measure import Row, in_turns
from bench.real import base
from pipeline.project.logs.run_log import LOSS

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
PIECE = 2**22  # bytes per read
# what a script of transformers takes to the same token
PLAIN = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(model.generate(**tokenizer("The", return_tensors="pt"), max_new_tokens=1))
"""
IMPORTS = "from transformers import AutoTokenizer, LlamaForCausalLM"
EXAMPLES = '{"text": "3 May 1998 = 1998-05-03"}\n' * 40
SETTINGS = """
base: {folder}
training: {{batch_size: 4, window: 0, epochs: 1}}
finetune_lora: {{data: data.jsonl, target_modules: [all-linear], train_embeddings: none}}
"""
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
    yield from _first_token()
    yield from _first_step()


def _first_token() -> Iterator[Row]:
    """`lora prompt` as a process against reading the model's files from disk."""
    with base() as (folder, name):
        prompt = ("prompt", "The", "--base", folder.resolve(), "--max-tokens", "1")
        times = in_turns(
            {
                "prompt": lambda: _run(ROOT, BIN / "lora", *prompt),
                "plain": lambda: _run(ROOT, sys.executable, "-c", PLAIN, folder.resolve()),
                "read": lambda: _read(*folder.glob("*.safetensors")),
            },
            rounds=3,
        )
    mine, least, other = times["prompt"], times["read"], times["plain"]
    what, reference = f"lora prompt, first token, {name}", f"reading its files, {least:.2f} s"
    yield Row(what, mine, reference, mine / least, "at most 3 ×", mine <= 3 * least)
    ratio = mine / other
    yield Row("the same", mine, "a script of transformers", ratio, "at most 1.2 ×", ratio <= 1.2)


def _first_step() -> Iterator[Row]:
    """`lora finetune lora` as a process, until its log is there: the first step begins then."""
    with base() as (folder, name), tempfile.TemporaryDirectory() as parent:
        if not (folder / "tokenizer.json").exists():  # random weights
            return
        project = Path(parent)
        (project / "data.jsonl").write_text(EXAMPLES, encoding="utf-8")
        settings = SETTINGS.format(folder=folder.resolve())
        (project / "params.yaml").write_text(settings, encoding="utf-8")
        _run(ROOT, BIN / "lora", "import", "--params", project / "params.yaml")
        times = in_turns(
            {
                "step": lambda: _begin(project),
                "imports": lambda: _run(ROOT, sys.executable, "-c", IMPORTS),
            },
            rounds=5,
        )
    mine, least = times["step"], times["imports"]
    what, reference = (
        f"lora finetune lora, until its first step, {name}",
        "imports of its libraries",
    )
    yield Row(what, mine, reference, mine / least, "under 5 s", mine < 5)


def _begin(project: Path) -> None:
    """Train until the first step begins, and stop."""
    run = project / "runs/finetune_lora"
    shutil.rmtree(run, ignore_errors=True)
    command = (BIN / "lora", "finetune", "lora", "--params", project / "params.yaml")
    with subprocess.Popen(command, env=_environment(ROOT), stdout=subprocess.DEVNULL) as process:
        while not (run / LOSS).exists():
            if process.poll() is not None:
                raise RuntimeError("it ended before its first step")
            time.sleep(0.002)
        process.kill()


def _read(*files: Path) -> None:
    piece = bytearray(PIECE)
    for file in files:
        with file.open("rb", buffering=0) as opened:
            if hasattr(os, "posix_fadvise"):  # not from the page cache
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while opened.readinto(piece):
                pass


def _run(folder: Path, *command: object) -> None:
    words, environment = list(map(str, command)), _environment(folder)
    subprocess.run(words, cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)


def _environment(folder: Path) -> dict[str, str]:
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PYTHONPATH": str(folder), "PATH": path}
    # users have cached bytecode from the second call on
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    return environment
