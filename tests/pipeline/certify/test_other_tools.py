"""Files that other tools' own code has written, in environments of their own, are certified: as
they are they pass, and broken they fail.
"""

import os
import shutil
import subprocess
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from lora_workbench.api import ignore, play
from pipeline.certify.certify import FAILED, PASSED, Processes, certify
from pipeline.certify.engines import parse
from pipeline.certify.environment import python_with
from pipeline.certify.kinds import Checked, kind_of
from tests.helpers.bases import edit_config, toy_checkpoint
from tests.helpers.broken_adapters import BROKEN, Break, Tensors
from tests.helpers.checkpoints import edit_adapter_config, edit_tensors
from tests.helpers.projects import ROOT

SCRIPTS = ROOT / "tests" / "helpers" / "other_tools"
SECONDS = 300.0  # of one tool

# in `make test-all` alone: each tool is gigabytes to install
pytestmark = [pytest.mark.slow, pytest.mark.rest]


def write(tool: str, base: Path, folder: Path) -> None:
    """Run a script in an environment with what its inline metadata (PEP 723) asks for."""
    script = SCRIPTS / f"{tool}.py"
    _, metadata, _ = script.read_text(encoding="utf-8").split("# ///", 2)
    lines = metadata.removeprefix(" script").replace("\n# ", "\n")
    python = python_with(tuple(tomllib.loads(lines)["dependencies"]))
    done = subprocess.run(
        # without the script's folder on the path: it would hide a tool of its name
        (python, "-E", "-P", script, base, folder),
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        cwd=base.parent,
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("other_tools") / "base"
    toy_checkpoint(folder, tie_word_embeddings=False)
    return folder


@pytest.fixture(scope="module")
def processes() -> Iterator[Processes]:
    with Processes() as opened:
        yield opened


class Expected(NamedTuple):
    """What is expected of a kind of `pipeline.certify.kinds`, on the toy."""

    engine: str  # another version than the reference
    groups: int
    breaks: Sequence[tuple[Break, str]]  # and what the certificate must say


def renamed(file: str, old: str, new: str) -> Break:
    """Rename tensors in a file."""

    def change(tensors: Tensors) -> Tensors:
        return {name.replace(old, new): value for name, value in tensors.items()}

    return lambda folder: edit_tensors(folder, change, file)


EXPECTED = {
    # A and B of seven linears
    "adapter": Expected(
        "peft==0.20", 14, [BROKEN["alpha is lost"], BROKEN["another prefix of all keys"]]
    ),
    "checkpoint": Expected(
        "peft==0.20",
        12,
        [
            (renamed("model.safetensors", "model.", "base_model."), "keys not in the files"),
            (lambda folder: edit_config(folder, rms_norm_eps=0.1), "config.json has rms_norm_eps"),
        ],
    ),
    "mlx": Expected(
        "mlx==0.31",
        14,
        [
            (renamed("adapters.safetensors", "self_attn", "attn"), "not an adapter parameter"),
            (lambda folder: edit_adapter_config(folder, lora_parameters={"rank": 8}), "scale"),
        ],
    ),
}


@pytest.mark.parametrize("tool", sorted(path.stem for path in SCRIPTS.glob("*.py")))
def test_what_was_written_by(tool: str, base: Path, processes: Processes, tmp_path: Path) -> None:
    written = tmp_path / "written"
    write(tool, base, written)
    engine, groups, breaks = EXPECTED[kind_of(written)]

    def certificate(folder: Path) -> dict[str, Any]:
        return play(certify(Checked(folder, base), parse(engine), processes), ignore)

    found = certificate(written)
    assert found["verdict"] == PASSED and found["problems"] == found["notes"] == [], found
    (entry,) = found["engines"]
    assert entry["effect"] > 0.1 and entry["missed"] < 1e-5
    assert entry["groups_that_act"] == entry["groups"] == groups

    for number, (break_it, reason) in enumerate(breaks):
        folder = Path(shutil.copytree(written, tmp_path / f"broken{number}"))
        break_it(folder)
        found = certificate(folder)
        assert found["verdict"] == FAILED
        assert any(reason in problem for problem in found["problems"]), found
