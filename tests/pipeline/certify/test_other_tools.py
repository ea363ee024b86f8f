"""Files that other tools' own code has written, in environments of their own, are certified: as
they are they pass, and broken they fail.
"""

import os
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lora_workbench.api import ignore, play
from pipeline.certify.certify import FAILED, PASSED, Processes, certify
from pipeline.certify.engines import Wanted
from pipeline.certify.environment import python_with
from pipeline.certify.kinds import Checked
from tests.helpers.bases import toy_checkpoint
from tests.helpers.broken_adapters import BROKEN, broken
from tests.helpers.projects import ROOT

SCRIPTS = ROOT / "tests" / "helpers" / "other_tools"
SECONDS = 300.0  # of one tool
PEFT = Wanted("peft", "0.20")  # another than the reference

pytestmark = pytest.mark.slow


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


def certificate(folder: Path, base: Path, processes: Processes) -> dict[str, Any]:
    return play(certify(Checked(folder, base), [PEFT], processes), ignore)


@pytest.mark.parametrize("tool", sorted(path.stem for path in SCRIPTS.glob("*.py")))
def test_an_adapter_of(tool: str, base: Path, processes: Processes, tmp_path: Path) -> None:
    written = tmp_path / "written"
    write(tool, base, written)
    found = certificate(written, base, processes)
    (entry,) = found["engines"]
    assert found["verdict"] == PASSED and found["problems"] == found["notes"] == [], found
    assert entry["effect"] > 0.1 and entry["missed"] < 1e-5
    assert entry["groups_that_act"] == entry["groups"] == 14  # A and B of seven linears

    for name in ("alpha is lost", "another prefix of all keys"):
        found = certificate(broken(written, tmp_path / name, name), base, processes)
        assert found["verdict"] == FAILED
        assert any(BROKEN[name][1] in problem for problem in found["problems"]), found
