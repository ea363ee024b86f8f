"""Command lines drawn from a seed over every command and option, good values and bad ones.

    python -m tests.journeys.command_lines --seed 0 --count 300

Each runs in a project of its own. None may end in a traceback, take longer than `LONGEST` seconds,
print what a terminal obeys, or leave something half written. A run that trains may take longer; it
is then interrupted as by Ctrl-C.
"""

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from typer.main import get_command

from cli.main import app
from pipeline.errors import UserError
from pipeline.files import artifact
from pipeline.files.text import OBEYED
from tests.helpers.process import Forked
from tests.helpers.projects import cut_off

LONGEST = 20.0  # seconds
TRAINS = (
    "pretrain",
    "train-from-scratch",
    "finetune",
    "serve",
)  # may take as long as their params say, serve longer
EXITS = {0, 1, 2}
NUMBERS = [
    "0",
    "1",
    "2",
    "3",
    "8",
    "-1",
    "64",
    "99999",
    str(2**31),
    str(2**63),
    str(10**30),
    "0.5",
    "1e-320",
    "1e300",
]
ODD_NUMBERS = ["nan", "inf", "-inf", "1e999", "", "1_0", "٣", "0x10", "1,5", "None"]
ODD_TEXTS = [
    "",
    " ",
    "\x1b[31m",
    "a" * 500,
    "\n",
    "🤗",
    "--",
    "{}",
    "[1, 2",
    "null",
    "\u202e",
    "..",
    "%s%n",
    "$(id)",
]
TEXTS = ["der wind", "die katze sitzt auf dem", "unbekannt", *ODD_TEXTS]
PATHS = [
    *(
        "artifacts/lora_adapter",
        "artifacts/expanded",
        "artifacts/base",
        "artifacts/prefix",
        "artifacts/lora_merged",
    ),
    *(
        "artifacts/sweep/rank-1",
        "artifacts/sweep/rank-2",
        "artifacts/full_finetuned",
        "artifacts",
        ".",
    ),
    *(
        "data/finetune.de.txt",
        "data/prompts.yaml",
        "params.yaml",
        "nowhere",
        "bad/empty",
        "bad/binary",
        "bad/folder",
    ),
    *("bad/adapter", "bad/base", "/dev/null", "/", "bad/\x1b[31m", "bad/link", "~", "a" * 300),
]
GOOD = PATHS[:8]
ADAPTERS = (
    "artifacts/lora_adapter",
    "artifacts/sweep/rank-1",
    "artifacts/sweep/rank-2",
    "artifacts/prefix",
)
MODELS = ("artifacts/expanded", "artifacts/full_finetuned", "artifacts/lora_adapter")
DATA = ("data/finetune.de.txt", "data/retain.de.txt", "data/euro.en.jsonl")
FITTING = {  # what a parameter of this name takes
    **dict.fromkeys(("adapter", "path", "paths", "one", "other"), ADAPTERS),
    **dict.fromkeys(("base", "tuned"), MODELS),
    **dict.fromkeys(("file", "data"), DATA),
    "prompts": ("data/prompts.yaml",),
    "folder": ("artifacts", "bad"),
}
SETTINGS = [
    *(
        "finetune_lora.rank",
        "finetune_lora.alpha",
        "finetune_lora.learning_rate",
        "finetune_lora.batch_size",
    ),
    *(
        "finetune_lora.data",
        "finetune_lora.target_modules",
        "finetune_lora.rank_pattern",
        "finetune_lora.retention_data",
    ),
    *(
        "finetune_lora.precision",
        "finetune_lora.quantization",
        "finetune_lora.eval_share",
        "finetune_lora.max_length",
    ),
    *(
        "finetune_lora.warmup_steps",
        "finetune_lora.loraplus_ratio",
        "finetune_lora.init_lora_weights",
        "nothing.here",
    ),
    *(
        "finetune_sweep.grid",
        "base",
        "pretrain.heads",
        "expand_vocab.tokens",
        "evaluate.top_k",
        "merge.prompts",
    ),
    *(
        "finetune_full.max_grad_norm",
        "finetune_prefix.virtual_tokens",
        "train_from_scratch.window",
        "finetune_lora",
        "",
    ),
]
VALUES = [
    *(
        "attention",
        "all-linear",
        "[q_proj]",
        "[nothing]",
        "{v_proj: 2}",
        "{'(a+)+!': 3}",
        "bf16",
        "nf4-dq",
        "int8",
    ),
    *(
        "data/finetune.de.txt",
        "data/retain.de.txt",
        "nowhere.txt",
        "true",
        "pissa",
        "gaussian",
        "{rank: [1, 2]}",
    ),
]


