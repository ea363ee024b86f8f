"""The packed demos: whole, up to date under any code, replaced when damaged, and never over a user's
own work; one without weights answers by what was recorded.
"""

import io
import lzma
import tarfile
from contextlib import aclosing
from pathlib import Path

import pytest

from docs.demo.archive import pack_tokenizer
from pipeline.data.check import check
from pipeline.errors import UserError
from pipeline.files import artifact
from pipeline.project.runner import run
from pipeline.stages.registry import open_project
from pipeline.views.model_library import Library
from pipeline.views.models import WITHOUT_WEIGHTS
from pipeline.views.stages import Status
from tests.helpers.json_files import read_json
from tui.services.engine_client import ANSWERS, Inference
from tui.services.projects import demo, packed_tokenizer
from tui.services.projects.demo import ARCHIVES, CHAT, MINIGPT, TRAINED, greet, open_demo

both = pytest.mark.parametrize("name", ARCHIVES)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def states(params: Path) -> dict[str, str]:
    return {name: state.state for name, state in Status().of(open_project(params)).items()}


@both
def test_all_of_its_stages_are_up_to_date_and_it_says_what_made_them(name: str) -> None:
    params = open_demo(name)
    assert set(states(params).values()) == {"current"}
    manifest = artifact.read_manifest(params.parent / "artifacts/lora_adapter")
    assert set(manifest[TRAINED]) == {"version", "date", "code", "versions", "inputs", "files"}
    assert manifest[TRAINED]["date"] in (params.parent / "README.md").read_text(encoding="utf-8")


def test_both_together_are_less_than_a_megabyte_of_the_wheel() -> None:
    assert sum(archive.stat().st_size for archive in ARCHIVES.values()) < 1_000_000


def test_minigpt_shows_what_it_is_meant_to() -> None:
    metrics = read_json(open_demo(MINIGPT).parent / "artifacts/evaluation/metrics.json")
    kept = {
        name: metrics[name]["forgetting"]["answers_kept"] for name in ("lora", "full", "prompt")
    }
    assert kept["lora"] > kept["full"] > kept["prompt"]
    assert {broken["variant"] for broken in metrics["gate"]["broken"]} == {"full"}
    assert set(metrics["gate"]["variants"]) == {"full", "lora"}
    assert metrics["base"]["tasks"]


def test_the_chat_shows_what_it_is_meant_to() -> None:
    folder = open_demo().parent
    metrics = read_json(folder / "artifacts/evaluation/metrics.json")
    base, lora, full = (metrics[name]["tasks"] for name in ("base", "lora", "full"))
    for adapted in (lora, full):  # which learned: by more than chance, as the interval says
        assert adapted["like people"]["difference"]["low"] > 0
    assert full["facts"]["score"] < lora["facts"]["score"] <= base["facts"]["score"]
    assert {broken["variant"] for broken in metrics["gate"]["broken"]} == {"full"}
    assert set(metrics["gate"]["variants"]) == {"full", "lora"}

    rows = (folder / "data/chats.jsonl").read_text(encoding="utf-8").splitlines()
    assert 300 <= len(rows) <= 400
    report = check([folder / "data/collected.jsonl"])
    assert report.errors == 3 and report.duplicates == 4
    assert "Permission is hereby granted" in (folder / "data/LICENSE").read_text(encoding="utf-8")


def test_the_chat_has_no_weights_and_says_so() -> None:
    folder = open_demo().parent
    assert not [*folder.rglob("*.safetensors"), *folder.rglob("*.gguf")]
    assert "has no weights" in greet(folder) and "has no weights" not in greet(
        open_demo(MINIGPT).parent
    )
    library = Library(open_project(folder / "params.yaml"))
    entries = [library.check(entry) for entry in library.scan()]
    assert len(entries) >= 9
    for entry in entries:
        assert entry.state == WITHOUT_WEIGHTS and entry.model.size > 100_000, entry.label
        assert entry.verdict and "shipped without" in str(entry.verdict.reason)
    gates = {entry.label: entry.gate for entry in entries}
    assert gates["lora"] == ", gate passed" and gates["full"].startswith(", gate failed")


