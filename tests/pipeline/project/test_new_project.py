"""`lora new`: a project in a folder of its own, which DVC runs wherever it lies."""

import shutil
import signal
import tomllib
from functools import partial
from pathlib import Path

import pytest
import yaml

from pipeline.project import new_project
from pipeline.project.dvc_yaml import CODE_HEADER, render_dvc_yaml, renew_code_yaml
from pipeline.stages.registry import GRAPH, open_project
from tests.conftest import Lora
from tests.helpers import families
from tests.helpers.kill_points import count_changes, die_at_change
from tests.helpers.process import Forked
from tests.helpers.projects import (
    GIVEN,
    LORA,
    PIPELINE,
    ROOT,
    STAGES,
    dvc,
    folder_bytes,
    git,
    load,
    save,
)
from tests.helpers.projects import new_project as new_folder

CARD = (
    *("pretrain", "expand_vocab", "finetune_full", "finetune_freeze", "finetune_lora"),
    *("merge", "evaluate"),
)


def params_of(folder: Path, text: str, *data: str) -> Path:
    """A params file of one's own, with its data files beside it."""
    folder.mkdir(exist_ok=True)
    for name in ("data/pretrain.de.txt", "data/finetune.de.txt", "data/prompts.yaml", *data):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name, encoding="utf-8")
    (folder / "mine.yaml").write_text(text, encoding="utf-8")
    return folder / "mine.yaml"


@pytest.mark.slow
def test_a_new_project_is_what_dvc_needs_and_nothing_of_it_is_ever_overwritten(
    cli: Lora, tmp_path: Path
) -> None:
    code, out, err = cli("new", "a/b", cwd=tmp_path)
    folder = tmp_path / "a/b"
    assert (code, err) == (0, "")
    assert "added data/pretrain.de.txt" in out and "cd a/b; dvc repro; lora-tui" in out
    assert (folder / "params.yaml").read_bytes() == (ROOT / "params.yaml").read_bytes()
    assert load(folder / "params.yaml") == load(ROOT / "params.yaml")
    config = (folder / ".dvc/config").read_text(encoding="utf-8")
    for line in (
        "no_scm = True",
        "analytics = false",
        "autostage = false",
        'type = "reflink,hardlink,copy"',
    ):
        assert line in config
    before = folder_bytes(folder)
    assert cli("new", "b", cwd=tmp_path / "a")[1].startswith("b: nothing to add")
    assert folder_bytes(folder) == before

    for name in ("dvc.yaml", "data/prompts.yaml", "code.yaml"):
        (folder / name).unlink()
    mine = (folder / "data/finetune.de.txt", folder / ".dvcignore")
    for path in mine:
        path.write_text("mine", encoding="utf-8")
    assert (
        "b: added data/prompts.yaml, dvc.yaml, code.yaml" in cli("new", "b", cwd=tmp_path / "a")[1]
    )
    assert [path.read_text(encoding="utf-8") for path in mine] == ["mine", "mine"]


@pytest.mark.slow
def test_inside_a_repository_that_ignores_it_dvc_lists_every_stage_and_runs_the_first_again_for_other_code(
    cli: Lora, tmp_path: Path
) -> None:
    git(tmp_path, "init", "-q")
    (tmp_path / ".gitignore").write_text("/project/\n", encoding="utf-8")
    assert cli("new", "project", cwd=tmp_path)[0] == 0
    folder = tmp_path / "project"
    listed, ran, again = dvc(folder, "stage list --name-only", "repro pretrain", "repro pretrain")
    assert listed.split() == list(CARD)
    assert "> lora pretrain\n" in ran and (folder / "artifacts/base/manifest.json").is_file()
    assert "Stage 'pretrain' didn't change, skipping" in again
    codes = (folder / "code.yaml").read_text(encoding="utf-8")
    (folder / "code.yaml").write_text(codes.replace("pretrain: ", "pretrain: 0"), encoding="utf-8")
    assert "Running stage 'pretrain'" in dvc(folder, "repro --dry pretrain")[0]


@pytest.mark.slow
def test_why_dvc_fails_is_said(cli: Lora, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fake/dvc").mkdir(parents=True)
    (tmp_path / "fake/dvc/__init__.py").touch()
    said = "\nERROR: unexpected error - no room\n\nHaving any troubles?"
    code = f"import sys\nsys.stderr.write({said!r})\nsys.exit(255)\n"
    (tmp_path / "fake/dvc/__main__.py").write_text(code, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "fake"))
    exit_code, _, err = cli("new", "project", cwd=tmp_path)
    assert exit_code == 1 and err.endswith(
        "project: unexpected error - no room. Try `dvc init --no-scm` there.\n"
    )
    assert not (tmp_path / "project/dvc.yaml").exists()


