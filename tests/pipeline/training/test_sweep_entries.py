"""A sweep's adapters in the cache, each by itself: a grown grid, and parts that train apart."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import UserError
from pipeline.files import artifact
from pipeline.project.cache import ADAPTERS
from pipeline.project.runner import run, run_part
from pipeline.stages.methods import sweep
from pipeline.stages.registry import open_project
from tests.helpers.process import Forked
from tests.helpers.projects import (
    BRIEF,
    LORA,
    STAGES,
    lora,
    make_base,
    new_project,
    note_texts,
    played,
    swept_weights,
)

STAGE = STAGES["finetune_sweep"]
HELD_OUT = [*BRIEF, "finetune_lora.eval_share=0.3"]
DRAWN = {
    "search": "optuna",
    "trials": 6,
    "generation": 3,
    "grid": {"rank": [1, 2, 4], "learning_rate": {"low": 1e-4, "high": 1e-1, "log": True}},
}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return make_base(new_project(tmp_path / "mini"), BRIEF)


def settings(values: Mapping[str, Any]) -> list[str]:
    return [f"finetune_sweep.{key}={json.dumps(value)}" for key, value in values.items()]


def swept(
    root: Path, values: Mapping[str, Any], given: Sequence[str] = BRIEF, **options: Any
) -> Any:
    """Run the whole sweep; returns its manifest and the keys of what trained in its run folder."""
    opened = open_project(root / "params.yaml", [*given, *settings(values)])
    before = trained(root)
    manifest, events = played(run(opened, STAGE, **options))
    return manifest, trained(root)[len(before) :], note_texts(events)


def trained(work: Path) -> list[str]:
    log = work / "runs" / "finetune_sweep" / sweep.TRAINED
    return list(map(json.loads, log.read_text().splitlines())) if log.exists() else []


def part(
    root: Path, work: Path, names: Sequence[str], values: Mapping[str, Any], given: Sequence[str]
) -> list[str]:
    """Train some adapters in a folder of their own; returns the keys of what trained there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORA_WORK", str(work))
        opened = open_project(root / "params.yaml", [*given, *settings(values)])
        for _ in run_part(opened, STAGE, lambda job: sweep.run_part(job, names)):
            pass
    return trained(work)


def test_logs_are_those_of_the_sweep_s_own_adapters(project: Path) -> None:
    """Also where all of them come from the cache and nothing trains."""
    swept(project, {"grid": {"rank": [1, 2]}})
    _, keys, _ = swept(project, {"grid": {"rank": [2]}})
    assert not keys
    logs = (project / "runs/finetune_sweep").glob("*/loss.csv")
    assert [log.parent.name for log in logs] == ["rank-2"]


def test_a_grid_that_grew_trains_only_what_is_new(project: Path) -> None:
    _, first, _ = swept(project, {"grid": {"rank": [1, 2]}})
    manifest, second, notes = swept(project, {"grid": {"rank": [1, 2, 4]}})
    grown = swept_weights(project)
    assert len(first) == 2 and len(second) == 1
    assert {*first, *second} == set(manifest["entries"].values())
    assert any("2 of 3 adapters are taken from the cache" in note for note in notes)

    _, again, _ = swept(project, {"grid": {"rank": [1, 2, 4]}}, force=True)
    assert len(again) == 3
    assert swept_weights(project) == grown  # to the bit, as one pass trains them


def test_a_name_and_the_order_of_a_grid_are_no_part_of_an_adapter(project: Path) -> None:
    swept(project, {"grid": {"rank": [1, 2], "seed": [0]}})
    manifest, more, _ = swept(project, {"grid": {"rank": [2, 1]}})
    assert more == [] and list(manifest["adapters"]) == ["rank-2", "rank-1"]
    assert manifest["adapters"]["rank-1"]["values"] == {"rank": 1}


def test_other_settings_data_or_texts_train_anew(project: Path) -> None:
    grid = {"grid": {"rank": [1]}}
    swept(project, grid)
    assert len(swept(project, grid, [*BRIEF, "finetune_lora.seed=7"])[1]) == 1
    divergence = swept(project, {**grid, "old_data": "data/retain.de.txt"})
    assert len(divergence[1]) == 1 and "divergence" in divergence[0]["adapters"]["rank-1"]
    data = project / "data" / "finetune.de.txt"
    data.write_text(data.read_text() + "der wind weht über das feld\n")
    assert len(swept(project, grid)[1]) == 1


def test_parts_that_train_apart_are_one_pass_to_the_bit(project: Path, tmp_path: Path) -> None:
    grid = {"grid": {"rank": [1, 2, 4], "seed": [0, 1]}}
    _, _, _ = swept(project, grid, HELD_OUT)
    whole = swept_weights(project)
    shutil.rmtree(project / ".lora-cache" / ADAPTERS)
    shutil.rmtree(project / ".lora-cache" / "finetune_sweep")
    shutil.rmtree(project / "artifacts" / "sweep")
    (project / "runs" / "finetune_sweep" / sweep.TRAINED).unlink()

    names = [f"rank-{rank}_seed-{seed}" for rank in (1, 2, 4) for seed in (0, 1)]
    keys = part(project, tmp_path / "a", names[4:], grid, HELD_OUT)
    keys += part(project, tmp_path / "b", names[:1], grid, HELD_OUT)
    keys += part(project, tmp_path / "c", names[1:4], grid, HELD_OUT)
    assert not (project / "artifacts" / "sweep").exists()
    manifest, more, _ = swept(project, grid, HELD_OUT)
    assert more == [] and sorted(keys) == sorted(manifest["entries"].values())
    assert swept_weights(project) == whole
    # the curves are there to look at, although nothing trained here
    assert all((project / "runs" / "finetune_sweep" / name / "loss.csv").exists() for name in names)


