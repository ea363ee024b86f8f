"""On an accelerator a study moves its models there: see tests/pipeline/models/test_device.py."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.lab_projects import BRIEF
from typer.main import get_command

from cli.main import app
from tests.helpers import fake_accelerator
from tests.helpers.fake_accelerator import alike, used
from tests.helpers.projects import STAGES, folder_bytes, make

# train briefly
COMPARED = {f"study_{name}" for name in ("knowledge_correction", "fact_correction", "quantization")}
STUDIES = sorted(name for name, stage in STAGES.items() if stage.kind == "study")


@pytest.fixture
def strays(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The modules that were called while parameters of theirs were not on the accelerator, which
    is the best device here and has no numbers of 64 bits, as Apple's GPU.
    """
    with fake_accelerator.best(monkeypatch) as there, fake_accelerator.strays(there) as found:
        fake_accelerator.narrow(there, monkeypatch)
        yield found


@pytest.mark.slow
@pytest.mark.parametrize("study", [*STUDIES, "figures"])
def test_studies_ask_their_models_there(
    studied: Path, tmp_path: Path, study: str, strays: list[str]
) -> None:
    project = tmp_path / "project"
    shutil.copytree(studied, project)
    make(project, [study], BRIEF, force=True)
    assert used() and not strays
    name = STAGES[study].path
    tables = [path for path in folder_bytes(studied / name) if path.endswith(".csv")]
    assert tables
    assert study not in COMPARED or all(
        alike((project / name / path).read_text(), (studied / name / path).read_text())
        for path in tables
    )


@pytest.mark.parametrize("name", ["study", "figures"])
def test_every_command_that_computes_has_the_option(name: str) -> None:
    group: Any = get_command(app)
    assert any("--device" in param.opts for param in group.commands[name].params)
