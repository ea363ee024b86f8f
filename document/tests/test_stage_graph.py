"""document/dvc.yaml says what the stage graph says, and the document's stages are stages like any."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tests.lab_projects import COMMAND, DOCUMENT, GIVEN, new_project

from pipeline.errors import UserError
from pipeline.project.dvc_yaml import render_dvc_yaml
from pipeline.project.provenance import code_files
from pipeline.stages.registry import GRAPH, METHODS, open_project
from tests.conftest import Lora
from tests.helpers.projects import ROOT, STAGES, dvc, git, load, refusal, shorten


def test_dvc_knows_all_that_a_stage_reads_runs_and_writes() -> None:
    """The committed file is the generated one, with comments of its own."""
    committed = (DOCUMENT / "dvc.yaml").read_text(encoding="utf-8")
    lines = [line for line in committed.splitlines() if not line.startswith("#")]
    assert lines == render_dvc_yaml(open_project(DOCUMENT / "params.yaml")).splitlines()


def test_the_shipped_files_have_all_stages_but_some_methods() -> None:
    product, document = (
        yaml.safe_load((folder / "params.yaml").read_text(encoding="utf-8"))
        for folder in (ROOT, DOCUMENT)
    )
    assert document.pop("project") == "../params.yaml"
    unused = set(GRAPH.sections) - (product.keys() | document.keys())
    assert unused <= {"import", *(stage.name for stage in METHODS.values())}, (
        "the document need not know every method"
    )
    assert product.keys() & document.keys() == {"evaluate"}


def test_what_a_study_teaches_as_the_sections_of_others_say_is_among_what_it_reads(
    tmp_path: Path,
) -> None:
    """Else a changed file would leave the study as it was."""
    given = [
        "finetune_full.data=data/retain.de.txt",
        "train_from_scratch.data=[data/euro.en.jsonl]",
    ]
    project = open_project(new_project(tmp_path) / "params.yaml", given)
    for study, files in (
        ("methods", {"data/retain.de.txt", "data/euro.en.jsonl"}),
        ("forgetting", {"data/retain.de.txt"}),
    ):
        assert files <= set(project.data_files(STAGES[f"study_{study}"]))


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_is_the_command_that_the_program_has(name: str) -> None:
    assert STAGES[name].command == " ".join(["lora", *COMMAND[name]])


def test_studies_stand_behind_the_programs_stages_in_the_documents_order() -> None:
    measured = [name for name, stage in STAGES.items() if stage.is_measurement]
    assert list(STAGES)[-len(measured) :] == measured
    assert measured[0] == "study_intrinsic_dimension" and measured[-2:] == ["figures", "claims"]
    project = open_project(DOCUMENT / "params.yaml")
    assert [name for name in project.stages if name in measured] == measured


def test_a_changed_rank_concerns_the_documents_stages_that_read_its_section_or_an_artifact_made_with_it() -> (
    None
):
    stages = yaml.safe_load((DOCUMENT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    product = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    changed = {
        f"../{path}" for name in ("finetune_lora", "merge") for path in product[name]["outs"]
    }
    concerned = set()
    for name, stage in stages.items():
        if (
            {"../params.yaml": ["finetune_lora"]} in stage["params"]
            or changed & set(stage["deps"])
            or any(
                "finetune_lora" in one.get("../params.yaml", ())
                for one in stage["params"]
                if isinstance(one, dict)
            )
        ):
            concerned.add(name)
            changed |= {
                str(Path(out).parent if "evaluation" in out else out) for out in stage["outs"]
            }
    assert concerned == {
        *("finetune_sweep", "evaluate", "figures", "claims"),
        *(
            f"study_{name}"
            for name in ("knowledge_correction", "methods", "forgetting", "learning_rate")
        ),
    }


@pytest.mark.slow
def test_code_files_are_those_that_python_imports() -> None:
    """The static walk finds every module of the document and of the program that importing a stage
    loads, but those that a registry finds.
    """
    found_by_registry = ("pipeline.stages.methods.", "lab.studies.")
    modules = sorted({stage.module for stage in STAGES.values() if stage.is_measurement})
    done = subprocess.run(
        [sys.executable, "-c", IMPORTED, *modules], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [line[0] for line in lines] == modules
    for module, *imported in lines:
        found = {
            ".".join(
                path.relative_to(DOCUMENT if "lab" in path.parts else ROOT).with_suffix("").parts
            )
            for path in code_files(module)
        }
        assert module in imported
        statically = {name.removesuffix(".__init__") for name in found}
        assert {
            name for name in imported if not name.startswith(found_by_registry)
        } <= statically, module


IMPORTED = """
import importlib, os, sys
import matplotlib.pyplot, torch, transformers  # once: they take most of the time
for module in sys.argv[1:]:
    child = os.fork()
    if not child:  # where nothing of ours is imported yet
        importlib.import_module(module)
        ours = (name for name in sys.modules if name.split(".")[0] in ("pipeline", "lab"))
        print(module, *ours, flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, module
"""


@pytest.mark.slow
def test_dvc_knows_the_stages_of_each_project_in_its_folder_alone(origin: Path) -> None:
    for folder in ("", "document"):
        (stages,) = dvc(origin / folder, "stage list --all --name-only")
        project = open_project(ROOT / folder / "params.yaml")
        assert sorted(stages.split()) == sorted(project.stages)


# What a study needs of its project


def test_a_study_reads_its_parents_sections_and_artifacts(houses: Path) -> None:
    child = open_project(houses / "document/params.yaml")
    study = child.stages["study_methods"]
    assert child.stage_params(study)["finetune_lora.retention_data"] == "../data/retain.de.txt"
    assert child.inputs(study).keys() >= {"../artifacts/expanded", "../data/retain.de.txt"}


@pytest.mark.parametrize("command", [("study", "rank"), ("figures",)], ids=" ".join)
def test_a_study_that_the_project_does_not_have_is_refused(
    command: tuple[str, ...], houses: Path, cli: Lora
) -> None:
    name = "_".join(command)
    assert f"{name} is not a stage of this project" in refusal(cli(*command, cwd=houses))


def test_on_another_base_studies_of_minigpt_are_no_stages_and_say_why(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text(
        "base: model.gguf\nstudy_rank: {}\nstudy_knowledge_correction: {}\nclaims: {}\n",
        encoding="utf-8",
    )
    project = open_project(tmp_path / "params.yaml")
    assert "study_rank" not in project.stages and "claims" not in project.stages
    with pytest.raises(UserError, match=r"study_rank measures what the document says of MiniGPT"):
        project.stage("study_rank")


def test_a_seed_twice_is_refused() -> None:
    with pytest.raises(UserError, match=r"study_rank\.seeds has 1 twice\. Remove one of them"):
        load(DOCUMENT / "params.yaml", ["study_rank.seeds=[1, 1]"])


def test_what_studies_read_comes_with_a_new_project(cli: Lora, tmp_path: Path) -> None:
    source = tmp_path / "params.yaml"
    source.write_text("study_fact_correction: {}\nclaims: {}\n", encoding="utf-8")
    shutil.copytree(ROOT / "data", tmp_path / "data")
    (tmp_path / "data/fact_correction.de.txt").unlink()
    code, _, err = cli("new", "project", "--params", str(source), cwd=tmp_path)
    assert code == 0, err
    for file in (DOCUMENT / "data/document.yaml", ROOT / "data/fact_correction.de.txt"):
        assert (tmp_path / "project/data" / file.name).read_bytes() == file.read_bytes()


# DVC


@pytest.mark.slow
@pytest.mark.rest
def test_two_fresh_clones_give_the_same_locks(origin: Path, tmp_path: Path) -> None:
    locks = []
    for name in ("one", "two"):
        git(tmp_path, "clone", "-q", str(origin), name)
        root = tmp_path / name
        path = os.pathsep.join(map(str, (root, root / "document")))
        shorten(root, root / "document", given=GIVEN)
        dvc(root, "repro", code=path)
        renew = [sys.executable, "-m", "cli.main", "new", "document"]  # as `make document` does
        subprocess.run(renew, cwd=root, env={**os.environ, "PYTHONPATH": path}, check=True)
        dvc(root / "document", "repro", code=path)
        locks.append([(folder / "dvc.lock").read_bytes() for folder in (root, root / "document")])
    assert locks[0] == locks[1]
    for folder in (root, root / "document"):
        (ran,) = dvc(folder, "repro", code=path)
        assert "Data and pipelines are up to date" in ran