def test_the_next_command_can_be_copied_if_the_folder_has_a_space(
    cli: Lora, tmp_path: Path
) -> None:
    out = cli("new", "my project", cwd=tmp_path)[1]
    assert out.endswith("Next: cd 'my project'; dvc repro; lora-tui\n")


@pytest.mark.slow
def test_a_params_file_brings_its_data_and_the_base_is_written_into_it(
    cli: Lora, tmp_path: Path
) -> None:
    text = "# mine\npretrain:\n  seed: 3   # why\nfinetune_lora:\n  data: other.txt\n"
    params_of(tmp_path / "from", text, "other.txt")
    (tmp_path / "models").mkdir()
    (tmp_path / "models/toy.gguf").write_bytes(b"GGUF")
    asked = ("new", "project", "--params", "from/mine.yaml", "--base", "models/toy.gguf")
    assert cli(*asked, cwd=tmp_path)[0] == 0
    written = (tmp_path / "project/params.yaml").read_text(encoding="utf-8")
    assert "# mine\n" in written and "  seed: 3   # why\n" in written
    settings = load(tmp_path / "project/params.yaml")
    assert settings.origin.base == "../models/toy.gguf"
    assert (tmp_path / "project/other.txt").read_text(encoding="utf-8") == "other.txt"
    stages = yaml.safe_load((tmp_path / "project/dvc.yaml").read_text(encoding="utf-8"))["stages"]
    assert stages["import"]["deps"] == ["${base}"]
    assert cli(*asked, cwd=tmp_path)[1:] == (
        "project: nothing to add\nNext: cd project; dvc repro; lora-tui\n",
        "",
    )
    dvc(tmp_path / "project", "status")  # every key that dvc.yaml names is in the params file
    for given, reason in (
        ("minigpt", "not minigpt. Edit it there"),
        ("models/no.gguf", "No such file"),
    ):
        code, _, err = cli("new", "project", "--base", given, cwd=tmp_path)
        assert code == 1 and reason in err


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.slow
def test_a_checkpoint_folder_is_the_base_of_a_project_beside_it(
    absolute: bool, cli: Lora, tmp_path: Path
) -> None:
    other = families.new_project(tmp_path / "other", families.FAMILIES["llama"])
    base = str(other / "base") if absolute else "other/base"
    assert (
        cli(
            "new", "deep/project", "--base", base, "--data", "other/data/texts.jsonl", cwd=tmp_path
        )[0]
        == 0
    )
    assert load(tmp_path / "deep/project/params.yaml").origin.base == "../../other/base"
    stages = yaml.safe_load((tmp_path / "deep/project/dvc.yaml").read_text(encoding="utf-8"))[
        "stages"
    ]
    assert stages["import"]["deps"] == ["${base}"]
    code, _, err = cli("import", cwd=tmp_path / "deep/project")
    assert code == 0, err
    assert (tmp_path / "deep/project/artifacts/base/model.safetensors").is_file()


@pytest.mark.parametrize("base", ["org/model", "org/model@v1"])
def test_a_hub_id_is_no_file_for_dvc_to_watch(base: str, cli: Lora, tmp_path: Path) -> None:
    source = params_of(tmp_path / "from", "finetune_lora:\n  data: other.txt\n", "other.txt")
    assert cli("new", "project", "--params", str(source), "--base", base, cwd=tmp_path)[0] == 0
    stages = yaml.safe_load((tmp_path / "project/dvc.yaml").read_text(encoding="utf-8"))["stages"]
    assert "deps" not in stages["import"]
    assert load(tmp_path / "project/params.yaml").origin.base == base


@pytest.mark.slow
def test_a_params_file_gets_the_sections_of_what_its_stages_need(cli: Lora, tmp_path: Path) -> None:
    source = params_of(tmp_path / "from", "merge:\n  max_logit_difference: 1.0\n")
    assert cli("new", "project", "--params", str(source), cwd=tmp_path)[0] == 0
    project = open_project(tmp_path / "project/params.yaml")
    assert list(project.stages) == ["pretrain", "expand_vocab", "finetune_lora", "merge"]
    dvc(tmp_path / "project", "status")
    assert project.params == load(source).replaced(project.params.sections), "with their defaults"


