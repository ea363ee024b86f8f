"""The packed demo: whole, up to date under any code, replaced when damaged, and never over a user's
own work.
"""

import io
import lzma
import tarfile
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.files import artifact
from pipeline.stages.registry import open_project
from pipeline.views.stages import Status
from tests.helpers.json_files import read_json
from tui.services.projects import demo
from tui.services.projects.demo import ARCHIVE, TRAINED, open_demo


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def states(params: Path) -> dict[str, str]:
    return {name: state.state for name, state in Status().of(open_project(params)).items()}


def test_all_of_its_stages_are_up_to_date_and_it_says_what_made_them() -> None:
    params = open_demo()
    assert set(states(params).values()) == {"current"}
    manifest = artifact.read_manifest(params.parent / "artifacts/lora_adapter")
    assert set(manifest[TRAINED]) == {"version", "date", "code", "versions"}
    assert manifest[TRAINED]["date"] in (params.parent / "README.md").read_text(encoding="utf-8")
    assert ARCHIVE.stat().st_size < 800_000, "it is the largest file of the wheel"


def test_it_shows_what_it_is_meant_to() -> None:
    metrics = read_json(open_demo().parent / "artifacts/evaluation/metrics.json")
    kept = {
        name: metrics[name]["forgetting"]["answers_kept"] for name in ("lora", "full", "prompt")
    }
    assert kept["lora"] > kept["full"] > kept["prompt"]
    assert {broken["variant"] for broken in metrics["gate"]["broken"]} == {"full"}
    assert set(metrics["gate"]["variants"]) == {"full", "lora"}
    assert metrics["base"]["tasks"]


def test_it_is_up_to_date_when_the_code_and_the_libraries_change() -> None:
    params = open_demo()
    # as an earlier version of the code has stamped it
    for path in params.parent.glob("artifacts/*/manifest.json"):
        tree = read_json(path)
        artifact.write_json(
            path, {**tree, "code": "another", "versions": {**tree["versions"], "python": "3.0"}}
        )
    assert "current" not in states(params).values()
    open_demo()
    assert "current" not in states(params).values()  # it believes what it has noted
    stamp = read_json(params.parent / demo.STAMP)
    artifact.write_json(params.parent / demo.STAMP, {**stamp, "code": "another"})
    open_demo()
    assert set(states(params).values()) == {"current"}


@pytest.mark.parametrize("damage", ["remove", "cut", "stamp", "half"])
def test_a_damaged_one_is_replaced(damage: str) -> None:
    params = open_demo()
    weights = params.parent / "artifacts/lora_adapter/adapter_model.safetensors"
    if damage == "remove":
        (params.parent / "dvc.yaml").unlink()
    elif damage == "cut":
        weights.write_bytes(weights.read_bytes()[:100])
    elif damage == "stamp":
        (params.parent / demo.STAMP).write_text("{", encoding="utf-8")
    else:  # a process that was killed while it unpacked
        for path in sorted(params.parent.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
    assert set(states(open_demo()).values()) == {"current"}


def test_what_a_user_makes_anew_or_edits_is_kept() -> None:
    params = open_demo()
    folder = params.parent / "artifacts/lora_adapter"
    manifest = artifact.read_manifest(folder)
    del manifest[TRAINED]
    (folder / "loss.csv").write_text("step\n", encoding="utf-8")  # the user's own run
    artifact.write_json(folder / artifact.MANIFEST, manifest)
    params.write_text(
        params.read_text(encoding="utf-8").replace("rank: 4", "rank: 6"), encoding="utf-8"
    )
    open_demo()
    assert (folder / "loss.csv").read_text(encoding="utf-8") == "step\n"
    assert states(params)["finetune_lora"] == "changed"


@pytest.mark.parametrize("name", ["../outside", "/outside", "link"])
def test_an_archive_that_reaches_out_is_refused(
    name: str, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        member = tarfile.TarInfo(name)
        if name == "link":
            member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(member)
    monkeypatch.setattr(demo, "ARCHIVE", tmp_path / "bad.tar.xz")
    (tmp_path / "bad.tar.xz").write_bytes(lzma.compress(buffer.getvalue()))
    with pytest.raises(UserError, match="has no place in it"):
        open_demo()
    assert [*(cache / "lora-workbench").glob("demo-*")] == []


def test_a_cache_that_cannot_be_written_is_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match="The demo cannot be unpacked: Not a directory"):
        open_demo()


def test_an_archive_that_is_cut_is_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "ARCHIVE", tmp_path / "cut.tar.xz")
    (tmp_path / "cut.tar.xz").write_bytes(ARCHIVE.read_bytes()[:5000])
    with pytest.raises(UserError, match="is damaged"):
        open_demo()
