"""What is told of a fleet's units by their files alone: states, progress, curves."""

import shutil
from pathlib import Path

import pytest

from pipeline.fleet.run import look_at_runs
from pipeline.fleet.states import Fleet, joined
from pipeline.fleet.unit import end_unit
from pipeline.project.logs.runs import Run
from pipeline.stages.registry import open_project
from pipeline.views.curves import Runs
from pipeline.views.runs import discover_runs, stamp
from pipeline.views.stage_tree import stage_rows
from tests.helpers.fleets import SWEEP, attempt, here, new_fleet, train
from tests.helpers.projects import STAGES, new_project
from tests.helpers.run_folders import hold, journal, write_ends


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return new_project(tmp_path / "project")


def look(root: Path) -> Fleet:
    (fleet,) = look_at_runs(root)
    return fleet


def found(root: Path) -> list[Run]:
    return discover_runs(root, open_project(root / "params.yaml"))


def test_files_tell_what_each_unit_does(root: Path) -> None:
    run = new_fleet(root, ["waits", "begins", "runs", "here", "done", "failed", "lost", "stopped"])
    attempt(run, 2, ago=1.0)
    here(run, 4)
    end_unit(run.unit_folder(5), 0)
    attempt(run, 6)
    end_unit(run.unit_folder(6), 1, "the loss is nan")
    train(run, 7, {"rank-7": 3.0}, 20)
    train(run, 8, {"rank-8": 3.0}, 20, "stopped")
    with hold(train(run, 3, {"rank-3": 3.0}, 20)):
        fleet = look(root)
    states = {unit.label: unit.state for unit in fleet.units}
    assert states == {
        "waits": "waiting",
        "begins": "running",
        "runs": "running",
        "here": "running",
        "done": "done",
        "failed": "failed",
        "lost": "lost",
        "stopped": "stopped",
    }
    assert (fleet.units[5].node, fleet.units[5].reason) == ("node1", "the loss is nan")
    assert fleet.state == "running"
    assert look(root).units[2].state == "lost"


def test_units_that_have_not_begun_count_as_the_others_and_the_last_decides(root: Path) -> None:
    run = new_fleet(root, ["a", "b", "c", "d"])
    train(run, 1, {"a": 3.0}, 300, "done")
    end_unit(run.unit_folder(1), 0)
    with hold(train(run, 2, {"b": 3.0}, 100)), hold(train(run, 3, {"c": 3.0}, 260)):
        journal_of_all = joined(look(root).units)
    assert (journal_of_all.done, journal_of_all.total) == (660, 1200)
    # 540 steps are left: 20 a second
    assert journal_of_all.eta == pytest.approx(27.0)
    assert journal_of_all.text == "1 of 4 units, 2 running"
    end_unit(run.unit_folder(4), 1, "no")
    with hold(run.unit_folder(2) / "runs" / SWEEP), hold(run.unit_folder(3) / "runs" / SWEEP):
        journal_of_all = joined(look(root).units)
    # the second alone takes 20 s more
    assert journal_of_all.eta == pytest.approx(20.0)
    assert journal_of_all.message == "unit 4 (d): no"


def test_a_file_that_holds_something_else_is_no_matter(root: Path) -> None:
    run = new_fleet(root, ["a", "b", "c"])
    train(run, 1, {"a": 3.0}, 20)
    journal(run.unit_folder(1) / "runs" / SWEEP, "running", 1)
    text = '{"state": "running", "pid": 1, "started": 0, "done": "x", "rate": 1e999}'
    (run.unit_folder(1) / "runs" / SWEEP / "run.json").write_text(text)
    (run.unit_folder(1) / "attempts.jsonl").write_text(
        '{"node": ["\\u001b[31m"], "pid": 1, "started": 0, "done": 0}\n{"node": "n", "pid": "x", '
        '"started": 0, "done": 0}\n[1]\n{"no'
    )
    (run.unit_folder(2) / "exit.json").write_text('{"code": "many"}')
    (run.unit_folder(3) / "unit.json").write_text(
        (run.unit_folder(3) / "unit.json").read_text().replace(SWEEP, "../../../..")
    )
    first, second = look(root).units
    assert (first.state, first.attempts, first.journal) == ("waiting", 0, None)
    assert second.state == "waiting"
    assert joined([first, second]).eta is None


