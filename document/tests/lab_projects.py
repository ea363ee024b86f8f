"""What tests of the document share: its project, alone and below the program's, with its studies."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.stages.registry import GRAPH, open_project
from tests.conftest import Built, unchanged
from tests.helpers import projects
from tests.helpers.projects import PIPELINE, ROOT, STAGES, WORK, joined, make, shorten

DOCUMENT = ROOT / "document"
COMMAND = {
    **projects.COMMAND,
    **{name: ["study", stage.method] for name, stage in STAGES.items() if stage.kind == "study"},
    "figures": ["figures"],
    "claims": ["claims"],
}
BRIEF = (
    *projects.BRIEF,
    *(f"{name}.seeds=[0]" for name, stage in STAGES.items() if stage.kind == "study"),
    "study_fact_correction.epochs=2",
    "study_fact_correction.alphas=[1.0, 4.0]",
    "study_fact_correction.learning_rates=[2e-3]",
    "study_knowledge_correction.epochs=2",
    "study_trajectory.steps=[0, 2]",
    "study_rank.ranks=[1, 2]",
    "study_rank.alphas=[1.0]",
    "study_rank.learning_rates=[1e-3, 3e-3]",
    "study_learning_rate.epochs=2",
    "study_learning_rate.ranks=[1, 2]",
    "study_learning_rate.full_rates=[1e-3]",
    "study_learning_rate.learning_rates=[1e-3, 3e-3]",
    "study_forgetting.every=1",
    "study_spectrum.extracted=[1, 64]",
    "study_intrinsic_dimension.dimensions=[64]",
)
GIVEN: dict[str, Any] = {  # the same, to be written into a params file
    key: yaml.safe_load(value) for key, _, value in (setting.partition("=") for setting in BRIEF)
}


def new_project(folder: Path) -> Path:
    """The program's and the document's params and data as one project in `folder`, nothing made
    yet.
    """
    folder.mkdir(parents=True, exist_ok=True)
    params = joined(ROOT / "params.yaml", DOCUMENT / "params.yaml")
    (folder / "params.yaml").write_text(params, encoding="utf-8")
    for data in (ROOT / "data", DOCUMENT / "data"):
        shutil.copytree(data, folder / "data", dirs_exist_ok=True)
    return folder


def new_houses(root: Path) -> Path:
    """Both projects as the repository has them: the document's in a folder below the program's."""
    for folder in ("", "document"):
        (root / folder).mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / folder / "params.yaml", root / folder)
        shutil.copytree(ROOT / folder / "data", root / folder / "data")
    return root


@pytest.fixture(scope="session")
def finished(built: Built) -> Iterator[Path]:
    """The pipeline with the repository's params. Read it; a test that writes to it is an error at
    the end.
    """
    yield from unchanged(built("finished", lambda root: make(new_project(root), PIPELINE)))


@pytest.fixture(scope="session")
def brief(built: Built) -> Iterator[Path]:
    """The pipeline, two epochs each. Read it; a test that writes to it is an error at the end."""
    yield from unchanged(built("brief", lambda root: make(new_project(root), PIPELINE, BRIEF)))


@pytest.fixture(scope="session")
def studied(brief: Path, built: Built) -> Iterator[Path]:
    """`brief`, and all that measures it, with one seed. Read it; a test that writes to it is an
    error at the end.
    """

    def build(root: Path) -> None:
        shutil.copytree(brief, root, dirs_exist_ok=True)
        make(root, [name for name in WORK if name not in (*PIPELINE, "import")], BRIEF)

    yield from unchanged(built("studied", build))


@pytest.fixture(scope="session")
def houses(brief: Path, built: Built) -> Iterator[Path]:
    """Both projects, two epochs each: the program's stages as `brief` made them, and the document's
    that make models.
    """

    def build(root: Path) -> None:
        shorten(new_houses(root), root / "document", given=GIVEN)
        for name in open_project(root / "params.yaml").stages:
            shutil.copytree(brief / GRAPH.stages[name].path, root / GRAPH.stages[name].path)
        make(root, ["evaluate"])  # of its own variants alone
        stages = open_project(root / "document/params.yaml").stages
        make(root / "document", [name for name in stages if name in PIPELINE])

    yield from unchanged(built("houses", build))


@pytest.fixture
def project(brief: Path, tmp_path: Path) -> Path:
    """A copy of `brief` to change."""
    root = tmp_path / "project"
    shutil.copytree(brief, root)
    return root
