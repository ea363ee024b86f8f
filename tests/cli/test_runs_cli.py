"""What ran with other settings than those of params.yaml: noted, written with --apply, and taken
again.
"""

import shutil
from pathlib import Path

import yaml

from pipeline.project.cache import Cache
from pipeline.project.logs import run_state
from pipeline.project.params.edit import remove_section
from pipeline.stages.registry import open_project
from pipeline.views.stages import Status, apart
from tests.conftest import Lora
from tests.helpers.projects import BRIEF, folder_bytes, make, refusal, save

OTHER = ("finetune", "lora", "--set", "finetune_lora.epochs=1", "--set", "finetune_lora.rank=2")


def section(root: Path, name: str = "finetune_lora") -> dict[str, object]:
    found: dict[str, object] = yaml.safe_load((root / "params.yaml").read_text(encoding="utf-8"))[
        name
    ]
    return found


def test_a_run_with_set_says_that_the_params_file_says_otherwise(project: Path, cli: Lora) -> None:
    code, _, err = cli(*OTHER, cwd=project)
    assert code == 0
    assert "params.yaml says otherwise: epochs 1 → 50, rank 2 → 4." in err
    assert (
        "`lora finetune lora` without --set replaces this result. --apply writes what was --set "
        "into it." in err
    )
    assert apart(open_project(project / "params.yaml"))["finetune_lora"] == (
        "epochs 1 → 50",
        "rank 2 → 4",
    )
    (project / "dvc.yaml").write_text("stages: {}\n", encoding="utf-8")
    assert "`dvc repro` replaces this result" in cli(*OTHER, cwd=project)[2]


def test_apply_writes_what_was_set_and_then_nothing_differs(project: Path, cli: Lora) -> None:
    code, out, err = cli(*OTHER, "--apply", cwd=project)
    assert code == 0 and "says otherwise" not in err
    assert "+  rank: 2" in out and "-  rank: 4" in out
    assert (section(project)["rank"], section(project)["epochs"]) == (2, 1)
    now = open_project(project / "params.yaml")
    assert "finetune_lora" not in apart(now)
    assert Status().of(now)["finetune_lora"].run is not None


def test_apply_without_set_or_with_a_trial_says_what_it_needs(project: Path, cli: Lora) -> None:
    assert "--apply writes the values of --set" in refusal(
        cli("finetune", "lora", "--apply", cwd=project)
    )
    assert "--dry-run makes nothing" in refusal(cli(*OTHER, "--dry-run", "--apply", cwd=project))


def test_a_run_says_what_it_replaces_and_that_one_can_be_taken_again(
    project: Path, cli: Lora
) -> None:
    before = folder_bytes(project / "artifacts/lora_adapter")
    _, _, err = cli(*OTHER, cwd=project)
    assert (
        "finetune_lora: replaced the earlier one: epochs 2 → 1, rank 4 → 2. `lora runs apply "
        in err
    )
    key = err.partition("`lora runs apply ")[2][:8]

    code, out, _ = cli("runs", "apply", key, cwd=project)
    assert code == 0 and "+  epochs: 2" in out
    assert folder_bytes(project / "artifacts/lora_adapter") == before
    assert (section(project)["rank"], section(project)["epochs"]) == (4, 2)
    assert "finetune_lora" not in apart(open_project(project / "params.yaml"))


def test_dvc_removes_an_output_first_and_the_note_still_comes(project: Path, cli: Lora) -> None:
    shutil.rmtree(project / "artifacts/lora_adapter")
    assert "replaced the earlier one: epochs 2 → 1, rank 4 → 2." in cli(*OTHER, cwd=project)[2]


def test_what_the_cache_lost_is_stored_again_before_it_is_replaced(
    project: Path, cli: Lora
) -> None:
    Cache(project / ".lora-cache").prune()
    _, _, err = cli(*OTHER, cwd=project)
    key = err.partition("`lora runs apply ")[2][:8]
    assert cli("runs", "apply", key, cwd=project)[0] == 0


def test_the_same_settings_replace_nothing(project: Path, cli: Lora) -> None:
    given = [part for setting in BRIEF for part in ("--set", setting)]
    _, _, err = cli("finetune", "lora", "--force", *given, cwd=project)
    assert "replaced the earlier" not in err


def test_a_run_that_has_not_finished_or_is_not_there_cannot_be_taken(
    project: Path, cli: Lora
) -> None:
    assert "There is no run nosuch" in refusal(cli("runs", "apply", "nosuch", cwd=project))
    assert "There is no run" in refusal(cli("runs", "apply", "", cwd=project))
    log = project / "runs/finetune_lora/loss.csv"
    log.write_text(
        "step,epoch,loss,learning_rate,grad_norm,tokens\n1,1,9,1,1,1\n", encoding="utf-8"
    )
    assert "has not finished" in refusal(cli("runs", "apply", "finetune_lora", cwd=project))