@pytest.mark.slow
def test_a_project_has_the_methods_that_are_asked_for_and_no_other(
    cli: Lora, tmp_path: Path
) -> None:
    assert cli("new", "one", "--methods", "prefix, sweep", cwd=tmp_path)[0] == 0
    one = open_project(tmp_path / "one/params.yaml")
    assert list(one.stages) == [
        *(
            "pretrain",
            "expand_vocab",
            "finetune_lora",
            "finetune_prefix",
            "finetune_sweep",
            "evaluate",
        )
    ], "a sweep varies the section of LoRA"
    assert list(one.variants) == ["base", "expanded", "lora", "prefix"]
    assert cli("new", "two", "--methods", "full,lora", cwd=tmp_path)[0] == 0
    two = open_project(tmp_path / "two/params.yaml")
    assert list(two.stages) == [*CARD[:3], *CARD[4:]]
    dvc(tmp_path / "two", "status")
    for arguments, reason in (
        (
            ("three", "--methods", "lora,qlora"),
            "--methods: unknown method qlora. Known: scratch, full, freeze, lora",
        ),
        (("two", "--methods", "lora"), "--methods is for a new project"),
    ):
        code, _, err = cli("new", *arguments, cwd=tmp_path)
        assert code == 1 and reason in err


def test_what_would_be_written_otherwise_is_said(cli: Lora, tmp_path: Path) -> None:
    merge = "merge:\n  prompts: data/prompts.yaml\n"
    source = params_of(
        tmp_path / "from", f"finetune_lora:\n  data: a.txt\n{merge}", "a.txt", "b.txt"
    )
    asked = ("new", "project", "--params", str(source))
    assert cli(*asked, cwd=tmp_path)[2] == ""
    source.write_text(f"finetune_lora:\n  data: b.txt\n{merge}", encoding="utf-8")
    (source.parent / "data/prompts.yaml").write_text("changed", encoding="utf-8")
    (tmp_path / "project/dvc.yaml").write_text("stages: {}\n", encoding="utf-8")
    code, _, err = cli(*asked, cwd=tmp_path)
    assert code == 0
    for name in ("params.yaml", "dvc.yaml", "data/prompts.yaml"):
        assert f"project/{name} is kept" in err
    assert load(tmp_path / "project/params.yaml").finetune_lora.data == "a.txt"


