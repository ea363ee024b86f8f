"""What a default run makes and what the commands say, recorded before a change that must change
nothing.

    python -m tests.journeys.oracle record before.json [FOLDER …]    after `dvc repro`, in FOLDERs that have artifacts/
    python -m tests.journeys.oracle compare before.json after.json   exit code 1 if weights, tables or verdicts differ

Floating-point results depend on the processor: compare records of one machine.
"""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from typer.main import get_command

ROOT = Path(__file__).parents[2]
MODELS = ("minigpt", "gpt2", "opt-125m", "smollm2-135m", "qwen3-0.6b", "qwen3-8b", "llama-3.1-8b", "gemma-3-4b",
          "mixtral-8x7b", "qwen3-30b-a3b")  # fmt: skip
MUST_MATCH = ("weights", "tables", "verdicts")

Record = dict[str, dict[str, Any]]


def record(folders: list[Path]) -> Record:
    """All that must not change unnoticed, of the projects in `folders`."""
    artifacts = {
        str(path.relative_to(folder / "artifacts")): path
        for folder in folders
        for path in sorted((folder / "artifacts").rglob("*"))
        if path.is_file()
    }
    return {
        "weights": {
            name: tensors_digest(path)
            for name, path in artifacts.items()
            if path.suffix == ".safetensors"
        },
        "tables": {
            name: file_digest(path) for name, path in artifacts.items() if path.suffix == ".csv"
        },
        "verdicts": verdicts(artifacts.get("claims/claims.json")),
        "snapshots": {
            path.name: file_digest(path) for path in sorted((ROOT / "tests").rglob("*.svg"))
        },
        "help": dict(help_texts()),
        "calc": {
            model: json.loads(lora("calc", "--model", model, "--r", "8", "--json"))
            for model in MODELS
        },
    }


def tensors_digest(path: Path) -> str:
    """Sha256 of every tensor's name, dtype, shape and bytes; the header's layout is left out."""
    digest = hashlib.sha256()
    with safe_open(path, framework="pt") as tensors:
        for name in sorted(tensors.keys()):
            tensor = tensors.get_tensor(name).contiguous()
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def file_digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def verdicts(path: Path | None) -> dict[str, str]:
    """Of each claim that an extension has checked: its verdict."""
    claims = json.loads(path.read_text(encoding="utf-8")) if path else []
    return {claim["id"]: claim["verdict"] for claim in claims}


def help_texts() -> Iterator[tuple[str, str]]:
    """`lora` and every command below it, with what its --help prints at 80 columns."""

    def walk(command: Any, name: tuple[str, ...]) -> Iterator[tuple[str, str]]:
        yield " ".join(("lora", *name)), lora(*name, "--help")
        for below, its in sorted(getattr(command, "commands", {}).items()):
            yield from walk(its, (*name, below))

    from cli.main import app

    return walk(get_command(app), ())


def lora(*arguments: str) -> str:
    """What `lora` prints on stdout."""
    environment = os.environ | {"COLUMNS": "80", "NO_COLOR": "1"}
    done = subprocess.run([str(Path(sys.executable).parent / "lora"), *arguments], env=environment, cwd=ROOT,
                          capture_output=True, text=True, check=True)  # fmt: skip
    return done.stdout


def differences(before: Record, after: Record) -> Iterator[tuple[str, str, str]]:
    """(part, name, what became of it) of all that is not the same in both."""
    for part, names in before.items():
        for name in sorted(names.keys() | after[part].keys()):
            if name not in after[part]:
                yield part, name, "is gone"
            elif name not in names:
                yield part, name, "is new"
            elif names[name] != after[part][name]:
                yield part, name, "differs"


def main(do: str, *paths: str) -> int:
    if do == "record":
        out, *folders = paths
        made = record([Path(folder) for folder in folders] or [ROOT])
        Path(out).write_text(json.dumps(made, indent=1), encoding="utf-8")
        return 0
    before, after = (json.loads(Path(path).read_text(encoding="utf-8")) for path in paths)
    found = list(differences(before, after))
    for part, name, became in found:
        print(f"{part:10} {name}: {became}")
    for part, names in before.items():
        print(f"{part}: {len(names)} recorded, {sum(its == part for its, *_ in found)} differ")
    return int(any(part in MUST_MATCH and became != "is new" for part, _, became in found))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
