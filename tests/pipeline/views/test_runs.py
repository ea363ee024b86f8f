"""Which runs are found, and what they are called."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from matplotlib import rc_context

from pipeline.files.artifact import file_digest, write_json
from pipeline.project.logs.run_log import read_run_outcomes
from pipeline.project.logs.runs import LogFiles, Run
from pipeline.stages.charts import MARKERS, draw
from pipeline.stages.registry import METHODS, open_project
from pipeline.views.looks import other_look
from pipeline.views.runs import discover_runs, stamp, training_stages
from tests.helpers.projects import BRIEF, PIPELINE, ROOT, make

BASE = {"rank": 4, "alpha": 1.0}


@pytest.fixture
def sweep_project(tmp_path: Path) -> Path:
    text = (ROOT / "params.yaml").read_text(encoding="utf-8")
    (tmp_path / "params.yaml").write_text(f"{text}\nfinetune_sweep:\n", encoding="utf-8")
    return tmp_path


def found(root: Path) -> list[Run]:
    return discover_runs(root, open_project(root / "params.yaml"))


Keep = Callable[..., Path]


@pytest.fixture
def keep(sweep_project: Path) -> Keep:
    """Make a finished run's folder, with a log of its own and the given differences in its
    manifest.
    """

    def make_one(folder: str, text: str, when: float = 1000.0, **manifest: object) -> Path:
        path = sweep_project / folder
        path.mkdir(parents=True)
        (path / "loss.csv").write_text(f"step\n{text}\n", encoding="utf-8")
        os.utime(path / "loss.csv", (when, when))
        files = {"loss.csv": file_digest(path / "loss.csv")}
        write_json(path / "manifest.json", {"params": {}, "files": files, **manifest})
        return path

    return make_one


def test_an_empty_project_has_no_runs(sweep_project: Path) -> None:
    assert found(sweep_project) == []


def test_a_finished_pipeline_shows_each_training_once(brief: Path) -> None:
    runs = found(brief)
    assert [run.stage for run in runs] == [
        stage.name for stage in training_stages(None) if stage.name in PIPELINE
    ]
    assert all(run.folder == brief / "runs" / run.stage for run in runs)


def test_an_earlier_run_is_named_by_the_params_that_differ_from_now(project: Path) -> None:
    make(project, ["finetune_lora"], ["finetune_lora.epochs=1", "finetune_lora.rank=8"])
    today = open_project(
        project / "params.yaml", ["finetune_lora.epochs=1", "finetune_lora.rank=8"]
    )
    labels = [run.label for run in discover_runs(project, today) if run.stage == "finetune_lora"]
    assert labels == ["finetune_lora", "finetune_lora epochs 2, rank 4"]


def test_without_a_run_folder_the_artifact_is_shown(sweep_project: Path, keep: Keep) -> None:
    folder = keep("artifacts/lora_adapter", "1")
    (run,) = found(sweep_project)
    assert (run.stage, run.log_folder, run.folder) == ("finetune_lora", folder, None)
    assert run.curves == (LogFiles("", folder / "loss.csv", None),)


def test_runs_with_the_same_log_are_shown_once(sweep_project: Path, keep: Keep) -> None:
    keep("artifacts/lora_adapter", "1")
    keep(".lora-cache/finetune_lora/aaaa", "1")
    keep(".lora-cache/finetune_lora/bbbb", "2")
    assert [run.log_folder.name for run in found(sweep_project)] == ["lora_adapter", "bbbb"]


def test_earlier_runs_stand_from_new_to_old(sweep_project: Path, keep: Keep) -> None:
    for number, when in enumerate((1000.0, 3000.0, 2000.0)):
        keep(f".lora-cache/finetune_lora/{number}", str(number), when)
    assert [run.when for run in found(sweep_project)] == [3000.0, 2000.0, 1000.0]


def test_runs_that_differ_in_inputs_or_code_only_say_so(sweep_project: Path, keep: Keep) -> None:
    keep("artifacts/lora_adapter", "1", inputs={"data": "a"}, code="x")
    keep(".lora-cache/finetune_lora/aaaa", "2", inputs={"data": "b"}, code="x")
    keep(".lora-cache/finetune_lora/bbbb", "3", when=500, inputs={"data": "a"}, code="y")
    labels = [run.label for run in found(sweep_project)]
    assert labels == ["finetune_lora", "finetune_lora other inputs", "finetune_lora other code"]


def test_two_runs_of_one_name_are_told_apart_by_their_key(sweep_project: Path, keep: Keep) -> None:
    keep(".lora-cache/finetune_lora/0123456789", "1", when=2000)
    keep(".lora-cache/finetune_lora/abcdefghij", "2")
    assert [run.label for run in found(sweep_project)] == [
        "finetune_lora",
        "finetune_lora (abcdefgh)",
    ]


def test_broken_manifests_and_missing_params_are_survived(sweep_project: Path, keep: Keep) -> None:
    (keep(".lora-cache/finetune_lora/aaaa", "1") / "manifest.json").write_text(
        "{", encoding="utf-8"
    )
    (keep("artifacts/lora_adapter", "2") / "manifest.json").write_text(
        '{"files": {}}', encoding="utf-8"
    )
    keep(".lora-cache/pretrain/bbbb", "3", params=None)
    assert [run.label for run in discover_runs(sweep_project, None)] == ["pretrain"]


def test_a_sweep_is_one_run_with_a_curve_for_each_adapter(brief: Path) -> None:
    run = next(run for run in found(brief) if run.stage == "finetune_sweep")
    folder = brief / "runs/finetune_sweep"
    assert (run.log_folder, run.folder) == (folder, folder)
    # then that its params are not those of params.yaml
    assert run.label.startswith("finetune_sweep  2 adapters, ")
    assert run.curves == tuple(
        LogFiles(name, folder / name / "loss.csv", folder / name / "telemetry.csv")
        for name in ("rank-1", "rank-2")
    )


def test_an_earlier_sweep_says_its_grid_and_one_that_was_kept_too_is_shown_once(
    project: Path,
) -> None:
    other = ["finetune_lora.epochs=2", "finetune_sweep.grid={rank: [1], seed: [0, 1, 2]}"]
    make(project, ["finetune_sweep"], other)
    today = open_project(project / "params.yaml", other)
    runs = [run for run in discover_runs(project, today) if run.stage == "finetune_sweep"]
    assert [run.label for run in runs] == [
        "finetune_sweep  3 adapters",
        "finetune_sweep  2 adapters, grid rank 1+2",
    ]
    assert [run.folder is None for run in runs] == [False, True]
    shutil.rmtree(project / "runs/finetune_sweep")
    assert [run.label for run in discover_runs(project, today) if run.sweeps] == [
        run.label for run in runs
    ]


def test_a_sweep_of_which_an_adapter_diverged_is_the_artifact_that_came_of_it(
    project: Path,
) -> None:
    """The artifact has no folder of that adapter: its log is the run's alone."""
    given = [*BRIEF, "finetune_sweep.grid={learning_rate: [1e-3, 1e9]}"]
    make(project, ["finetune_sweep"], given)
    assert [path.name for path in (project / "artifacts/sweep").iterdir() if path.is_dir()] == [
        "lr-0.001"
    ]
    today = open_project(project / "params.yaml", given)
    run, *others = [run for run in discover_runs(project, today) if run.sweeps]
    assert [curve.name for curve in run.curves] == ["lr-0.001", "lr-1e+09"]
    assert run.folder and len(others) == 1 and "grid rank 1+2" in others[0].label
    assert read_run_outcomes(run.log_folder) == {"lr-1e+09": "diverged"}
    shutil.rmtree(project / "runs/finetune_sweep")
    run = next(run for run in discover_runs(project, today) if run.sweeps)
    assert [curve.name for curve in run.curves] == ["lr-0.001"]
    assert read_run_outcomes(run.log_folder) == {"lr-0.001": "done", "lr-1e+09": "diverged"}


