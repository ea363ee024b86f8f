"""`lora fleet check`: what a node has, beside what this machine has."""

import fcntl
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pipeline.errors import UserError
from pipeline.files import locks
from pipeline.fleet import check as checking
from pipeline.fleet.check import HERE, LOCK, THERE, Facts, compare, probe
from pipeline.fleet.settings import Cluster
from pipeline.stages.registry import open_project
from tests.helpers.projects import LORA, lora, new_project, note_texts
from tests.helpers.slurm import Slurm, cluster

SAME = Facts("here", {"python": "3.12.1", "torch": "2.9.0+cpu"}, {"evaluate": "a1"}, [], 8, 2**34)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return new_project(tmp_path_factory.mktemp("check") / "mini")


def node(**values: Any) -> Facts:
    return msgspec.structs.replace(SAME, node="node7", **values)


def problems(here: Facts, there: Facts, **settings: Any) -> dict[str, str]:
    rows = compare(here, there, Cluster(**settings), Path("/cache"))
    return {row.what: row.problem for row in rows if row.problem}


# The comparison


def test_the_build_for_a_device_is_no_difference() -> None:
    cuda = {"python": "3.12.1", "torch": "2.9.0+cu128"}
    assert problems(SAME, node(versions=cuda, gpus=["H100, 80 GiB"], left=3600.0)) == {}


@pytest.mark.parametrize(
    ("values", "what", "message"),
    [
        ({"versions": SAME.versions | {"torch": "2.8.0"}}, "torch", "install torch 2.9.0"),
        ({"versions": SAME.versions | {"bitsandbytes": "0.5"}}, "bitsandbytes", "install it here"),
        ({"versions": {"python": "3.12.1"}}, "torch", "install torch 2.9.0"),
        ({"code": {"evaluate": "b2"}}, "code", "install this version of lora-workbench there"),
        ({"sees": False}, "shared folder", "/cache is not one folder: let both machines"),
        ({"renames": False}, "rename", "move LORA_CACHE from /cache"),
        ({"left": 100.0}, "time left", "set warn below time in fleet.yaml"),
    ],
)
def test_what_would_be_missed_is_told_with_the_next_step(
    values: dict[str, Any], what: str, message: str
) -> None:
    found = problems(SAME, node(**values))
    assert list(found) == [what] and message in found[what]


def test_fewer_gpus_than_a_unit_gets_are_told() -> None:
    found = problems(SAME, node(gpus=["H100"]), gpus=2)
    assert list(found) == ["GPUs"] and "a unit asks for 2" in found["GPUs"]


def test_what_a_node_says_does_not_reach_the_terminal_as_it_is() -> None:
    rows = compare(SAME, node(gpus=["\x1b[2J"]), Cluster(), Path("/cache"))
    assert not any("\x1b" in text for row in rows for text in row)


# The probe


def test_the_probe_tries_the_shared_folder_and_who_sees_a_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checking, "facts", lambda: node(versions={}))
    (tmp_path / HERE).write_text(tmp_path.name)
    with (tmp_path / LOCK).open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        found = probe(tmp_path)
    assert (found.sees, found.renames, found.locks) == (True, True, "shared")
    assert (tmp_path / THERE / THERE).read_text() == "node7"
    shutil.rmtree(tmp_path / THERE)
    assert probe(tmp_path).locks == "each machine's own"  # nobody holds it any more

    def missing(*_: object) -> None:
        raise OSError(locks.MISSING[0], "Function not implemented")

    shutil.rmtree(tmp_path / THERE)
    monkeypatch.setattr(fcntl, "flock", missing)
    assert probe(tmp_path).locks == "missing"
    elsewhere = probe(tmp_path / "nowhere")
    assert (elsewhere.sees, elsewhere.renames) == (False, False)


def test_this_machine_is_as_itself_and_nothing_stays(project: Path) -> None:
    told = lora("fleet", "check", "local", cwd=project)
    assert told.returncode == 0, told.stdout + told.stderr
    assert told.stdout.splitlines()[-1] == "local: units run there, results are found here"
    assert "sees the other's file" in told.stdout and "the same" in told.stdout
    assert list((project / "runs").iterdir()) == []
    assert list((project / ".lora-cache").iterdir()) == []


def test_a_cluster_that_is_not_there_is_refused(project: Path) -> None:
    told = lora("fleet", "check", "nowhere", cwd=project)
    assert told.returncode == 1 and "has no such cluster" in told.stderr


# Slurm


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[Slurm]:
    with cluster(tmp_path / "slurm", 1) as nodes:
        yield nodes


def checked(project: Path, slurm: Slurm, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [LORA, "fleet", "check", "pool", *arguments],
        cwd=project,
        env=slurm.environment | {"COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_a_node_of_slurm_with_the_same_and_with_another_version(
    project: Path, slurm: Slurm, tmp_path: Path
) -> None:
    file = project / "fleet.yaml"
    file.write_text("pool: {engine: slurm, time: 1h}")
    told = checked(project, slurm, "--json")
    assert told.returncode == 0, told.stdout + told.stderr
    found = json.loads(told.stdout)
    facts = {fact["what"]: fact["there"] for fact in found["facts"]}
    assert (found["node"], found["problems"], facts["flock"]) == ("node1", 0, "shared")
    assert facts["time left"].endswith(("min", "h"))

    other = tmp_path / "other" / "numpy-1.0.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: numpy\nVersion: 1.0\n")
    path = f"export PYTHONPATH={other.parent}:$PYTHONPATH"
    file.write_text(json.dumps({"pool": {"engine": "slurm", "time": "1h", "setup": [path]}}))
    told = checked(project, slurm)
    assert told.returncode == 1, told.stdout + told.stderr
    assert "numpy: results of units are not found: install numpy" in told.stdout
    assert "pool: its units fail, or their results are not found here" in told.stdout

    file.write_text("pool: {engine: slurm, time: 1h, setup: [exit 3]}")
    told = checked(project, slurm)
    assert told.returncode == 1 and "has ended without a result. Does a node" in told.stderr


@pytest.mark.slow
def test_a_probe_that_waits_is_told_with_the_reason_and_canceled(
    project: Path, slurm: Slurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    (project / "fleet.yaml").write_text("pool: {engine: slurm, time: 1h}")
    slurm.down(1)
    monkeypatch.setattr(checking, "PATIENCE", 0.0)
    for name, value in slurm.environment.items():
        monkeypatch.setenv(name, value)
    notes = list[str]()

    def waiting() -> None:
        for event in checking.check(open_project(project / "params.yaml"), "pool", 3.0):
            notes.extend(note_texts([event]))

    begin = time.monotonic()
    with pytest.raises(
        UserError, match=r"the unit is queued .*, and is canceled\. Try again later"
    ):
        waiting()
    assert any("the unit is queued (" in note and "Ctrl-C cancels it" in note for note in notes)
    assert [job.state for job in slurm.jobs()] == ["CANCELLED"]
    assert time.monotonic() - begin < 60.0  # scancel tries for 95 s to signal a task that waits
