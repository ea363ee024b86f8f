"""A project that builds on another: `project:` in its params file."""

import json
import shutil
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.files import artifact
from pipeline.stages.registry import GRAPH, open_project
from pipeline.views.runs import discover_runs
from pipeline.views.stages import Status, outdated
from tests.conftest import Lora
from tests.helpers.json_files import read_json
from tests.helpers.projects import ROOT, dvc, folder_bytes, make, refusal

CHILD = ("train_from_scratch", "finetune_prefix", "finetune_prompt", "finetune_sweep", "evaluate")


@pytest.fixture
def copied(houses: Path, tmp_path: Path) -> Path:
    shutil.copytree(houses, tmp_path / "houses")
    return tmp_path / "houses"


def test_a_project_has_the_stages_of_its_own_sections_and_reads_all_else_where_its_parent_has_it(
    houses: Path,
) -> None:
    parent, child = (
        open_project(houses / "params.yaml"),
        open_project(houses / "child/params.yaml"),
    )
    assert not set(child.stages) & set(parent.stages) - {"evaluate"}
    assert (
        set(child.readable)
        == set(GRAPH.stages) - {"finetune_ia3", "finetune_dpo", "import"}
        == set(child.stages) | set(parent.stages)
    )
    assert (
        child.artifact("finetune_lora")
        == parent.artifact("finetune_lora")
        == houses / "artifacts/lora_adapter"
    )
    assert child.artifact_name("finetune_lora") == "../artifacts/lora_adapter"
    assert (
        child.artifact("evaluate")
        == houses / "child/artifacts/evaluation"
        != parent.artifact("evaluate")
    )
    assert child.cache == parent.cache, "one cache for both"
    assert list(parent.variants) == ["base", "expanded", "full", "freeze", "lora", "merged"]
    assert list(child.variants) == [
        stage.variant
        for name, stage in GRAPH.product.items()
        if stage.variant and name not in ("finetune_ia3", "finetune_dpo", "import")
    ]