@dataclass(frozen=True)
class Outcome:
    """What came of a command line; `wrong` says what was not as it must be."""

    words: list[str]
    code: int
    seconds: float
    errors: str
    wrong: str | None


def commands(
    command: Any = None, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], list[Any]]]:
    """Every command with its parameters, as Typer has them."""
    command = command or get_command(app)
    parts: Mapping[str, Any] = getattr(command, "commands", {})
    if not parts or getattr(command, "invoke_without_command", False):
        yield path, command.params
    for name, part in parts.items():
        yield from commands(part, (*path, name))


def drawn(random_: random.Random, every: Sequence[tuple[tuple[str, ...], list[Any]]]) -> list[str]:
    """A command line: mostly values that fit, so that what lies behind the first check is
    reached.
    """
    path, parameters = random_.choice(every)
    words = list(path)
    for parameter in parameters:
        if parameter.name in ("help", "install_completion", "show_completion"):
            continue
        argument = parameter.param_type_name == "argument"
        if not argument and random_.random() > (0.9 if parameter.required else 0.3):
            continue
        for _ in range(
            random_.choice([1, 2, 3]) if parameter.nargs == -1 or parameter.multiple else 1
        ):
            values = [] if getattr(parameter, "is_flag", False) else [_value(random_, parameter)]
            words += values if argument else [random_.choice(parameter.opts), *values]
    if random_.random() < 0.03:
        words.insert(random_.randrange(len(words) + 1), random_.choice(ODD_TEXTS))
    return words


def _value(random_: random.Random, parameter: Any) -> str:
    odd = random_.random() < 0.15
    kind = parameter.type.name
    if parameter.name == "overrides":
        return f"{random_.choice(SETTINGS)}={random_.choice(NUMBERS + VALUES if not odd else ODD_NUMBERS + ODD_TEXTS)}"
    if parameter.name == "out":
        return random_.choice(
            ["out", "made/out", "bad/folder", "artifacts", *PATHS] if odd else ["out", "made/out"]
        )
    if parameter.name == "params":
        return random_.choice(PATHS) if odd else "params.yaml"
    if kind == "choice":
        fits = list(map(str, parameter.type.choices))
        return random_.choice([*fits, *ODD_TEXTS] if odd else fits)
    if "int" in kind or "float" in kind:
        return random_.choice(ODD_NUMBERS if odd else NUMBERS)
    if kind in ("path", "file", "directory"):
        return random_.choice(PATHS if odd else FITTING.get(parameter.name, GOOD))
    return random_.choice(TEXTS + VALUES + NUMBERS)


def spoil(root: Path) -> None:
    """What a project may have beside what is good."""
    bad = root / "bad"
    (bad / "folder/inside").mkdir(parents=True)
    (bad / "folder/kept.txt").write_text("kept")
    (bad / "empty").touch()
    (bad / "binary").write_bytes(bytes(range(256)) * 40)
    (bad / "link").symlink_to("nothing")
    (bad / "\x1b[31m").mkdir()
    for name in ("adapter", "base"):
        shutil.copytree(
            root / ("artifacts/lora_adapter" if name == "adapter" else "artifacts/expanded"),
            bad / name,
        )
    weights = bad / "adapter/adapter_model.safetensors"
    cut_off(weights, 9)
    (bad / "base/config.json").write_text('{"model_type": "llama", "num_hidden_layers": 1000000}')