def test_a_part_that_was_killed_after_its_training_trains_nothing_twice(
    project: Path, tmp_path: Path
) -> None:
    grid = {"grid": {"rank": [1, 2]}}
    first = part(project, tmp_path / "a", ["rank-1", "rank-2"], grid, BRIEF)
    for key in first[:1]:  # as if it had died between the two
        shutil.rmtree(project / ".lora-cache" / ADAPTERS / key)
    assert part(project, tmp_path / "a", ["rank-1", "rank-2"], grid, BRIEF) == first
    assert swept(project, grid)[1] == []


def test_a_part_in_which_all_diverge_is_no_error_and_is_remembered(
    project: Path, tmp_path: Path
) -> None:
    grid = {"grid": {"learning_rate": [1e-3, 1e28]}}
    assert len(part(project, tmp_path / "a", ["lr-1e+28"], grid, BRIEF)) == 1
    assert len(part(project, tmp_path / "b", ["lr-0.001"], grid, BRIEF)) == 1
    manifest, more, _ = swept(project, grid)
    assert more == []
    states = {name: row["state"] for name, row in manifest["adapters"].items()}
    assert states == {"lr-0.001": "done", "lr-1e+28": "diverged"}
    assert not (project / "artifacts" / "sweep" / "lr-1e+28").exists()
    with pytest.raises(UserError, match=r"all adapters diverged.*Lower learning_rate"):
        swept(project, {"grid": {"learning_rate": [1e28]}})


def test_parts_of_generations_told_in_order_draw_what_one_process_draws(
    project: Path, tmp_path: Path
) -> None:
    pytest.importorskip("optuna")
    manifest, _, _ = swept(project, DRAWN, HELD_OUT)
    names, whole = list(manifest["adapters"]), swept_weights(project)
    shutil.rmtree(project / ".lora-cache" / ADAPTERS)
    shutil.rmtree(project / ".lora-cache" / "finetune_sweep")

    with pytest.raises(UserError, match="no pass has these adapters whose earlier passes are done"):
        part(project, tmp_path / "early", names[3:4], DRAWN, HELD_OUT)
    # the last of a generation first
    for n, chosen in enumerate([names[2:3], names[:2], names[5:], names[3:5]]):
        assert len(part(project, tmp_path / str(n), chosen, DRAWN, HELD_OUT)) == len(chosen)
    again, more, _ = swept(project, DRAWN, HELD_OUT)
    assert more == [] and list(again["adapters"]) == names
    assert swept_weights(project) == whole


def test_halving_is_one_part_and_says_why(project: Path, tmp_path: Path) -> None:
    halving = {"search": "halving", "reduction_factor": 2, "grid": {"rank": [1, 2]}}
    manifest, _, _ = swept(project, halving, HELD_OUT)
    assert manifest["entries"] == {}
    with pytest.raises(UserError, match="halving compares all adapters at each rung"):
        part(project, tmp_path / "a", ["rank-1"], halving, HELD_OUT)
    assert not (project / ".lora-cache" / ADAPTERS).exists()


def test_a_damaged_entry_is_trained_again(project: Path) -> None:
    manifest, _, _ = swept(project, {"grid": {"rank": [1, 2]}})
    entry = project / ".lora-cache" / ADAPTERS / manifest["entries"]["rank-1"]
    path = entry / "adapter_config.json"
    path.write_text(path.read_text() + " ")
    _, keys, _ = swept(project, {"grid": {"rank": [1, 2, 4]}})
    assert set(keys) > {manifest["entries"]["rank-1"]} and len(keys) == 2


def test_by_hand_two_parts_and_the_whole(project: Path) -> None:
    command = ["finetune", "sweep", "--grid", "rank=1,2", "--set", "finetune_lora.epochs=2"]
    for name in ("rank-1", "rank-2"):
        told = lora(*command, "--only", name, cwd=project, LORA_WORK=str(project / "runs" / name))
        assert told.returncode == 0, told.stderr
        assert told.stdout.startswith(f"{name}: in the cache.")
    told = lora(*command, cwd=project)
    assert told.returncode == 0 and "best:" in told.stdout
    assert "2 of 2 adapters are taken from the cache" in told.stderr
    wrong = lora(*command, "--only", "rank-3", cwd=project)
    assert wrong.returncode == 1 and "Traceback" not in wrong.stderr
    assert "--only rank-3" in wrong.stderr


@pytest.mark.slow
@pytest.mark.parametrize("step", [3, 7])
def test_a_killed_part_goes_on_where_it_was(project: Path, step: int) -> None:
    grid = "finetune_sweep.grid={rank: [1, 2, 4]}"
    command = [LORA, "finetune", "sweep", "--set", grid, "--only", "rank-1,rank-4"]
    command += ["--set", "finetune_lora.epochs=5", "--checkpoint-every", "2"]
    dies = ("pipeline.training.optimizer.FlatOptimizer.step", step)
    assert Forked(command, project, dies).end()[0] < 0
    code, errors = Forked(command, project).end()
    assert code == 0 and "resumed after step" in errors
    run_folder = project / "runs" / "finetune_sweep"
    assert len(trained(project)) == 2 and not list(run_folder.glob("checkpoint-*"))
    key = trained(project)[0]
    assert artifact.verify(project / ".lora-cache" / ADAPTERS / key)["outcome"]["state"] == "done"
