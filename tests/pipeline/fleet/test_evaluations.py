"""`lora evaluate --adapter … --on`: the base first, then chunks, and the numbers of one process."""

import json
import shutil
from pathlib import Path

import pytest

from pipeline.fleet.run import find_run
from tests.helpers.projects import BRIEF, lora, make, new_project, refusal

SWEEP = ("finetune_sweep.grid={rank: [1, 2, 4]}",)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = new_project(tmp_path_factory.mktemp("evaluated") / "mini")
    make(root, ["pretrain", "expand_vocab", "finetune_sweep"], [*BRIEF, *SWEEP])
    # a name with a space, and one that is not the sweep's
    shutil.copytree(root / "artifacts/sweep/rank-1", root / "a copy of rank-1")
    return root


def test_in_units_adapters_have_the_numbers_of_one_process(project: Path) -> None:
    folders = [f"artifacts/sweep/rank-{rank}" for rank in (1, 2, 4)]
    named = [word for folder in folders for word in ("--adapter", folder)]
    told = lora("evaluate", "--json", *named, "--on", "local", "--parts", "2", cwd=project)
    assert told.returncode == 0, told.stderr
    assert "the base, in 1 unit on local" in told.stderr
    assert "3 adapters, in 2 units on local" in told.stderr
    run = find_run(project, "")
    labels = [unit.label.split() for unit in run.states()]
    assert labels == [["base"], folders[:2], folders[2:]]
    assert {unit.state for unit in run.states()} == {"done"}
    shutil.rmtree(project / ".lora-cache" / "measured")
    shutil.rmtree(project / "artifacts" / "measured")
    alone = lora("evaluate", "--json", *named, cwd=project)
    assert json.loads(alone.stdout) == json.loads(told.stdout)

    # what was measured has an entry: one unit for what is new, none for the base
    more = [*named, "--adapter", "a copy of rank-1", "--on", "local"]
    shutil.rmtree(project / "artifacts" / "measured")
    again = lora("evaluate", "--json", *more, cwd=project)
    assert again.returncode == 0 and "units" not in again.stderr, again.stderr
    assert "a copy of rank-1" in json.loads(again.stdout)


def test_an_adapter_that_cannot_be_measured_is_told_and_the_others_are(project: Path) -> None:
    for folder in (".lora-cache/measured", "artifacts/measured"):
        shutil.rmtree(project / folder, ignore_errors=True)
    broken = project / "broken"
    shutil.copytree(project / "artifacts/sweep/rank-2", broken)
    (broken / "adapter_model.safetensors").write_bytes(b"no weights")
    named = ["--adapter", "broken", "--adapter", "artifacts/sweep/rank-4"]
    told = lora("evaluate", "--json", *named, "--on", "local", cwd=project)
    assert told.returncode == 0 and "broken: " in told.stderr, told.stderr
    assert "Traceback" not in told.stderr
    assert [*json.loads(told.stdout)][-1] == "artifacts/sweep/rank-4"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--parts", "2"], "Name both"),
        (["--on", "local"], "Name both"),
        (["--detach", "--on", "local", "--adapter", "artifacts/sweep/rank-1"], "Leave it out"),
    ],
)
def test_options_that_contradict_each_other(
    project: Path, options: list[str], message: str
) -> None:
    told = lora("evaluate", *options, cwd=project)
    assert message in refusal((told.returncode, told.stdout, told.stderr))