def run(root: Path, words: list[str]) -> Outcome:
    """One command line in a copy of the project at `root`."""
    with tempfile.TemporaryDirectory() as scratch:
        project = Path(scratch) / "project"
        shutil.copytree(root, project, symlinks=True)
        start = time.monotonic()
        child = Forked(
            ["lora", *words], project, variables={"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        )
        stopped = not child.ended(LONGEST)
        if stopped and child.process.pid:
            os.kill(child.process.pid, signal.SIGINT)
            if not child.ended(LONGEST):
                child.process.kill()
        code, errors = child.end()
        return Outcome(
            words,
            code,
            time.monotonic() - start,
            errors,
            _wrong(root, project, words, code, errors, stopped),
        )


def _wrong(
    root: Path, project: Path, words: list[str], code: int, errors: str, stopped: bool
) -> str | None:
    if "Traceback" in errors:
        return "a traceback"
    if stopped and not set(words) & set(TRAINS):
        return f"longer than {LONGEST:.0f} s"
    if code not in EXITS | ({130} if stopped else set()):
        return f"exit code {code}"
    if code == 1 and not errors.strip():
        return "failed and said nothing"
    if any(ord(c) in OBEYED for c in errors):
        return "something that a terminal obeys"
    for path in project.rglob(".*"):
        if path.suffix in (".tmp", ".old"):
            return f"{path.relative_to(project)} was left"
    for manifest in project.rglob(artifact.MANIFEST):
        folder = manifest.parent
        if "bad" in folder.parts or ".lora-cache" in folder.parts:
            continue
        try:
            artifact.verify(folder)
        except UserError as error:
            return f"half written: {error}"
    before = {path.relative_to(root) for path in root.rglob("*") if "runs" not in path.parts}
    lost = sorted(
        str(path)
        for path in before
        if not (project / path).exists() and not (project / path).is_symlink()
    )
    return f"{lost[0]} is gone" if lost and words[:2] != ["cache", "prune"] else None


def main() -> int:
    """Runs the command lines and prints a summary; the exit code is the number of those that went
    wrong, up to 99.
    """
    from tests.helpers.projects import BRIEF, PIPELINE, make, new_project

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument(
        "--verbose", action="store_true", help="print each command line and what came of it"
    )
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = new_project(Path(folder) / "project")
        write_params(root / "params.yaml", BRIEF)
        make(root, PIPELINE)
        spoil(root)
        found = list(outcomes(root, asked.seed, asked.count))
    for one in found:
        if asked.verbose or one.wrong:
            print(
                f"{one.wrong or 'ok'}: lora {' '.join(map(repr, one.words))[:400]} -> {one.code}, "
                f"{one.seconds:.1f} s"
            )
        if one.wrong:
            print(f"    {one.errors[-1500:]!r}")
    failed = sum(one.wrong is not None for one in found)
    codes = dict(sorted(Counter(one.code for one in found).items()))
    slowest = max(one.seconds for one in found)
    print(
        f"{len(found)} command lines, exit codes {codes}, slowest {slowest:.1f} s, {failed} wrong"
    )
    return min(failed, 99)


def write_params(path: Path, overrides: Sequence[str]) -> None:
    """Overrides into the params file itself: a command line that names none trains as briefly."""
    tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    for override in overrides:
        key, _, value = override.partition("=")
        section, _, name = key.partition(".")
        tree[section][name] = yaml.safe_load(value)
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")


def outcomes(root: Path, seed: int, count: int) -> Iterator[Outcome]:
    random_ = random.Random(seed)
    every = list(commands())
    lines = [drawn(random_, every) for _ in range(count)]
    with ThreadPoolExecutor(2) as pool:
        yield from pool.map(lambda words: run(root, words), lines)


if __name__ == "__main__":
    sys.exit(main())
