"""A sweep that a process sends to a cluster, and what its units leave."""

import json
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.fleet.run import find_run
from pipeline.project.cache import ADAPTERS
from tests.helpers.projects import LORA, lora, swept_weights

PATIENCE = 240.0


class Sent:
    """A sweep that this process sends to the pool."""

    def __init__(
        self, root: Path, environment: Mapping[str, str], arguments: Sequence[str]
    ) -> None:
        self.root = root
        self.process = subprocess.Popen(
            [LORA, *arguments, "--on", "pool"],
            cwd=root,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def units(self) -> list[Any]:
        run = find_run(self.root, "")
        return [run.unit_folder(number) for number in run.numbers()]

    def attempts(self, number: int) -> list[Any]:
        path = self.root.glob(f"runs/finetune_sweep/fleet/*/units/{number}/attempts.jsonl")
        lines = [line for found in path for line in found.read_text().splitlines()]
        return list(map(json.loads, lines))

    def checkpoints(self, number: int) -> list[Path]:
        unit = f"runs/finetune_sweep/fleet/*/units/{number}"
        return list(self.root.glob(f"{unit}/runs/finetune_sweep/checkpoint-*"))

    def log(self, number: int) -> str:
        (path,) = self.root.glob(f"runs/finetune_sweep/fleet/*/units/{number}/log")
        return path.read_text()

    def end(self) -> str:
        out, errors = self.process.communicate(timeout=PATIENCE)
        assert self.process.returncode == 0, errors + out
        return errors

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


def trained(root: Path) -> list[str]:
    """The keys of all adapters that were trained, in whichever unit."""
    keys = list[str]()
    for path in root.glob("runs/**/trained.jsonl"):
        keys += map(json.loads, path.read_text().splitlines())
    return keys


def assert_as_in_one_pass(root: Path, arguments: Sequence[str]) -> None:
    """Nothing was trained twice, and the tensors are those of one pass on this machine."""
    entries = {path.name for path in (root / ".lora-cache" / ADAPTERS).glob("[!.]*/")}
    assert sorted(trained(root)) == sorted(entries)
    found = swept_weights(root)
    told = lora(*arguments, "--force", cwd=root)
    assert told.returncode == 0, told.stderr
    assert swept_weights(root) == found and len(found) == len(entries)