def test_adapters_stand_in_the_order_of_their_numbers(sweep_project: Path) -> None:
    names = ["lr-1e-05", "lr-0.001", "rank-2", "rank-2_seed-1", "rank-16"]
    for name in reversed(names):
        (sweep_project / "runs/finetune_sweep" / name).mkdir(parents=True)
        (sweep_project / f"runs/finetune_sweep/{name}/loss.csv").write_text(
            "step\n", encoding="utf-8"
        )
    assert [curve.name for curve in found(sweep_project)[0].curves] == names


def test_the_stamp_changes_with_every_adapter_of_a_sweep(sweep_project: Path) -> None:
    seen = {stamp(sweep_project, sweep_project / "params.yaml", None)}
    for number, name in enumerate(("rank-1", "rank-2"), 2):
        (sweep_project / "runs/finetune_sweep" / name).mkdir(parents=True)
        (sweep_project / f"runs/finetune_sweep/{name}/loss.csv").write_text(
            "step\n", encoding="utf-8"
        )
        seen.add(stamp(sweep_project, sweep_project / "params.yaml", None))
        assert len(seen) == number
    # the same inodes
    (sweep_project / "runs/finetune_sweep/rank-2").rename(
        sweep_project / "runs/finetune_sweep/rank-3"
    )
    assert stamp(sweep_project, sweep_project / "params.yaml", None) not in seen


