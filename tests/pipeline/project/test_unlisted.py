"""A stage that ran by `--set`, or whose section was removed since, is shown, though the params file
has no section.
"""

import json
from collections.abc import Generator
from pathlib import Path

import pytest

from pipeline.files.artifact import write_json
from pipeline.project.logs.run_log import LOSS
from pipeline.project.logs.runs import Run
from pipeline.project.params.edit import remove_section
from pipeline.project.runner import Event, Facts, Job, Progress, run
from pipeline.stages.registry import open_project
from pipeline.views.runs import discover_runs, stamp
from pipeline.views.stages import Status, project_signature
from tests.conftest import Lora
from tests.helpers.projects import BRIEF, STAGES, make, played
from tests.helpers.run_folders import hold, journal, write_run


@pytest.fixture
def unlisted(project: Path) -> Path:
    """A project with a sweep that no section of its params file names."""
    params = project / "params.yaml"
    params.write_text(
        remove_section(params.read_text(encoding="utf-8"), "finetune_sweep"), encoding="utf-8"
    )
    return project


def runs_of(root: Path) -> list[Run]:
    return discover_runs(root, open_project(root / "params.yaml"))


def test_its_runs_are_listed_with_their_own_settings_as_the_current_ones(unlisted: Path) -> None:
    (run,) = [run for run in runs_of(unlisted) if run.sweeps]
    assert (run.stage, run.label) == ("finetune_sweep", "finetune_sweep  2 adapters")
    assert [curve.name for curve in run.curves] == ["rank-1", "rank-2"]


def test_its_state_says_so_and_is_no_stage_that_dvc_runs(unlisted: Path) -> None:
    project = open_project(unlisted / "params.yaml")
    state = Status().of(project)["finetune_sweep"]
    assert (state.state, state.reasons) == ("current", ("not in params.yaml",))
    assert "finetune_sweep" not in project.stages

    (unlisted / "artifacts/sweep/sweep.json").write_text("{}", encoding="utf-8")
    state = Status().of(project)["finetune_sweep"]
    assert state.state == "changed" and "sweep.json was changed" in state.reasons[0]


def test_its_artifact_is_out_of_date_once_its_base_is_another(unlisted: Path) -> None:
    make(unlisted, ["pretrain", "expand_vocab"], [*BRIEF, "pretrain.epochs=1"])
    state = Status().of(open_project(unlisted / "params.yaml"))["finetune_sweep"]
    assert (state.state, state.reasons) == (
        "changed",
        ("not in params.yaml", "artifacts/expanded changed"),
    )


def test_one_that_begins_while_the_project_is_open_is_seen_and_runs(unlisted: Path) -> None:
    project = open_project(unlisted / "params.yaml")
    before, found = (
        project_signature(project),
        stamp(unlisted, unlisted / "params.yaml", project),
    )
    assert "finetune_dpo" not in Status().of(project)
    write_run(unlisted, "finetune_lora").rename(unlisted / "runs/finetune_dpo")
    (unlisted / "runs/finetune_dpo/lock").unlink()
    journal(unlisted / "runs/finetune_dpo", "running", 100)
    with hold(unlisted / "runs/finetune_dpo"):
        state = Status().of(project)["finetune_dpo"]
    assert state.state == "running" and state.run and state.run.done == 100
    assert project_signature(project) != before
    assert stamp(unlisted, unlisted / "params.yaml", project) != found
    assert "finetune_dpo" in [run.label for run in runs_of(unlisted)]


def test_what_a_stage_of_the_project_writes_is_no_other_stages(unlisted: Path) -> None:
    """`import` writes where `pretrain` does."""
    write_run(unlisted, "pretrain").rename(unlisted / "runs/import")
    assert "import" not in Status().of(open_project(unlisted / "params.yaml"))


def test_lora_runs_lists_it(unlisted: Path, cli: Lora) -> None:
    code, out, _ = cli("runs", "--json", cwd=unlisted)
    assert code == 0
    assert "finetune_sweep  2 adapters, rank-2" in [row["run"] for row in json.loads(out)]


def test_a_run_with_set_says_its_settings_before_it_has_made_an_artifact(project: Path) -> None:
    folder = project / "runs/finetune_lora"
    now = open_project(project / "params.yaml", BRIEF)
    asked = open_project(project / "params.yaml", [*BRIEF, "finetune_lora.rank=7"])
    with pytest.raises(KeyboardInterrupt):
        played(run(asked, STAGES["finetune_lora"], _interrupted))
    (folder / LOSS).write_text(
        "step,epoch,loss,learning_rate,grad_norm,tokens\n1,1,9,1,1,1\n", encoding="utf-8"
    )
    labels = [run.label for run in discover_runs(project, now) if run.stage == "finetune_lora"]
    assert labels == ["finetune_lora rank 7", "finetune_lora"]


def _interrupted(_job: Job) -> Generator[Event, None, Facts]:
    yield Progress(1, 2)
    raise KeyboardInterrupt


def test_damaged_settings_of_a_run_are_ignored(project: Path) -> None:
    folder = project / "runs/finetune_lora"
    (folder / LOSS).write_text(
        "step,epoch,loss,learning_rate,grad_norm,tokens\n1,1,9,1,1,1\n", encoding="utf-8"
    )
    for text in ("{", "[]", '{"run": 3}', '{"run": {"params": 3}}'):
        (folder / "settings.json").write_text(text, encoding="utf-8")
        assert "finetune_lora" in [run.stage for run in discover_runs(project, None)]
    write_json(folder / "settings.json", {"run": {"key": "", "params": {"rank": 7}}})
    now = open_project(project / "params.yaml", BRIEF)
    assert "finetune_lora rank 7" in [run.label for run in discover_runs(project, now)]
