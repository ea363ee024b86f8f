"""One training over several nodes of Slurm, which are machines to each other."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.fleet.run import find_run
from tests.helpers.projects import BRIEF, lora, make_base, new_project, wait_for
from tests.helpers.sent import PATIENCE, Sent
from tests.helpers.slurm import Slurm, cluster

TRAIN = ["finetune", "lora", "--set", "finetune_lora.epochs=2000", "--checkpoint-every", "100"]
pytestmark = pytest.mark.slow


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[Slurm]:
    with cluster(tmp_path / "slurm", nodes=3, namespaces=True) as machines:
        yield machines


@pytest.fixture
def project(tmp_path: Path) -> Path:
    root = make_base(new_project(tmp_path / "mini"), BRIEF)
    (root / "fleet.yaml").write_text("pool: {engine: slurm, time: 1h}")
    return root


def test_a_gang_that_loses_a_machine_goes_on_with_others(project: Path, slurm: Slurm) -> None:
    sent = Sent(project, slurm.environment, [*TRAIN, "--nnodes", "2"])
    wait_for(lambda: checkpoints(project), PATIENCE)
    slurm.kill(2)  # the first two have it, of which the first writes
    errors = sent.end()
    run = find_run(project, "")
    log = (run.unit_folder(1) / "log").read_text()
    assert "resumed after step" in log, log + errors
    assert lora(*TRAIN, cwd=project).returncode == 0  # from the cache


def checkpoints(root: Path) -> list[Path]:
    return list(root.glob("runs/finetune_lora/fleet/*/units/1/runs/finetune_lora/checkpoint-*"))
