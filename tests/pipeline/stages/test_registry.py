"""A fine-tuning method is one file: what the registry makes of it, and whose results its code
concerns.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.project import provenance
from pipeline.project.provenance import code_digest
from pipeline.stages import registry
from pipeline.stages.registry import GRAPH
from tests.helpers.projects import ROOT

HEAVY = ("torch", "numpy", "transformers", "tokenizers", "matplotlib")


def test_reading_the_registries_imports_nothing_heavy() -> None:
    code = (
        f"import sys, pipeline.stages.registry; print(*(name for name in {HEAVY!r} if name in "
        "sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == []


def test_each_file_of_a_method_is_one_stage() -> None:
    files = {path.stem for path in (ROOT / "pipeline/stages/methods").glob("*.py")} - {"__init__"}
    assert files == set(registry.METHODS)
    for name, stage in registry.METHODS.items():
        assert stage.module == f"pipeline.stages.methods.{name}"
        assert GRAPH.stages[stage.name] is stage and stage.look and stage.title and stage.summary


@pytest.mark.slow
def test_a_methods_code_concerns_its_own_results_and_what_loads_its_adapter_and_no_other_methods(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(
        ROOT / "pipeline", tmp_path / "pipeline", ignore=shutil.ignore_patterns("__pycache__")
    )
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    monkeypatch.setattr(
        provenance,
        "code_files",
        getattr(provenance.code_files, "__wrapped__", provenance.code_files),
    )

    def digests() -> dict[str, str]:
        return {name: code_digest(*stage.code) for name, stage in registry.STAGES.items()}

    before = digests()
    file = tmp_path / "pipeline/stages/methods/prefix.py"
    file.write_text(file.read_text(encoding="utf-8") + "\n# another thought\n", encoding="utf-8")
    after = digests()
    assert {name for name in before if before[name] != after[name]} == {
        "finetune_prefix",
        "evaluate",
    }
