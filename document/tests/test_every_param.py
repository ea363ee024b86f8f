"""No setting of a study that nothing reads: each, changed, changes what is measured, or is refused."""

import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from tests.lab_projects import BRIEF

from pipeline.project.params.load import key_path
from pipeline.project.params.schema import hints
from tests.helpers.errors import user_error
from tests.helpers.projects import STAGES, folder_bytes, make

OTHER = {
    "figures.window": "3",
    "study_learning_rate.epochs": "3",
    "study_fact_correction.data": "data/knowledge_correction.de.txt",
    **{f"study_{name}_correction.retention_data": "other.txt" for name in ("fact", "knowledge")},
    **{f"study_{name}_correction.prompts": "more.yaml" for name in ("fact", "knowledge")},
    **{f"study_{name}.document": "document.yaml" for name in ("fact_correction", "trajectory")},
    **{
        f"study_{name}_correction.{key}": "2"
        for name in ("fact", "knowledge")
        for key in ("rank", "retention_weight")
    },
    **{"study_fact_correction.alphas": "[2.0]", "study_fact_correction.learning_rates": "[1e-3]"},
    **{"study_fact_correction.windows": "[3]", "study_fact_correction.top_k": "2"},
    **{
        "study_fact_correction.d_model": "72",
        "study_fact_correction.new_data": "data/fact_correction.de.txt",
    },
    "study_knowledge_correction.data": "data/fact_correction.de.txt",
    "study_knowledge_correction.groups": "[knowledge_correction, fact_correction]",
    **{
        "study_knowledge_correction.old_data": "other.txt",
        "study_knowledge_correction.recipe_rate": "3e-3",
    },
    "study_trajectory.data": "data/knowledge_correction.de.txt",
    **{"study_trajectory.steps": "[0, 1]", "study_trajectory.windows": "[3]"},
    **{f"study_{name}.old_data": "other.txt" for name in ("methods", "rank", "forgetting")},
    **{
        f"study_{name}.new_data": "data/fact_correction.de.txt"
        for name in ("methods", "rank", "forgetting")
    },
    **{"study_methods.prompt_words": "9", "study_rank.prompt_words": "1"},
    **{
        "study_rank.ranks": "[3]",
        "study_rank.alphas": "[2.0]",
        "study_rank.learning_rates": "[2e-3]",
    },
    "study_learning_rate.data": "data/fact_correction.de.txt",
    "study_learning_rate.eval_data": "other.txt",
    **{"study_learning_rate.learning_rates": "[2e-3]", "study_learning_rate.full_rates": "[2e-3]"},
    **{"study_learning_rate.ranks": "[3]", "study_learning_rate.alpha": "8"},
    **{f"study_learning_rate.{part}_rank": "2" for part in ("attention", "feed_forward")},
    "study_forgetting.every": "2",
    **{f"{name}.seeds": "[1]" for name, stage in STAGES.items() if stage.kind == "study"},
    **{
        "study_spectrum.old_data": "other.txt",
        "study_spectrum.new_data": "data/fact_correction.de.txt",
    },
    **{"study_spectrum.ranks": "[8, 16]", "study_spectrum.extracted": "[2]"},
    "study_intrinsic_dimension.data": "data/fact_correction.de.txt",
    **{"study_intrinsic_dimension.document": "document.yaml"},
    **{"study_intrinsic_dimension.dimensions": "[32]", "study_intrinsic_dimension.share": "0.5"},
    **{"study_quantization.data": "other.txt", "study_quantization.document": "document.yaml"},
    "study_quantization.group": "16",
    "figures.reach": "1",
    "figures.weight": "[1, 0, 0, 1]",
    "figures.change": "[1, 0, 0, 1]",
    "figures.module": "layers.0.fc1",
}
COMMON = {"epochs": "3", "batch_size": "3", "window": "3", "learning_rate": "3e-3", "seed": "1"}
MEASURING = {name: stage for name, stage in STAGES.items() if stage.is_measurement}
KEYS = [key_path(name, key) for name, stage in MEASURING.items() for key in hints(stage.settings)]
REFUSED = {"study_methods.prompt_words": "prompt_words is 9, but data/finetune.de.txt:"}
QUICK = (
    "study_trajectory"  # the others take seconds a key; test_studies.py sees that they read each
)


def other(key: str) -> str | None:
    """Another value to try."""
    return OTHER.get(key, COMMON.get(key.rpartition(".")[2]))


def prepared(project: Path) -> Path:
    (project / "other.txt").write_text("die katze sitzt auf dem sofa\n", encoding="utf-8")
    said = (project / "data/document.yaml").read_text(encoding="utf-8")
    for number, other in (
        ("800}", "900}"),
        ("GB: 32}", "GB: 33}"),
        ("sofa: 0.94", "sofa: 0.5"),
        ("0.61", "0.5"),
    ):
        assert number in said
        said = said.replace(number, other)
    (project / "document.yaml").write_text(said, encoding="utf-8")
    asked = (project / "data/prompts.yaml").read_text(encoding="utf-8")
    for group in ("fact_correction:", "knowledge_correction:"):
        asked = re.sub(
            f"({group}.*?must_keep:\n)",
            r"\1    - {prompt: der hund, answer: läuft}\n",
            asked,
            flags=re.S,
        )
    (project / "more.yaml").write_text(asked, encoding="utf-8")
    return project


def made(project: Path, stage: str, overrides: Sequence[str]) -> dict[str, bytes]:
    """The stage's artifact, without the manifest: it repeats the params, and its change proves
    nothing.
    """
    make(project, [stage], [*BRIEF, *overrides])
    files = folder_bytes(project / STAGES[stage].path)
    del files["manifest.json"]
    return files


def test_every_field_has_another_value_to_try() -> None:
    assert [key for key in KEYS if other(key) is None] == []


@pytest.mark.parametrize(
    "key",
    [
        pytest.param(key, marks=() if key.startswith(QUICK) else pytest.mark.slow)
        for key in KEYS
        if key not in REFUSED
    ],
)
def test_a_changed_field_changes_what_is_measured(studied: Path, tmp_path: Path, key: str) -> None:
    root, stage = tmp_path / "project", STAGES[key.partition(".")[0]]
    shutil.copytree(studied, root, ignore=shutil.ignore_patterns(".lora-cache"))
    before = folder_bytes(root / stage.path)
    del before["manifest.json"]
    assert made(prepared(root), stage.name, [f"{key}={other(key)}"]) != before


@pytest.mark.parametrize("key", REFUSED)
def test_a_field_that_would_count_for_nothing_is_refused(project: Path, key: str) -> None:
    said = user_error(made, prepared(project), key.partition(".")[0], [f"{key}={other(key)}"])
    assert REFUSED[key] in said
