"""`lora evaluate --adapter`: what was measured of a model is not measured again."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from lora_workbench import api
from pipeline.inference.model_pool import ModelPool
from tests.helpers.projects import BRIEF, make, new_project

SWEEP = ("finetune_sweep.grid={rank: [1, 2, 4]}",)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = new_project(tmp_path_factory.mktemp("measured") / "mini")
    make(root, ["pretrain", "expand_vocab", "finetune_sweep"], [*BRIEF, *SWEEP])
    return root


def measured(root: Path, *names: str) -> tuple[dict[str, Any], list[str]]:
    """The metrics, and the models that were loaded for them."""
    loaded = list[str]()
    load = ModelPool.load_next

    def counted(self: ModelPool, name: str, *rest: Any) -> Any:
        loaded.append(Path(name).name)
        return load(self, name, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ModelPool, "load_next", counted)
        folders = [root / "artifacts" / "sweep" / name for name in names]
        return api.evaluate(api.Project(root), folders), loaded


def test_a_model_is_measured_once_and_others_are_compared_with_the_same_base(
    project: Path,
) -> None:
    whole, loaded = measured(project, "rank-1", "rank-2", "rank-4")
    assert loaded == ["base", "rank-1", "rank-2", "rank-4"]
    shutil.rmtree(project / "artifacts" / "measured")
    again, loaded = measured(project, "rank-1", "rank-2", "rank-4")
    assert (again, loaded) == (whole, [])

    # apart, as units do: the base's scores of tasks come from the cache
    for folder in (project / ".lora-cache" / "measured").glob("[!.]*/"):
        shutil.rmtree(folder)
    shutil.rmtree(project / "artifacts" / "measured")
    assert measured(project, "rank-4")[1] == ["base", "rank-4"]
    shutil.rmtree(project / "artifacts" / "measured")
    apart, loaded = measured(project, "rank-1", "rank-4", "rank-2")
    assert loaded == ["base", "rank-1", "rank-2"]
    assert apart == whole
    tasks = apart["artifacts/sweep/rank-1"]["tasks"]
    assert tasks and all("difference" in scores for scores in tasks.values())


def test_a_damaged_entry_is_measured_again(project: Path) -> None:
    shutil.rmtree(project / "artifacts" / "measured", ignore_errors=True)
    whole, _ = measured(project, "rank-1")
    for path in (project / ".lora-cache" / "measured").glob("*/numbers.json"):
        path.write_text(path.read_text().replace("0", "1", 1))
    shutil.rmtree(project / "artifacts" / "measured")
    again, loaded = measured(project, "rank-1")
    assert again == whole and loaded == ["base", "rank-1"]