def test_a_child_of_a_pretrained_base_has_its_defaults(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text(
        "base: model.gguf\nfinetune_lora: {rank: 16}\n", encoding="utf-8"
    )
    (tmp_path / "child").mkdir()
    child = tmp_path / "child/params.yaml"
    child.write_text("project: ../params.yaml\nfinetune_dpo: {rank: 4}\n", encoding="utf-8")
    params = open_project(child).params
    assert (
        params.finetune_lora.alpha,
        params.finetune_dpo.alpha,
        params.finetune_dpo.schedule,
    ) == (32, 8, "linear")
    assert params.source("finetune_dpo", "schedule") == "default for a pretrained base"


def test_settings_of_the_parent_name_the_same_files_from_the_childs_folder(houses: Path) -> None:
    parent, child = (
        open_project(houses / "params.yaml"),
        open_project(houses / "child/params.yaml"),
    )
    for name in parent.stages:
        stage = GRAPH.stages[name]
        ours, theirs = child.data_files(stage), parent.data_files(stage)
        assert [(child.root / file).resolve() for file in ours] == [
            (parent.root / file).resolve() for file in theirs
        ]
    sweep = child.stages["finetune_sweep"]
    assert child.stage_params(sweep)["retention_data"] == "../data/retain.de.txt"
    assert child.inputs(sweep).keys() >= {"../artifacts/expanded", "../data/retain.de.txt"}


def test_a_file_that_a_sweep_of_the_parent_measures_on_is_the_parents(tmp_path: Path) -> None:
    """Its settings are those of two sections."""
    (tmp_path / "params.yaml").write_text(
        "pretrain: {}\nfinetune_sweep: {old_data: old.txt}\n", encoding="utf-8"
    )
    (tmp_path / "child").mkdir()
    child = tmp_path / "child/params.yaml"
    child.write_text("project: ../params.yaml\nfinetune_dpo: {}\n", encoding="utf-8")
    assert open_project(child).params.finetune_sweep.old_data == "../old.txt"


@pytest.mark.parametrize(("base", "command"), [("minigpt", "pretrain"), ("model.gguf", "import")])
def test_what_makes_the_base_runs_in_the_parent(base: str, command: str, tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text(f"base: {base}\n", encoding="utf-8")
    (tmp_path / "child").mkdir()
    child = tmp_path / "child/params.yaml"
    child.write_text("project: ../params.yaml\nfinetune_dpo: {}\n", encoding="utf-8")
    for stage in ("pretrain", "expand_vocab"):
        assert open_project(child).command(stage) == f"`lora {command}` in {tmp_path}"


def test_the_child_makes_of_its_parents_artifacts_what_one_project_makes(
    houses: Path, brief: Path
) -> None:
    for output in ("from_scratch", "prefix", "prompt", "sweep"):
        files = folder_bytes(brief / "artifacts" / output)
        weights = {name: data for name, data in files.items() if "manifest" not in name}
        made = folder_bytes(houses / "child/artifacts" / output)
        assert weights and {name: made[name] for name in weights} == weights
    whole, ours = (
        read_json(folder / "artifacts/evaluation/metrics.json")
        for folder in (brief, houses / "child")
    )
    assert ours == whole
    less = read_json(houses / "artifacts/evaluation/metrics.json")
    assert less == {
        name: whole[name] for name in ("base", "expanded", "full", "freeze", "lora", "merged")
    }
    manifest = artifact.verify(houses / "child/artifacts/evaluation")
    assert manifest["variants"]["merged"] == "../artifacts/lora_merged"
    assert manifest["inputs"]["../artifacts/lora_merged"] == artifact.digest(
        houses / "artifacts/lora_merged"
    )


def test_what_changes_in_the_parent_is_seen_in_the_child(copied: Path) -> None:
    child = open_project(copied / "child/params.yaml")
    states = Status().of(child)
    assert {name: states[name].state for name in (*CHILD, "merge")} == dict.fromkeys(
        (*CHILD, "merge"), "current"
    )
    make(copied, ["finetune_full"], ["finetune_full.seed=1"])
    again = Status().of(child)
    assert (again["finetune_full"].state, again["finetune_prefix"].state) == ("changed", "current")
    assert again["evaluate"].state != "current"
    assert outdated(child, ["evaluate"]) == {"evaluate": ("../artifacts/full_finetuned changed",)}
    make(copied, ["expand_vocab"], ["expand_vocab.seed=1"])
    with pytest.raises(
        UserError, match=r"artifacts/from_scratch was made from another \.\./artifacts/expanded"
    ):
        make(copied / "child", ["evaluate"])


def test_the_childs_runs_are_beside_its_parents(houses: Path) -> None:
    found = discover_runs(houses / "child", open_project(houses / "child/params.yaml"))
    assert {run.stage for run in found} >= {
        "finetune_lora",
        "finetune_prefix",
        "train_from_scratch",
        "pretrain",
    }
    place = {run.stage: run.log_folder for run in found}
    assert place["finetune_lora"].is_relative_to(houses / "artifacts")
    assert place["finetune_prefix"].is_relative_to(houses / "child")


def test_the_parent_lists_no_runs_of_its_child_though_both_have_one_cache(houses: Path) -> None:
    project = open_project(houses / "params.yaml")
    assert (project.cache / "finetune_prefix").is_dir()
    assert {run.stage for run in discover_runs(houses, project)} <= set(project.stages)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (("finetune", "lora"), "finetune_lora is a stage of ../params.yaml. Run it in "),
        (
            ("finetune", "prefix", "--set", "finetune_lora.rank=2"),
            "--set finetune_lora: params.yaml has no such",
        ),
        (
            ("finetune", "prefix", "--set", "project.x=2"),
            "--set project.x: project is not a section",
        ),
    ],
)
def test_the_parents_stages_and_settings_are_the_parents(
    command: tuple[str, ...], message: str, copied: Path, cli: Lora
) -> None:
    before = folder_bytes(copied)
    assert message in refusal(cli(*command, cwd=copied / "child"))
    assert folder_bytes(copied) == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("project: ../gone.yaml\n", "gone.yaml does not exist"),
        (
            "project: [a]\n",
            "project must be the path of a params file, got ['a']. Edit params.yaml.",
        ),
        ("project: 3\n", "project must be the path of a params file, got 3"),
        ("project: ../child/params.yaml\n", "project ../child/params.yaml itself builds on"),
        ("project: params.yaml\n", "project params.yaml itself builds on"),
        ("project: ../broken.yaml\n", "unknown key finetune_lora.rang. Did you mean rank?"),
    ],
)
def test_a_parent_that_cannot_be_is_refused(
    text: str, message: str, copied: Path, cli: Lora
) -> None:
    (copied / "broken.yaml").write_text("finetune_lora:\n  rang: 3\n", encoding="utf-8")
    (copied / "third").mkdir()
    (copied / "third/params.yaml").write_text(text, encoding="utf-8")
    assert message in refusal(cli("evaluate", cwd=copied / "third"))


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            ("finetune", "prefix"),
            "finetune_prefix is not a stage of this project: params.yaml has no such section. ",
        ),
        (("train-from-scratch",), "train_from_scratch is not a stage of this project"),
        (("finetune", "sweep"), "finetune_sweep is not a stage of this project"),
    ],
)
def test_a_stage_that_a_project_does_not_have_is_refused(
    command: tuple[str, ...], message: str, copied: Path, cli: Lora
) -> None:
    assert message in refusal(cli(*command, cwd=copied))


def test_the_last_model_and_the_comparison_are_those_of_both(copied: Path, cli: Lora) -> None:
    code, out, err = cli("compare", "der hund läuft im", "--json", cwd=copied / "child")
    assert code == 0, err
    assert list(json.loads(out)) == list(open_project(copied / "child/params.yaml").variants)
    code, out, err = cli("prompt", "der hund läuft im", "--json", cwd=copied / "child")
    assert code == 0, err
    assert json.loads(out)["adapter"] or json.loads(out)["model"]


@pytest.mark.slow
def test_dvc_at_the_root_knows_the_stages_of_its_params_alone(origin: Path) -> None:
    """Though another project lies in a folder of the same repository."""
    (stages,) = dvc(origin, "stage list --all --name-only")
    assert sorted(stages.split()) == sorted(open_project(ROOT / "params.yaml").stages)