def test_a_run_whose_copy_is_gone_is_made_again_by_its_command(project: Path, cli: Lora) -> None:
    _, _, err = cli(*OTHER, cwd=project)
    key = err.partition("`lora runs apply ")[2][:8]
    (entry,) = (project / ".lora-cache/finetune_lora").glob(f"{key}*")
    (entry / "adapter_model.safetensors").write_bytes(b"")
    before = (project / "params.yaml").read_bytes()
    assert "Run `lora finetune lora` to make it again" in refusal(
        cli("runs", "apply", key, cwd=project)
    )
    assert (project / "params.yaml").read_bytes() == before


def test_a_run_whose_settings_cannot_be_written_is_not_taken(project: Path, cli: Lora) -> None:
    _, _, err = cli(*OTHER, cwd=project)
    key = err.partition("`lora runs apply ")[2][:8]
    params = project / "params.yaml"
    text = remove_section(params.read_text(encoding="utf-8"), "finetune_lora")
    params.write_text(
        f"{text}\nfinetune_lora: {{data: [data/finetune.de.txt]}}\n", encoding="utf-8"
    )
    before = folder_bytes(project / "artifacts/lora_adapter")
    assert "section finetune_lora of the params file is in braces" in refusal(
        cli("runs", "apply", key, cwd=project)
    )
    assert folder_bytes(project / "artifacts/lora_adapter") == before


def test_taking_a_sweep_that_no_section_names_makes_it_a_stage(project: Path, cli: Lora) -> None:
    params = project / "params.yaml"
    params.write_text(
        remove_section(params.read_text(encoding="utf-8"), "finetune_sweep"), encoding="utf-8"
    )
    (project / "dvc.yaml").write_text("stages: {}\n", encoding="utf-8")
    code, _, err = cli("runs", "apply", "finetune_sweep", cwd=project)
    assert code == 0 and "finetune_sweep is a stage of this project now." in err
    assert section(project, "finetune_sweep") == {"grid": {"rank": [1, 2]}}
    assert section(project)["epochs"] == 2


def test_a_run_on_data_that_is_gone_names_the_key(project: Path, cli: Lora) -> None:
    shutil.copy(project / "data/finetune.de.txt", project / "data/mine.txt")
    cli(*OTHER, "--set", "finetune_lora.data=data/mine.txt", cwd=project)
    key = run_state.read_settings(project / "runs/finetune_lora", "made")
    assert key is not None
    (project / "data/mine.txt").unlink()
    assert "finetune_lora.data: the run read data/mine.txt" in refusal(
        cli("runs", "apply", key.key[:8], cwd=project)
    )
    (project / "data/mine.txt").mkdir()  # a folder of `save_to_disk` is data too
    assert cli("runs", "apply", key.key[:8], cwd=project)[0] == 0


def test_the_list_of_adapters_marks_what_the_params_file_says_otherwise(
    project: Path, cli: Lora
) -> None:
    for key in BRIEF:
        if key.startswith("finetune_"):
            name, _, value = key.partition("=")
            save(project / "params.yaml", {name: yaml.safe_load(value)})
    assert "→" not in cli("adapters", cwd=project)[1]
    make(project, ["finetune_lora"], ["finetune_lora.rank=2"])
    _, out, _ = cli("adapters", cwd=project)
    assert "rank 2 → 4" in " ".join(out.split())


def test_a_sweep_shows_divergence_says_where_its_best_is_at_the_edge_and_applies_what_was_set(
    project: Path, cli: Lora
) -> None:
    grid = "finetune_sweep.grid={learning_rate: [1.0e-4, 1.0e-3]}"
    given = ["--set", grid, "--set", "finetune_lora.epochs=1", "--set", "finetune_lora.alpha=2"]
    code, out, _ = cli("finetune", "sweep", *given, "--apply", cwd=project)
    assert code == 0
    assert "divergence" in out.splitlines()[1]
    assert (
        "learning_rate 0.001 is the highest that was tried: a better one may be beyond it." in out
    )
    assert "--set 'finetune_sweep.grid={learning_rate: [0.001, 0.01, 0.1]}'" in out
    written = section(project)
    assert (written["learning_rate"], written["epochs"], written["alpha"]) == (0.001, 1, 2)
    assert section(project, "finetune_sweep") == {"grid": {"rank": [1, 2, 4, 8]}}
