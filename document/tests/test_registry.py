"""A study and a figure are one file each: found by its name, read without heavy libraries, and
alone in its digest.
"""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from lab import figures, studies
from lab.stages import find_studies
from tests.lab_projects import DOCUMENT

from pipeline.project import provenance
from tests.helpers.projects import ROOT, STAGES

FOLDERS = {"studies": Path(studies.__file__).parent, "figures": Path(figures.__file__).parent}


def test_every_file_is_a_study_or_a_figure_in_the_documents_order() -> None:
    for folder, found in (("studies", find_studies()), ("figures", figures.modules())):
        assert set(found) == {path.stem for path in FOLDERS[folder].glob("*.py")} - {"__init__"}
    assert [study.PLACE.partition(",")[0] for study in find_studies().values()] == [
        *("§2.2", "§2.2", "§2.3", "§2.4", "§5", "§6", "§6", "§7", "§9.3", "§10.1")
    ]
    places = [module.PLACE for module in figures.modules().values()]
    assert [place.partition(",")[0] for place in places] == [
        *(f"Figure {n}" for n in range(1, 6)),
        "§2.1",
    ]


def test_the_registry_is_read_without_heavy_libraries() -> None:
    code = """
import sys
from pipeline.stages.registry import GRAPH
assert GRAPH.sections
print(*({"torch", "numpy", "matplotlib", "transformers"} & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == []


@pytest.fixture
def edited(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[Path]]:
    """Files that read as if a line had been added."""
    paths, plain = set[Path](), Path.read_bytes
    monkeypatch.setattr(
        Path, "read_bytes", lambda path: plain(path) + (b"\n" if path in paths else b"")
    )
    yield paths


def test_a_change_of_one_study_leaves_the_others_digests(edited: set[Path]) -> None:
    names = [name for name, stage in STAGES.items() if stage.kind == "study"]
    before = {name: provenance.code_digest(*STAGES[name].code) for name in names}
    edited.add(FOLDERS["studies"] / "rank.py")
    after = {name: provenance.code_digest(*STAGES[name].code) for name in names}
    assert {name for name in names if before[name] != after[name]} == {"study_rank"}


@pytest.mark.parametrize("name", figures.modules())
def test_a_change_of_a_figure_changes_the_digest_of_the_figures(
    edited: set[Path], name: str
) -> None:
    before = provenance.code_digest(*STAGES["figures"].code)
    edited.add(FOLDERS["figures"] / f"{name}.py")
    assert provenance.code_digest(*STAGES["figures"].code) != before


def test_a_run_of_another_stage_counts_with_its_code() -> None:
    """A study trains with the stages' own code, which is imported only when it runs."""
    files = {
        path.relative_to(DOCUMENT if "lab" in path.parts else ROOT).as_posix()
        for path in provenance.code_files(*STAGES["study_rank"].code)
    }
    assert {
        "lab/runner.py",
        "pipeline/stages/finetune.py",
        "pipeline/stages/methods/sweep.py",
    } <= files
    assert "lab/studies/methods.py" not in files