def test_the_stamp_changes_when_when_there_is_another_run(sweep_project: Path, keep: Keep) -> None:
    before = stamp(sweep_project, sweep_project / "params.yaml", None)
    assert stamp(sweep_project, sweep_project / "params.yaml", None) == before
    keep("artifacts/lora_adapter", "1")
    after = stamp(sweep_project, sweep_project / "params.yaml", None)
    assert after != before
    (sweep_project / "runs/finetune_lora").mkdir(parents=True)
    (sweep_project / "runs/finetune_lora/loss.csv").write_text("step\n", encoding="utf-8")
    assert stamp(sweep_project, sweep_project / "params.yaml", None) != after


def test_twenty_runs_beside_the_methods_look_different() -> None:
    methods = [stage.look for stage in METHODS.values()]
    looks = {(look.color, look.sign) for look in (*methods, *map(other_look, range(20))) if look}
    assert len(looks) == len(METHODS) + 20
    assert len({look.sign for look in methods if look}) == len(METHODS)


def test_every_sign_has_a_marker_in_an_exported_picture() -> None:
    looks = (*(stage.look for stage in METHODS.values()), *map(other_look, range(20)))
    assert {look.sign for look in looks if look} <= MARKERS.keys()


def exported(label: str, sign: str) -> str:
    """A picture of one curve, whose texts are texts."""
    numbers = {"columns": [[1, 1.0, 1.0, 1.0], [2, 2.0, 2.0, 2.0]], "marks": [[1, 2.0]]}
    shown = {"label": label, "color": "#000000", "sign": sign, "quiet": False, "flat": None}
    curve = {**numbers, **shown}
    panel = {"title": "Loss", "log": False, "x": [1, 2], "y": None, "curves": [curve]}
    with rc_context({"svg.fonttype": "none"}):
        return draw({"format": "svg", "title": "", "panels": [panel]}).decode()


def test_a_label_with_dollars_is_no_formula() -> None:
    """A run whose `rank_pattern` is another has its patterns in its label."""
    label = "finetune_lora, rank_pattern {q_proj$: 8, k_proj$: 4}"
    picture = exported(label, "●")
    assert f">{label}<" in picture and f">{label}, held out<" in picture


def test_a_sign_that_matplotlib_has_not_is_a_dot() -> None:
    """An extension's method may have any sign."""
    assert "✚" not in MARKERS
    assert exported("a", "✚") == exported("a", "●")
