"""The catalog lists every kind of model, and rejects each for the reason that loading would
give.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.files import artifact
from pipeline.files.digest_cache import signature
from pipeline.inference.catalog import find_base, measured, model_folders
from pipeline.inference.engine import load
from pipeline.stages.registry import open_project
from pipeline.views.models import (
    VERIFIED,
    Model,
    VerificationResult,
    adapters,
    check,
    describe,
    newest_model,
    scored,
)
from tests.conftest import Lora
from tests.helpers.checkpoints import edit_adapter_config
from tests.helpers.errors import user_error
from tests.helpers.json_files import edit_json, read_json
from tests.helpers.projects import STAGES, cut_off


def models(root: Path) -> dict[str, Model]:
    return {folder.name: describe(folder) for folder in model_folders(root / "artifacts")}


def test_every_model_of_the_pipeline_is_found_by_kind_and_method(brief: Path) -> None:
    assert {name: (model.kind, model.method) for name, model in models(brief).items()} == {
        "base": ("base", "pretrain"),
        "expanded": ("base", "expand_vocab"),
        "from_scratch": ("checkpoint", "scratch"),
        "full_finetuned": ("checkpoint", "full"),
        "layer_frozen": ("checkpoint", "freeze"),
        "lora_adapter": ("adapter", "lora"),
        "lora_merged": ("merged", "merge"),
        "prefix": ("adapter", "prefix_tuning"),
        "prompt": ("adapter", "prompt_tuning"),
        "rank-1": ("adapter", "lora"),
        "rank-2": ("adapter", "lora"),
    }


def test_each_is_verified_with_the_forgetting_that_the_evaluation_measured(brief: Path) -> None:
    metrics = read_json(brief / "artifacts/evaluation/metrics.json")
    described, measurements = models(brief), measured([brief / "artifacts"])
    for variant, (base, adapter) in open_project(brief / "params.yaml").variants.items():
        verdict = check(described[STAGES[adapter or base].output], brief, measurements)
        forgetting = metrics[variant]["forgetting"]
        assert (verdict.state, verdict.reason, verdict.gate) == ("verified", None, None)
        assert (verdict.forgetting, verdict.kept) == (
            forgetting["loss_rise"],
            forgetting["answers_kept"],
        )


def test_sizes_parameters_and_losses_are_those_of_the_files(brief: Path) -> None:
    described = models(brief)
    lora, full = described["lora_adapter"], described["full_finetuned"]
    manifest = artifact.read_manifest(lora.path)
    assert (lora.parameters, lora.rank) == (manifest["parameters"]["trainable"], 4)
    assert full.parameters == artifact.read_manifest(full.path)["parameters"]["total"]
    assert full.size == (full.path / "model.safetensors").stat().st_size
    assert full.final_loss == pytest.approx(float(_last_epoch_mean(full.path / "loss.csv")))
    assert lora.when == pytest.approx((lora.path / "manifest.json").stat().st_mtime)


def _last_epoch_mean(path: Path) -> float:
    rows = [line.split(",") for line in path.read_text(encoding="utf-8").splitlines()[1:]]
    last = [float(row[2]) for row in rows if row[1] == rows[-1][1]]
    return sum(last) / len(last)


def refuse_rank(root: Path) -> None:
    edit_adapter_config(root / "artifacts/lora_adapter", r=8)


def other_base(root: Path) -> None:
    shutil.rmtree(root / "artifacts/expanded")
    shutil.copytree(root / "artifacts/base", root / "artifacts/expanded")


def truncated(root: Path) -> None:
    cut_off(root / "artifacts/lora_adapter/adapter_model.safetensors", 8)


@pytest.mark.parametrize("spoil", [refuse_rank, other_base, truncated])
def test_the_reason_is_the_one_that_loading_gives(
    project: Path, spoil: Callable[[Path], None]
) -> None:
    spoil(project)
    model = models(project)["lora_adapter"]
    verdict = check(model, project)
    said = user_error(load, find_base(model.path, project), model.path)
    assert (verdict.state, verdict.reason) == ("refused", said)


def test_a_model_without_manifest_is_neither_verified_nor_refused(project: Path) -> None:
    for name in ("base", "lora_adapter"):
        (project / "artifacts" / name / "manifest.json").unlink()
        described = models(project)[name]
        assert check(described, project).state == "no manifest"
    assert models(project)["base"].method == "opt"


def test_a_model_that_vanishes_or_lacks_its_base_is_refused_with_the_reason(project: Path) -> None:
    described = models(project)
    shutil.rmtree(project / "artifacts/expanded")
    assert "there is no such folder" in str(check(described["lora_adapter"], project).reason)
    assert check(described["expanded"], project).state == "refused"
    assert describe(project / "artifacts/expanded").size == 0


def test_the_signature_changes_with_any_file_of_the_folder(project: Path) -> None:
    folder = project / "artifacts/base"
    before = signature(folder)
    (folder / "config.json").write_text("{}", encoding="utf-8")
    assert signature(folder) != before
    assert signature(project / "nowhere") == ()


def test_hidden_folders_are_passed_over_and_others_are_not(project: Path) -> None:
    shutil.copytree(project / "artifacts/base", project / "artifacts/.base.1.tmp")
    shutil.copytree(project / "artifacts/base", project / "artifacts/base/checkpoint-3")
    assert {"base", "checkpoint-3"} <= {
        folder.name for folder in model_folders(project / "artifacts")
    }
    assert not any(".tmp" in str(folder) for folder in model_folders(project / "artifacts"))


@pytest.mark.parametrize("section", ["params", "base", "parameters", "files"])
@pytest.mark.parametrize("value", [["rank"], "rank", None, 1e999])
def test_a_manifest_of_another_shape_is_refused_and_never_an_error(
    project: Path, section: str, value: object
) -> None:
    path = project / "artifacts/lora_adapter/manifest.json"
    edit_json(path, **{section: value})
    assert check(models(project)["lora_adapter"], project).state == (
        "verified" if section == "parameters" else "refused"
    )
    assert "lora_adapter" in [adapter.path.name for adapter in adapters(project)]


def test_a_measurement_beyond_all_floats_is_none() -> None:
    verdict = scored(VerificationResult(VERIFIED, digest="a"), {"a": {"new_loss": 10**400}})
    assert verdict.new_loss is None


def test_without_any_base_the_newest_model_is_a_checkpoint(project: Path) -> None:
    for name in ("base", "expanded"):
        shutil.rmtree(project / "artifacts" / name)
    opened = open_project(project / "params.yaml")
    folder, adapter = newest_model(opened)
    assert folder.is_relative_to(project / "artifacts") and adapter is None
    assert folder.name not in ("base", "expanded")


def test_adapters_of_a_sweep_are_bound_to_the_base_beside_it_and_answer_like_any_other(
    brief: Path, tmp_path: Path, cli: Lora
) -> None:
    """They are one folder deeper; it also works when the project is not the current folder."""
    folder = brief / "artifacts/sweep"
    described = [model for model in map(describe, model_folders(folder)) if model.kind == "adapter"]
    assert [(model.path.name, model.rank) for model in described] == [("rank-1", 1), ("rank-2", 2)]
    for model in described:
        assert find_base(model.path, tmp_path) == brief / "artifacts/expanded"
        assert check(model, tmp_path).state == "verified"
    one, other = (str(model.path) for model in described)
    for command in (
        ["prompt", "der hund", "--adapter", one],
        ["adapters", "verify", one],
        ["adapters", "diff", one, other],
        ["adapters", "card", one],
        ["merge", "--adapter", one, "--out", "merged"],
        ["export", one, "--format", "peft", "--out", "exported"],
    ):
        code, out, err = cli(*command, cwd=tmp_path)
        assert code == 0 and out, (command, err)
    table, *_ = cli("adapters", cwd=brief)[1].split("\n\n")  # what marks mean stands below it
    names = ["lora_adapter", "prefix", "prompt", "sweep/rank-1", "sweep/rank-2"]
    assert [row.split()[0] for row in table.splitlines()] == ["adapter", *names]


def test_folders_are_found_in_the_order_of_their_numbers(brief: Path, tmp_path: Path) -> None:
    for name in ("rank-16", "rank-2", "rank-2_seed-1"):
        shutil.copytree(brief / "artifacts/sweep/rank-1", tmp_path / name)
    assert [path.name for path in model_folders(tmp_path)] == ["rank-2", "rank-2_seed-1", "rank-16"]