def test_nothing_is_written_where_something_is_wrong(cli: Lora, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.txt").write_text("mine", encoding="utf-8")
    (tmp_path / "file").write_text("", encoding="utf-8")
    outside = params_of(tmp_path / "from", "merge:\n  prompts: ../full/thesis.txt\n")
    missing = params_of(tmp_path / "gone", "merge:\n  prompts: gone.yaml\n")
    wrong = params_of(tmp_path / "wrong", "merge:\n  prompt: x\n")
    before = folder_bytes(tmp_path)
    for arguments, reason in (
        (["full"], "has files, but no params.yaml: it is not a project"),
        (["file"], "is a file"),
        (
            ["p", "--params", str(outside)],
            "merge.prompts names ../full/thesis.txt, which is not a file in",
        ),
        (["p", "--params", str(missing)], "merge.prompts names gone.yaml, which is not a file in"),
        (["p", "--params", str(wrong)], "unknown key merge.prompt"),
        (["p", "--params", "nowhere.yaml"], "nowhere.yaml does not exist"),
        (["p", "--base", "nowhere", "--data", "file"], "base must be minigpt"),
        ([str(ROOT)], "the program's own repository"),
    ):
        code, _, err = cli("new", *arguments, cwd=tmp_path)
        assert code == 1 and reason in err, err
    assert folder_bytes(tmp_path) == before
    assert not (tmp_path / "p").exists()


@pytest.mark.slow
def test_killed_at_any_change_of_a_file_a_new_project_is_made_whole_by_the_same_command(
    tmp_path: Path,
) -> None:
    """A file that exists is never overwritten, so half a data file or half of DVC's folder would
    stay.
    """
    command, counter = [LORA, "new", "p"], tmp_path / "counter"
    counter.touch()
    assert Forked(command, tmp_path, first=partial(count_changes, str(counter))).end()[0] == 0
    (tmp_path / "p").rename(tmp_path / "whole")
    expected, changes = folder_bytes(tmp_path / "whole"), counter.stat().st_size
    for number in (changes // 3, changes - 3):
        code, errors = Forked(
            command, tmp_path, first=partial(die_at_change, number, after=True)
        ).end()
        assert code == -signal.SIGKILL, errors
        left = folder_bytes(tmp_path / "p")
        assert all(content == expected[name] for name, content in left.items() if name in expected)
        assert "params.yaml" not in left or left.keys() >= expected.keys()
        code, errors = Forked(command, tmp_path).end()
        assert (code, folder_bytes(tmp_path / "p")) == (0, expected), errors
        shutil.rmtree(tmp_path / "p")


def test_an_installed_package_begins_with_the_params_that_came_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pyproject.toml puts these two beside the packages."""
    force = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for line in (
        '"params.yaml" = "lora_workbench_defaults/params.yaml"',
        '"data" = "lora_workbench_defaults/data"',
    ):
        assert line in force
    built = tomllib.loads(force)["tool"]["hatch"]["build"]
    assert "document" not in str(built), "an extension is a package of its own"
    shutil.copytree(ROOT / "data", tmp_path / "lora_workbench_defaults/data")
    installed = params_of(
        tmp_path / "lora_workbench_defaults", "merge:\n  prompts: data/prompts.yaml\n"
    )
    installed.rename(installed.parent / "params.yaml")
    (installed.parent / "data/pretrain.de.txt").write_text("installed", encoding="utf-8")
    monkeypatch.setattr(new_project, "DEFAULTS", installed.parent)
    new_project.create(tmp_path / "project", GRAPH)
    assert (tmp_path / "project/data/pretrain.de.txt").read_text(encoding="utf-8") == "installed"


def test_the_code_that_stages_run_is_one_more_of_their_params(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "project"
    new_project.create(folder, GRAPH)
    found = yaml.safe_load((folder / "code.yaml").read_text(encoding="utf-8"))
    assert list(found) == list(STAGES)
    monkeypatch.setattr(
        "pipeline.project.provenance.code_digest", lambda *modules: f"another {modules[0]}"
    )
    assert new_project.create(folder, GRAPH)[0] == ["code.yaml"]


@pytest.mark.parametrize(
    "text", ["[" * 3000, "a: !!bool x\n", "a: !!timestamp x\n"], ids=["deep", "bool", "time"]
)
def test_whatever_is_in_the_files_for_dvc_the_project_is_completed(
    tmp_path: Path, text: str
) -> None:
    folder = tmp_path / "project"
    new_project.create(folder, GRAPH)
    (folder / "dvc.yaml").write_text(text, encoding="utf-8")
    (folder / "code.yaml").write_bytes(b"\xff\n")
    renew_code_yaml(open_project(folder / "params.yaml"))
    assert (folder / "code.yaml").read_text(encoding="utf-8").startswith(CODE_HEADER)
    (folder / "code.yaml").write_bytes(b"\xff\n")
    added, (note,) = new_project.create(folder, GRAPH)
    assert added == ["code.yaml"] and f"{folder / 'dvc.yaml'} is kept" in note


def test_a_method_that_is_asked_for_twice_is_one(tmp_path: Path) -> None:
    new_project.create(tmp_path / "project", GRAPH, methods=["dpo", "dpo"])
    assert "finetune_dpo" in open_project(tmp_path / "project/params.yaml").stages


def test_a_data_file_in_the_home_folder_stays_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.yaml").write_text("[]\n", encoding="utf-8")
    source = params_of(tmp_path / "from", "merge:\n  prompts: ~/mine.yaml\n")
    new_project.create(tmp_path / "project", GRAPH, source)
    stages = yaml.safe_load((tmp_path / "project/dvc.yaml").read_text(encoding="utf-8"))["stages"]
    assert str(tmp_path / "mine.yaml") in stages["merge"]["deps"]


def test_empty_files_are_left_out_and_one_named_twice_is_watched_once(tmp_path: Path) -> None:
    text = "evaluate:\n  old_data: a.txt\n  new_data: a.txt\n"
    params = params_of(tmp_path, text, "a.txt")
    stages = yaml.safe_load(render_dvc_yaml(open_project(params)))["stages"]
    places = [dep for dep in stages["evaluate"]["deps"] if dep.startswith("$")]
    assert places == ["${evaluate.old_data}"]


@pytest.mark.slow
def test_dvc_runs_a_new_project_in_a_folder_of_its_own(cli: Lora, tmp_path: Path) -> None:
    every = new_folder(tmp_path / "every") / "params.yaml"
    assert cli("new", "project", "--params", str(every), cwd=tmp_path)[0] == 0
    folder = tmp_path / "project"
    params = folder / "params.yaml"
    save(params, GIVEN)
    ran, again = dvc(folder, "repro", "repro")
    assert ran.count("Running stage") == len(PIPELINE)
    assert (folder / "artifacts/evaluation/report.md").is_file()
    assert "Data and pipelines are up to date" in again
    (folder / "code.yaml").write_text(
        (folder / "code.yaml").read_text(encoding="utf-8").replace("merge: ", "merge: 0"),
        encoding="utf-8",
    )
    assert "Running stage 'merge'" in dvc(folder, "repro")[0]