def test_a_stage_that_needs_the_weights_says_what_makes_them() -> None:
    project = open_project(open_demo())
    with pytest.raises(UserError, match=r"was shipped without model\.safetensors\. Run `?lora"):
        list(run(project, project.stages["finetune_lora"]))
    with pytest.raises(UserError, match=r"SmolLM2.*: No such file or directory\. Put the file"):
        list(run(project, project.stages["import"], force=True))


async def test_answers_are_replayed_as_the_models_gave_them() -> None:
    folder = open_demo().parent
    recording = read_json(folder / ANSWERS)
    exchange = next(e for e in recording["exchanges"] if e["chat"] and len(e["said"]) == 1)
    engine = Inference(folder)
    assert engine.replays and not Inference(open_demo(MINIGPT).parent).replays
    try:
        for model in ("artifacts/expanded", "artifacts/lora_adapter"):
            adapter = model if "adapter" in model else None
            fields = {"base": "artifacts/expanded", "adapter": adapter}
            await engine.ask("load", name=str(folder / model), **fields)
        chat = [{"role": "user", "content": exchange["said"][0]}]
        for model, recorded in exchange["answers"].items():
            if model not in ("artifacts/expanded", "artifacts/lora_adapter"):
                continue
            text = ""
            async with aclosing(
                engine.stream("generate", model=str(folder / model), messages=chat, limit=512)
            ) as events:
                async for event in events:
                    text += event["text"] if event["event"] == "token" else ""
            assert text == "".join(recorded["pieces"])
        unknown = [{"role": "user", "content": "What is new?"}]
        with pytest.raises(UserError, match="it replays recorded answers, and has none to this"):
            await engine.ask("generate", model=str(folder / model), messages=unknown)
    finally:
        await engine.stop()


def test_a_packed_tokenizer_is_unpacked_whole() -> None:
    path = open_demo().parent / "artifacts/base/tokenizer.json"
    text = path.read_text(encoding="utf-8")
    packed = pack_tokenizer(text)
    assert len(packed) < len(text) / 3 and packed_tokenizer.unpack(packed) == text
    vocabulary = read_json(path)["model"]["vocab"]
    assert len(vocabulary) == 49_152 == len(set(vocabulary.values()))


@both
def test_it_is_up_to_date_when_the_code_and_the_libraries_change(name: str) -> None:
    params = open_demo(name)
    # as an earlier version of the code has stamped it
    for path in params.parent.glob("artifacts/*/manifest.json"):
        tree = read_json(path)
        artifact.write_json(
            path, {**tree, "code": "another", "versions": {**tree["versions"], "python": "3.0"}}
        )
    assert "current" not in states(params).values()
    open_demo(name)
    assert "current" not in states(params).values()  # it believes what it has noted
    stamp = read_json(params.parent / demo.STAMP)
    artifact.write_json(params.parent / demo.STAMP, {**stamp, "code": "another"})
    open_demo(name)
    assert set(states(params).values()) == {"current"}


@pytest.mark.parametrize("damage", ["remove", "cut", "stamp", "half"])
def test_a_damaged_one_is_replaced(damage: str) -> None:
    params = open_demo(MINIGPT)
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
    assert set(states(open_demo(MINIGPT)).values()) == {"current"}


def test_what_a_user_makes_anew_or_edits_is_kept() -> None:
    params = open_demo(MINIGPT)
    folder = params.parent / "artifacts/lora_adapter"
    manifest = artifact.read_manifest(folder)
    del manifest[TRAINED]
    (folder / "loss.csv").write_text("step\n", encoding="utf-8")  # the user's own run
    artifact.write_json(folder / artifact.MANIFEST, manifest)
    params.write_text(
        params.read_text(encoding="utf-8").replace("rank: 4", "rank: 6"), encoding="utf-8"
    )
    open_demo(MINIGPT)
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
    monkeypatch.setattr(demo, "ARCHIVES", {CHAT: tmp_path / "bad.tar.xz"})
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
    monkeypatch.setattr(demo, "ARCHIVES", {CHAT: tmp_path / "cut.tar.xz"})
    (tmp_path / "cut.tar.xz").write_bytes(ARCHIVES[CHAT].read_bytes()[:5000])
    with pytest.raises(UserError, match="is damaged"):
        open_demo()