def test_the_units_of_a_sweep_are_one_run_until_the_sweep_has_what_they_made(root: Path) -> None:
    run = new_fleet(root, ["rank-1 rank-2", "rank-4"])
    assert found(root) == []
    before = stamp(root, root / "params.yaml", None)
    with hold(train(run, 1, {"rank-1": 3.0, "rank-2": 4.0}, 100)):
        assert stamp(root, root / "params.yaml", None) != before
        (live,) = found(root)
    assert [curve.name for curve in live.curves] == ["rank-1", "rank-2"]
    train(run, 2, {"rank-4": 5.0}, 300, "done")
    train(run, 1, {"rank-1": 3.0, "rank-2": 4.0}, 300, "done")
    for number in (1, 2):
        end_unit(run.unit_folder(number), 0)
    (live,) = found(root)
    assert live.log_folder == run.folder and live.label == "finetune_sweep  3 adapters"

    folder = root / "runs" / SWEEP
    units = [run.unit_folder(number) / "runs" / SWEEP for number in (1, 2)]
    shutil.copytree(units[0] / "rank-1", folder / "rank-1")
    (live,) = found(root)  # the sweep has the first of three
    assert len(live.curves) == 3
    shutil.copytree(units[0] / "rank-2", folder / "rank-2")
    shutil.copytree(units[1] / "rank-4", folder / "rank-4")
    (collected,) = found(root)
    assert collected.log_folder == folder and collected.label == live.label


def test_an_adapter_of_a_unit_without_memory_has_the_curve_of_its_half(root: Path) -> None:
    run = new_fleet(root, ["rank-1 rank-2", "rank-1", "rank-2"])
    train(run, 1, {"rank-1": 3.0, "rank-2": 4.0}, 20, "failed")
    runs = Runs(root, root / "params.yaml", 0.9)
    runs.look([])
    end_unit(run.unit_folder(1), 0, "ran out of memory; units 2, 3 make half of it each")
    with hold(train(run, 2, {"rank-1": 3.0}, 20)):
        runs.look([])
        (view,) = runs.views.values()
        logs = [files.loss.parent.parent.parent.parent.name for files in view.run.curves]
        assert logs == ["2", "1"]
        assert view.curves["rank-1"].files == view.run.curves[0]
        assert view.state == "running" and view.steps == (320, 900)
    write_ends(run.unit_folder(2) / "runs" / SWEEP, {"rank-1": ("diverged", 20)})
    runs.look([])
    assert [curve.outcome for curve in view.curves.values()] == ["diverged", ""]
    assert view.state == "died"


def test_methods_and_seeds_are_a_run_each_though_their_logs_are_empty_yet(root: Path) -> None:
    stages = ["finetune_lora", "finetune_lora", "finetune_full"]
    run = new_fleet(root, [f"{stage},seed={n}" for n, stage in enumerate(stages)], stages)
    for number in (1, 2, 3):
        train(run, number, {}, 0)
    labels = sorted(run.label.partition(" ")[0] for run in found(root))
    assert labels == ["finetune_full", "finetune_lora", "finetune_lora"]


def test_a_run_stands_below_its_stage_and_one_of_no_stage_at_the_top(root: Path) -> None:
    new_fleet(root, ["a"])
    stages = {name: STAGES[name] for name in ("expand_vocab", SWEEP)}
    needs = {"expand_vocab": (), SWEEP: ("expand_vocab",)}
    (fleet,) = look_at_runs(root)
    keys = [(row.guides, row.key, row.stage) for row in stage_rows(stages, needs, {}, [fleet])]
    assert keys[-1] == ("  └ ", "fleet 2d67857b", SWEEP)
    del stages[SWEEP], needs[SWEEP]
    assert stage_rows(stages, needs, {}, [fleet])[0].key == "fleet 2d67857b"
