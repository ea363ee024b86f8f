"""`dvc exp run` in a project under git: in its folder, and in copies of it that run at the same
time.
"""

import json
import time
from pathlib import Path

import pytest

from pipeline.files import artifact
from pipeline.project.cache import Cache
from pipeline.project.stage_graph import cache_folder
from tests.conftest import Lora
from tests.helpers.projects import dvc, git, save

SHORT = {"training.epochs": 2, "pretrain.epochs": 2}


@pytest.mark.parametrize("copy", ["tmpa1b2", "standalone/tmpa1b2", "tmpa1b2/below"])
def test_a_copy_for_an_experiment_uses_the_cache_of_its_project(
    copy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LORA_CACHE", raising=False)
    assert cache_folder(tmp_path / ".dvc/tmp/exps" / copy) == tmp_path / ".lora-cache"
    assert (
        cache_folder(tmp_path / "tmp/exps" / copy) == tmp_path / "tmp/exps" / copy / ".lora-cache"
    )
    monkeypatch.setenv("LORA_CACHE", "/shared")
    assert cache_folder(tmp_path / ".dvc/tmp/exps" / copy) == Path("/shared")


@pytest.mark.slow
def test_git_takes_the_metrics_of_a_new_project_and_none_of_its_weights_or_caches(
    cli: Lora, tmp_path: Path
) -> None:
    assert cli("new", "p", "--methods", "lora", cwd=tmp_path)[0] == 0
    folder = tmp_path / "p"
    made = (
        "artifacts/evaluation/metrics.json",
        "artifacts/evaluation/report.md",
        "artifacts/base/model.safetensors",
    )
    for name in (*made, ".lora-cache/a/b", "runs/a/b", ".dvc/cache/a", ".dvc/tmp/a"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    git(folder, "init", "-q")
    git(folder, "add", "-A")
    tracked = (folder / ".git/index").read_bytes()
    assert made[0].encode() in tracked
    assert not any(
        name in tracked
        for name in (b"report.md", b"artifacts/base", b".lora-cache/", b"runs/", b".dvc/tmp")
    )
    assert b".dvc/cache" not in tracked


@pytest.mark.slow
def test_experiments_differ_and_share_the_cache_of_their_project(
    cli: Lora, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LORA_CACHE", raising=False)
    assert cli("new", "p", "--methods", "lora", cwd=tmp_path)[0] == 0
    folder = tmp_path / "p"
    save(folder / "params.yaml", SHORT)
    git(folder, "init", "-q")
    for key, value in (("user.name", "t"), ("user.email", "t@example.org")):
        git(folder, "config", key, value)
    dvc(folder, "config core.no_scm false")
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "all")

    dvc(folder, "exp run -n eight -S finetune_lora.rank=8")
    assert adapter_rank(folder) == 8
    queue = [
        f"exp run --queue -n {name} -S finetune_lora.rank={rank}"
        for name, rank in (("one", 1), ("two", 2))
    ]
    dvc(folder, *queue, "queue start --jobs 2")
    until = time.monotonic() + 300
    while "Running" in (said := dvc(folder, "queue status")[0]) or "Queued" in said:
        assert time.monotonic() < until, said
        time.sleep(2)
    assert said.count("Success") == 2, said
    dvc(folder, "exp run --temp -n three -S finetune_lora.rank=3")

    shown = json.loads(dvc(folder, "exp show --json")[0])
    experiments = {each["name"]: each["revs"][0]["data"] for each in shown[1]["experiments"]}
    metrics = {
        name: data["metrics"]["artifacts/evaluation/metrics.json"]["data"]
        for name, data in experiments.items()
    }
    assert experiments.keys() == {"one", "two", "three", "eight"}
    trainable = [metrics[name]["lora"]["trainable"] for name in ("one", "two", "three", "eight")]
    assert trainable == sorted(set(trainable))
    assert len({metrics[name]["lora"]["new_loss"] for name in metrics}) == 4

    # The base was made once, though three of them ran in a copy.
    entries = Cache(folder / ".lora-cache").entries()
    kept = [entry.stage for entry in entries]
    assert [
        kept.count(stage) for stage in ("pretrain", "expand_vocab", "finetune_lora", "evaluate")
    ] == [1, 1, 4, 4]
    for entry in entries:
        artifact.verify(entry.path)
    for name, rank in (("two", 2), ("eight", 8)):
        dvc(folder, f"exp apply {name}")
        assert adapter_rank(folder) == rank
        artifact.verify(folder / "artifacts/lora_adapter")


def adapter_rank(folder: Path) -> int:
    config = (folder / "artifacts/lora_adapter/adapter_config.json").read_text(encoding="utf-8")
    rank: int = json.loads(config)["r"]
    return rank
