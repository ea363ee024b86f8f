"""Digests cached across processes: for listings, while files stay unchanged, and never for loading
a model.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.files import artifact, digest_cache
from pipeline.files.base_model import base_fingerprint
from pipeline.files.digest_cache import DigestStore, cache_home
from tests.conftest import Lora
from tests.helpers.checkpoints import sealed_copies
from tests.helpers.json_files import read_json, write_json
from tests.helpers.projects import refusal

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Every file that is hashed; files count as settled at once."""
    files: list[Path] = []
    take = artifact.file_digest

    def file_digest(path: Path) -> str:
        files.append(path)
        return take(path)

    monkeypatch.setattr(artifact, "file_digest", file_digest)
    monkeypatch.setattr(digest_cache, "SETTLED", -1)
    return files


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    found = tmp_path / "folder"
    (found / "inside").mkdir(parents=True)
    (found / "weights").write_bytes(b"12345678")
    (found / "inside/config").write_bytes(b"{}")
    return found


def kept(folder: Path) -> dict[str, str]:
    """The contents as a new process computes and saves them."""
    store = DigestStore()
    found = store.contents(folder)
    store.save()
    return found


def edit(path: Path) -> None:
    """Other bytes of the same size in the same file, with the old mtime."""
    before, content = path.stat(), bytearray(path.read_bytes())
    content[-1] ^= 1
    with path.open("r+b") as file:
        file.write(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = path.stat()
    assert (after.st_ino, after.st_size, after.st_mtime_ns) == (
        before.st_ino,
        before.st_size,
        before.st_mtime_ns,
    )


def test_what_one_process_hashed_the_next_does_not(folder: Path, hashed: list[Path]) -> None:
    wanted = artifact.contents(folder)
    hashed.clear()
    assert kept(folder) == wanted
    assert len(hashed) == 2
    assert kept(folder) == wanted
    assert DigestStore().digest(folder) == artifact.contents_digest(wanted)
    assert len(hashed) == 2


@pytest.mark.parametrize("name", ["weights", "inside/config"])
def test_an_edit_that_keeps_inode_size_and_time_is_noticed(
    folder: Path, hashed: list[Path], name: str
) -> None:
    before = kept(folder)
    edit(folder / name)
    now = kept(folder)
    assert now == artifact.contents(folder)
    assert {file for file in before if now[file] != before[file]} == {name}
    assert hashed


def test_a_file_that_comes_or_goes_is_noticed(folder: Path) -> None:
    for change in (lambda: (folder / "more").write_bytes(b""), (folder / "weights").unlink):
        kept(folder)
        change()
        assert kept(folder) == artifact.contents(folder)


def test_files_that_just_changed_are_hashed_again(
    folder: Path, hashed: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They may change once more within one tick of the file system's clock."""
    monkeypatch.setattr(digest_cache, "SETTLED", 3600 * 10**9)
    kept(folder)
    kept(folder)
    assert len(hashed) == 4


def with_entry(text: str, entry: object) -> str:
    """A store whose entries are all `entry`."""
    stored = json.loads(text)
    return json.dumps({**stored, "entries": dict.fromkeys(stored["entries"], entry)})


@pytest.mark.parametrize(
    "spoil",
    [
        lambda _: "",
        lambda text: text[: len(text) // 2],
        lambda _: "[]",
        lambda _: "[" * 100_000,
        lambda text: text.replace('"format": 1', '"format": 0'),
        lambda text: json.dumps({**json.loads(text), "entries": [1]}),
        lambda text: with_entry(text, 1),
        lambda text: with_entry(text, [1, {"weights": "0"}]),
        lambda text: with_entry(text, ["signature", {"weights": 1}]),
    ],
)
@pytest.mark.usefixtures("hashed")
def test_a_damaged_store_is_written_anew(
    folder: Path, cached: Path, spoil: Callable[[str], str]
) -> None:
    wanted = kept(folder)
    whole = cached.read_text(encoding="utf-8")
    cached.write_text(spoil(whole), encoding="utf-8")
    assert kept(folder) == wanted
    assert cached.read_text(encoding="utf-8") == whole
    assert [path.name for path in cached.parent.iterdir()] == [cached.name]


def test_where_no_store_can_be_written_digests_are_computed(folder: Path, cached: Path) -> None:
    cached.parent.parent.write_text("a file where the folder belongs", encoding="utf-8")
    assert kept(folder) == kept(folder) == artifact.contents(folder)


@pytest.mark.usefixtures("hashed")
def test_the_store_is_bounded_and_keeps_what_was_used_last(
    tmp_path: Path, cached: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digest_cache, "MAX_DIGESTS", 3)
    folders = [tmp_path / f"f{n}" for n in range(4)]
    for one in folders:
        one.mkdir()
        (one / "file").write_bytes(b"x")
    for one in (*folders[:3], folders[0]):
        kept(one)
    store = DigestStore()
    for one in (folders[0], folders[3]):
        store.contents(one)
    store.save()
    entries = read_json(cached)["entries"]
    assert list(entries) == [f"files:{one}" for one in (folders[2], folders[0], folders[3])]


@pytest.mark.usefixtures("hashed")
def test_two_processes_that_save_keep_each_others_digests(
    tmp_path: Path, folder: Path, cached: Path
) -> None:
    (tmp_path / "other").mkdir()
    one, other = DigestStore(), DigestStore()
    one.contents(folder)
    other.contents(tmp_path / "other")
    one.save()
    other.save()
    assert list(read_json(cached)["entries"]) == [
        f"files:{folder}",
        f"files:{tmp_path / 'other'}",
    ]


def test_it_lies_in_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_home() == tmp_path
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_home() == tmp_path / ".cache"


def test_a_user_without_a_home_keeps_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.setattr(digest_cache, "cache_home", cache_home)
    assert kept(folder) == kept(folder) == artifact.contents(folder)


def test_the_list_of_adapters_hashes_each_once_in_all_calls(
    cli: Lora, tmp_path: Path, hashed: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And each evaluation is read once a call, not once an adapter."""
    adapters = sealed_copies(tmp_path, 12)
    measured = {"lora": {"forgetting": {"loss_rise": 0.125}}}
    evaluation = tmp_path / "artifacts/evaluation"
    evaluation.mkdir()
    write_json(evaluation / "metrics.json", measured)
    inputs = {"artifacts/lora_adapter": artifact.digest(adapters[3])}
    artifact.seal(evaluation, {"inputs": inputs, "variants": {"lora": "artifacts/lora_adapter"}})
    read: list[Path] = []
    read_json = artifact.read_json

    def count(path: Path, hint: str) -> dict[str, object]:
        read.append(path)
        return read_json(path, hint)

    monkeypatch.setattr(artifact, "read_json", count)
    hashed.clear()
    code, first, err = cli("adapters", cwd=tmp_path)
    assert (code, err) == (0, "")
    assert first.count("+0.125") == first.count("verified") == 12, (
        "all copies are the one that was measured"
    )
    assert len([path for path in hashed if path.name == WEIGHTS]) == 12
    assert read.count(Path("artifacts/evaluation/metrics.json")) == 1
    hashed.clear()
    assert cli("adapters", cwd=tmp_path) == (0, first, "")
    assert not hashed
    edit(adapters[5] / WEIGHTS)
    out = cli("adapters", cwd=tmp_path)[1]
    assert out.count("verified") == 11
    assert {path.parent.name for path in hashed} == {"a-5"}


@pytest.mark.usefixtures("hashed")
def test_no_model_is_loaded_on_the_word_of_the_store(
    cli: Lora, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Write access to the store can falsify a listing, and nothing else."""
    adapter, base = sealed_copies(tmp_path, 1)[0], tmp_path / "artifacts/base"
    sealed, bound = artifact.contents(adapter), base_fingerprint(base)
    edit(adapter / WEIGHTS)
    with monkeypatch.context() as forged:
        forged.setattr(artifact, "contents", lambda _: sealed)
        forged.setattr(digest_cache, "base_fingerprint", lambda _: bound)
        store = DigestStore()
        store.contents(adapter)
        store.fingerprint(base)
        store.save()
    assert "verified" in cli("adapters", cwd=tmp_path)[1], "the list believes it"
    for command in (
        ["prompt", "w1", "--adapter", str(adapter)],
        ["adapters", "verify", str(adapter)],
        ["adapters", "card", str(adapter)],
        ["merge", "--adapter", str(adapter), "--out", "merged"],
        ["export", str(adapter), "--format", "peft", "--out", "exported"],
    ):
        assert "adapter_model.safetensors was changed" in refusal(cli(*command, cwd=tmp_path)), (
            command
        )
