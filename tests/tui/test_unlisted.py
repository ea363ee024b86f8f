"""What ran by `--set`, or is no section of params.yaml any more, on the screens."""

import json
from pathlib import Path

import pytest

from pipeline.project.params.edit import remove_section
from pipeline.stages.registry import open_project
from pipeline.views.evaluations import Evaluation, Method, read_evaluation
from pipeline.views.model_library import Library
from pipeline.views.sweeps import Sweep, read_sweep
from tests.helpers import pipeline_screen
from tests.helpers.curves import list_text, open_curves
from tests.helpers.json_files import write_json
from tests.helpers.pilot import until
from tests.helpers.projects import BRIEF, make, save
from tests.helpers.run_folders import hold, journal
from tui.app import Workbench
from tui.screens.models.columns import ModelList
from tui.screens.models.details import Details, detail_lines
from tui.screens.monitor.screen import MonitorScreen
from tui.services.evaluation import Evaluation as Evaluator


@pytest.fixture
def unlisted(project: Path) -> Path:
    """A project with a sweep and a prefix that no section of its params file names."""
    params = project / "params.yaml"
    for name in ("finetune_sweep", "finetune_prefix"):
        params.write_text(
            remove_section(params.read_text(encoding="utf-8"), name), encoding="utf-8"
        )
    return project


def method(evaluation: Evaluation | None, name: str) -> Method:
    assert evaluation is not None
    return next(each for each in evaluation.methods if each.name == name)


@pytest.mark.slow
async def test_the_tree_has_it_and_its_params_are_no_other_stages(unlisted: Path) -> None:
    async with pipeline_screen.open_screen(unlisted) as (pilot, screen):
        assert "not in params.yaml" in pipeline_screen.row(screen, "sweep")
        await pipeline_screen.choose(pilot, screen, "finetune_lora")
        assert screen.params.fields
        await pipeline_screen.choose(pilot, screen, "finetune_sweep")
        assert not screen.params.fields
        assert any("not in params.yaml" in fact for fact in pipeline_screen.facts(screen))


@pytest.mark.slow
async def test_curves_and_monitor_show_it_while_it_runs(unlisted: Path) -> None:
    journal(unlisted / "runs/finetune_sweep", "running", 3)
    (unlisted / "runs/finetune_sweep/lock").unlink(missing_ok=True)
    with hold(unlisted / "runs/finetune_sweep"):
        async with open_curves(unlisted) as (_, screen):
            assert "sweep" in list_text(screen)
        app = Workbench(unlisted / "params.yaml")
        app.first_screen = "monitor"
        async with app.run_test() as pilot:
            await until(pilot, lambda: app.project_watch.running is not None)
            assert isinstance(app.screen, MonitorScreen)
            assert app.screen.stage == "finetune_sweep"


def test_results_have_its_sweep_and_its_adapter_with_what_was_measured_of_it(
    unlisted: Path,
) -> None:
    project = open_project(unlisted / "params.yaml")
    sweep = read_sweep(project)
    assert isinstance(sweep, Sweep) and len(sweep.trials) == 2
    prefix = method(read_evaluation(project), "prefix")
    assert prefix.apart == ("not in params.yaml",)
    assert prefix.numbers["new_loss"] > 0 and prefix.numbers["trainable"] > 0
    assert prefix.base == unlisted / "artifacts/expanded"


def test_results_have_an_adapter_that_no_evaluation_measured(unlisted: Path) -> None:
    for path in (unlisted / "artifacts").glob("*/metrics.json"):
        path.unlink()
    evaluation = read_evaluation(open_project(unlisted / "params.yaml"))
    assert evaluation is not None and [each.name for each in evaluation.methods] == ["prefix"]
    manifest = unlisted / "artifacts/prefix/manifest.json"
    write_json(manifest, {"parameters": 3})
    assert read_evaluation(open_project(unlisted / "params.yaml")) is None


def test_a_model_that_a_run_would_replace_is_marked_with_what_differs(project: Path) -> None:
    ours = [
        setting.partition("=")
        for setting in BRIEF
        if setting.startswith(("finetune_", "train_from_scratch"))
    ]
    save(
        project / "params.yaml",
        {key: json.loads(value) for key, _, value in ours if value.isdigit()},
    )
    save(project / "params.yaml", {"finetune_sweep.grid": {"rank": [1, 2]}})
    make(project, ["finetune_lora"], ["finetune_lora.epochs=1", "finetune_lora.rank=2"])
    now = open_project(project / "params.yaml")
    marked = {entry.label: entry for entry in Library(now).scan() if entry.apart}
    assert list(marked) == ["lora"]
    cells = {
        column.title: str(column.cell(marked["lora"]))
        for column in ModelList(Evaluator(project / "params.yaml"))._columns
    }
    assert cells["name"] == "lora ●"
    details = detail_lines(Details(marked["lora"], {}, {}, None))
    assert "rank 2 → 4" in "\n".join(line.plain for line in details)
    assert method(read_evaluation(now), "lora").apart == ("epochs 1 → 2", "rank 2 → 4")
