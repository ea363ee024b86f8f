"""Results that machines without a shared folder exchange: each has a cache of its own here, and the
store is a folder or S3.
"""

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from dvc.fs import known_implementations
from hypothesis import example, given
from hypothesis import strategies as st

from pipeline.errors import UserError
from pipeline.files import artifact
from pipeline.project.cache import Cache, Damaged
from pipeline.project.entries import store as module
from pipeline.project.entries.store import Store
from tests.helpers.projects import cut_off, folder_bytes
from tests.helpers.s3 import BUCKET, USER, serving_s3

STAGE, KEY = "finetune_lora", "ab" * 32
FILES = {"adapter.safetensors": b"\x00\x01" * 500, "tokenizer/a b.json": b"{}", "empty": b""}


@pytest.fixture(autouse=True)
def no_settings_of_the_developer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for level in ("GLOBAL", "SYSTEM"):
        monkeypatch.setenv(f"DVC_{level}_CONFIG_DIR", str(tmp_path / "none"))


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    with serving_s3() as address:
        yield address


def repository(folder: Path, *remotes: str) -> Path:
    """A DVC repository with these sections of its config."""
    (folder / ".dvc").mkdir(parents=True)
    (folder / ".dvc/config").write_text("".join(remotes))
    return folder


def remote(name: str, **settings: str) -> str:
    lines = [f"    {key} = {value}\n" for key, value in settings.items()]
    return "".join([f"['remote \"{name}\"']\n", *lines])


@pytest.fixture
def folder_store(tmp_path: Path) -> Store:
    root = repository(tmp_path / "project", remote("team", url="../../team"))
    return Store.open(root, "team")


@pytest.fixture(params=["folder", "S3"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    if request.param == "folder":
        found: Store = request.getfixturevalue("folder_store")
        return found
    for name, value in USER.items():
        monkeypatch.setenv(name, value)
    address = request.getfixturevalue("s3")
    url = f"s3://{BUCKET}/{tmp_path.name}"
    root = repository(tmp_path / "project", remote("team", url=url, endpointurl=address))
    return Store.open(root, "team")


def cache_with(root: Path, files: dict[str, bytes], key: str = KEY, **facts: Any) -> Cache:
    """A cache with one result."""
    made = root / "made" / key
    for name, content in files.items():
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        (made / name).write_bytes(content)
    made.mkdir(parents=True, exist_ok=True)
    artifact.seal(made, {"kind": "adapter", **facts})
    cache = Cache(root / "cache")
    cache.store(STAGE, key, made)
    return cache


def result(cache: Cache, key: str = KEY) -> dict[str, bytes]:
    return folder_bytes(cache.root / STAGE / key)


def stored(store: Store) -> Path:
    """The folder of the result's files in a store that is a folder."""
    (folder,) = Path(store.root, module.CACHE, STAGE, KEY).glob("*/")
    return folder


def edit_manifest(store: Store, edit: Callable[[dict[str, Any]], object]) -> None:
    path = Path(store.root, module.CACHE, STAGE, KEY, "manifest.json")
    manifest = json.loads(path.read_text())
    edit(manifest)
    path.write_text(json.dumps(manifest))


def test_a_result_reaches_another_machine_with_the_same_bytes(store: Store, tmp_path: Path) -> None:
    here, there = cache_with(tmp_path, FILES, note="é \u2028"), Cache(tmp_path / "there")
    assert not store.has(STAGE, KEY)
    assert not store.pull(there, STAGE, KEY) and not there.has(STAGE, KEY)
    store.push(here, STAGE, KEY)
    assert store.has(STAGE, KEY)
    assert store.pull(there, STAGE, KEY)
    assert result(there) == result(here)
    assert {*result(there)} == {*FILES, "manifest.json"}
    assert [path.name for path in (there.root / STAGE).iterdir()] == [KEY]
    assert there.restore(STAGE, KEY, tmp_path / "artifact")


def test_a_damaged_result_that_another_machine_replaced_is_used(
    store: Store, tmp_path: Path
) -> None:
    here, there = cache_with(tmp_path, FILES), Cache(tmp_path / "there")
    other = replace(store, fs=type(store.fs)(**store.fs.config))
    store.push(here, STAGE, KEY)
    (path,) = (path for path in store.fs.find(store.root) if path.endswith("adapter.safetensors"))
    store.fs.remove(path)
    with pytest.raises(Damaged, match=r"adapter\.safetensors is missing"):
        store.pull(there, STAGE, KEY)
    other.push(here, STAGE, KEY)
    with pytest.raises(Damaged, match=r"adapter\.safetensors is missing"):
        store.pull(there, STAGE, KEY)
    other.push(here, STAGE, KEY, replace=True)
    assert store.pull(there, STAGE, KEY) and result(there) == result(here)


def test_an_empty_result_is_one_too(store: Store, tmp_path: Path) -> None:
    store.push(cache_with(tmp_path, {}), STAGE, KEY)
    there = Cache(tmp_path / "there")
    assert store.pull(there, STAGE, KEY) and {*result(there)} == {"manifest.json"}


def test_a_second_push_writes_nothing(store: Store, tmp_path: Path) -> None:
    here, there = cache_with(tmp_path, FILES), Cache(tmp_path / "there")
    store.push(here, STAGE, KEY)
    store.push(cache_with(tmp_path / "other", {"other": b"1"}), STAGE, KEY)
    assert store.pull(there, STAGE, KEY) and result(there) == result(here)


def test_a_machine_that_is_killed_between_files_leaves_no_result(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = cache_with(tmp_path, FILES), Cache(tmp_path / "there")
    put = store.fs.put

    def die(sources: list[str], targets: list[str]) -> None:
        put(sources[:1], targets[:1])
        raise KeyboardInterrupt

    with monkeypatch.context() as killed:
        killed.setattr(store.fs, "put", die)
        with pytest.raises(KeyboardInterrupt):
            store.push(here, STAGE, KEY)
    assert not store.has(STAGE, KEY)
    assert not store.pull(there, STAGE, KEY)
    store.push(here, STAGE, KEY)
    assert store.pull(there, STAGE, KEY) and result(there) == result(here)


def test_two_machines_that_push_different_bytes_leave_one_whole_result(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second one pushes while the first one does, who has seen no manifest."""
    first, second = cache_with(tmp_path / "1", FILES), cache_with(tmp_path / "2", {"empty": b"2"})
    there, put = Cache(tmp_path / "there"), store.fs.put

    def interleave(sources: list[str], targets: list[str]) -> None:
        put(sources[:1], targets[:1])
        monkeypatch.setattr(store.fs, "put", put)
        store.push(second, STAGE, KEY)
        put(sources[1:], targets[1:])

    monkeypatch.setattr(store.fs, "put", interleave)
    store.push(first, STAGE, KEY)
    assert store.pull(there, STAGE, KEY) and result(there) == result(first)


def test_a_reader_gets_one_result_while_another_is_pushed(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = cache_with(tmp_path / "1", FILES), cache_with(tmp_path / "2", {"empty": b"2"})
    store.push(first, STAGE, KEY)
    get = store.fs.get

    def interleave(sources: list[str], targets: list[str]) -> None:
        with monkeypatch.context() as nothing_there:
            nothing_there.setattr(Store, "has", lambda *_: False)
            store.push(second, STAGE, KEY)
        get(sources, targets)

    monkeypatch.setattr(store.fs, "get", interleave)
    there = Cache(tmp_path / "there")
    assert store.pull(there, STAGE, KEY) and result(there) == result(first)
    monkeypatch.setattr(store.fs, "get", get)
    later = Cache(tmp_path / "later")
    assert store.pull(later, STAGE, KEY) and result(later) == result(second)


def test_many_threads_push_and_pull_one_key(folder_store: Store, tmp_path: Path) -> None:
    caches = [cache_with(tmp_path / str(n), {**FILES, "empty": bytes(n)}) for n in range(6)]

    def exchange(cache: Cache) -> dict[str, bytes]:
        folder_store.push(cache, STAGE, KEY)
        there = Cache(cache.root / "there")
        assert folder_store.pull(there, STAGE, KEY)
        return result(there)

    with ThreadPoolExecutor(6) as threads:
        assert all(made in map(result, caches) for made in threads.map(exchange, caches))


def truncate(store: Store) -> None:
    cut_off(stored(store) / "adapter.safetensors")


def lengthen(store: Store) -> None:
    os.truncate(stored(store) / "adapter.safetensors", 10**12)  # takes no space on the disk


def change(store: Store) -> None:
    (stored(store) / "adapter.safetensors").write_bytes(b"\x01\x00" * 500)


def remove(store: Store) -> None:
    (stored(store) / "adapter.safetensors").unlink()


def link(store: Store) -> None:
    path = stored(store) / "adapter.safetensors"
    target = path.rename(path.with_name("target"))
    path.symlink_to(target)


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (truncate, "adapter.safetensors has 900 bytes instead of 1,000."),
        (lengthen, "adapter.safetensors has 1,000,000,000,000 bytes instead of 1,000."),
        (change, "adapter.safetensors was changed"),
        (remove, "adapter.safetensors is missing."),
        (link, "adapter.safetensors is a link."),
    ],
)
def test_a_damaged_file_is_named_and_stays_out_of_the_cache(
    damage: Callable[[Store], None], problem: str, folder_store: Store, tmp_path: Path
) -> None:
    folder_store.push(cache_with(tmp_path, FILES), STAGE, KEY)
    damage(folder_store)
    before = {path.name for path in stored(folder_store).iterdir()}
    there = Cache(tmp_path / "there")
    with pytest.raises(Damaged) as caught:
        folder_store.pull(there, STAGE, KEY)
    assert str(caught.value).startswith(f"{stored(folder_store)}/{problem}")
    assert {path.name for path in stored(folder_store).iterdir()} == before
    assert folder_bytes(there.root) == {} and not there.has(STAGE, KEY)


@pytest.mark.parametrize(
    "edit",
    [
        lambda manifest: manifest.pop("files"),
        lambda manifest: manifest.pop("sizes"),
        lambda manifest: manifest.update(files=["a"]),
        lambda manifest: manifest.update(files={"a": 1}),
        lambda manifest: manifest.update(sizes={"a": "1"}),
        lambda manifest: manifest["files"].update({"manifest.json": "0"}),
        lambda manifest: manifest["files"].update({"more": "0"}),
        lambda manifest: manifest.update(kind="\ud800"),
        lambda manifest: manifest.update(sizes={}),
    ],
)
def test_a_manifest_of_other_contents_is_damaged(
    edit: Callable[[dict[str, Any]], object], folder_store: Store, tmp_path: Path
) -> None:
    folder_store.push(cache_with(tmp_path, FILES), STAGE, KEY)
    edit_manifest(folder_store, edit)
    with pytest.raises(Damaged, match=r"manifest|missing|bytes|surrogates"):
        folder_store.pull(Cache(tmp_path / "there"), STAGE, KEY)


@pytest.mark.parametrize(
    "text", ["", "{", "null", "[" * 100_000, '"a"', '{"files": {}, "sizes": 1}']
)
def test_a_manifest_that_cannot_be_read_is_no_result_and_pushed_again(
    text: str, folder_store: Store, tmp_path: Path
) -> None:
    here, there = cache_with(tmp_path, FILES), Cache(tmp_path / "there")
    folder_store.push(here, STAGE, KEY)
    path = Path(folder_store.root, module.CACHE, STAGE, KEY, "manifest.json")
    path.write_text(text)
    assert not folder_store.has(STAGE, KEY)
    with pytest.raises(Damaged, match=r"manifest\.json is not a manifest of this project\."):
        folder_store.pull(there, STAGE, KEY)
    folder_store.push(here, STAGE, KEY)
    assert folder_store.pull(there, STAGE, KEY) and result(there) == result(here)


def test_a_manifest_too_large_is_read_no_further(
    folder_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder_store.push(cache_with(tmp_path, FILES), STAGE, KEY)
    path = Path(folder_store.root, module.CACHE, STAGE, KEY, "manifest.json")
    size = path.stat().st_size - 1  # without the line break
    monkeypatch.setattr(artifact, "LARGEST_JSON", size)
    assert folder_store.has(STAGE, KEY)
    monkeypatch.setattr(artifact, "LARGEST_JSON", size - 1)
    with pytest.raises(UserError, match=f"must have at most {size - 1:,} bytes"):
        folder_store.has(STAGE, KEY)


def test_a_result_larger_than_the_disk_is_not_downloaded(
    folder_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder_store.push(cache_with(tmp_path, FILES), STAGE, KEY)
    # a file with a hole, which takes no space
    os.truncate(stored(folder_store) / "empty", 10**12)
    edit_manifest(folder_store, lambda manifest: manifest["sizes"].update(empty=10**12))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10**9))
    with pytest.raises(UserError, match="needs 1,000,000,001,002 bytes"):
        folder_store.pull(Cache(tmp_path / "there"), STAGE, KEY)


PARTS = st.sampled_from(
    ["", ".", "..", "a", "/", "\\", "C:", "\x00", "\n", "\ud800", "é", "x" * 256]
)
NAMES = st.lists(PARTS | st.text(max_size=3), min_size=1, max_size=4).map("/".join)


@given(NAMES)
def test_a_name_is_inside_its_folder_or_rejected(name: str) -> None:
    """By pathlib and the file system, instead of by the parts of the name."""
    folder = Path("/folder")
    path = Path(os.path.normpath(f"{folder}/{name}"))
    if module._is_inside(name):
        assert folder in path.parents and str(path) == f"{folder}/{name}"
        assert all(len(os.fsencode(part)) <= 255 for part in path.parts)
        assert name.isprintable() and "\\" not in name


@given(NAMES)
@example("../a")
@example("a/../../../a")
def test_a_hostile_manifest_writes_nothing_outside(
    tmp_path_factory: pytest.TempPathFactory, name: str
) -> None:
    """The remote has what its manifest names, wherever that leads."""
    root = tmp_path_factory.mktemp("hostile")
    hostile = Store.open(repository(root / "project", remote("team", url="../../team")), "team")
    there = Cache(root / "there")
    (there.root / STAGE).mkdir(parents=True)
    manifest = {"files": {name: hashlib.sha256(b"x").hexdigest()}, "sizes": {name: 1}}
    entry = Path(hostile.root, module.CACHE, STAGE, KEY)
    folder = entry / artifact.sealed_digest(manifest)
    folder.mkdir(parents=True)
    (entry / "manifest.json").write_text(json.dumps(manifest))
    with suppress(OSError, ValueError):
        path = Path(os.path.normpath(f"{folder}/{name}"))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")

    before = folder_bytes(root)
    with pytest.MonkeyPatch.context() as any_size:
        any_size.setattr(Store, "_refuse_other_sizes", lambda *_: None)
        try:
            assert hostile.pull(there, STAGE, KEY)
        except Damaged:
            assert result(there) == {}
        else:
            assert result(there).pop(name) == b"x"
    inside = {str(path.relative_to(root)) for path in (there.root / STAGE / KEY).rglob("*")}
    outside = {name: content for name, content in folder_bytes(root).items() if name not in inside}
    assert outside == {**before, "there/.lock": b""} or outside == before


def test_a_damaged_result_is_not_pushed(folder_store: Store, tmp_path: Path) -> None:
    here = cache_with(tmp_path, FILES)
    (here.root / STAGE / KEY / "empty").write_bytes(b"1")
    with pytest.raises(UserError, match="empty was changed"):
        folder_store.push(here, STAGE, KEY)
    assert not Path(folder_store.root).exists()


@pytest.mark.parametrize(
    ("config", "name", "message"),
    [
        ([], "team", "DVC has no remote team. See `dvc remote list`."),
        (
            [remote("a", url="/a"), remote("b", url="/b")],
            "team",
            "DVC has no remote team, only a, b. See `dvc remote list`.",
        ),
        ([remote("team", url="gs://a/b")], "team", "team: gs is supported, but requires 'dvc-gs' "),
        ([remote("team", url="remote://none/a")], "team", "DVC has no remote "),
        (["[nonsense\n"], "team", "team: "),
    ],
)
def test_a_remote_that_cannot_be_opened(
    config: list[str],
    name: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(known_implementations["gs"], "class", "no_dvc_gs.GSFileSystem")
    with pytest.raises(UserError) as caught:
        Store.open(repository(tmp_path / "project", *config), name)
    assert str(caught.value).startswith(f"fleet.yaml: store: {message}")
    assert "\n" not in str(caught.value)


def test_a_folder_in_no_repository_has_no_store(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is in no DVC repository\. Run `dvc init`"):
        Store.open(tmp_path, "team")


def test_a_store_that_cannot_be_reached_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable, value in {**USER, "AWS_MAX_ATTEMPTS": "1"}.items():
        monkeypatch.setenv(variable, value)
    nobody = remote("team", url="s3://team/a", endpointurl="http://127.0.0.1:9")
    opened = Store.open(repository(tmp_path / "project", nobody), "team")
    with pytest.raises(UserError, match=r"^fleet.yaml: store: team: .*127\.0\.0\.1:9"):
        opened.has(STAGE, KEY)


@pytest.mark.parametrize("store", ["S3"], indirect=True)
def test_a_result_of_many_files_takes_one_request_a_file_and_few_more(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from aiobotocore.client import AioBaseClient

    requests = Counter[str]()
    at_once = [0, 0]  # now, most
    call = AioBaseClient._make_api_call

    async def count(self: Any, operation: str, settings: Any) -> Any:
        requests[operation] += 1
        at_once[0] += 1
        at_once[1] = max(at_once)
        try:
            return await call(self, operation, settings)
        finally:
            at_once[0] -= 1

    monkeypatch.setattr(AioBaseClient, "_make_api_call", count)
    here = cache_with(tmp_path, {f"{n}.json": bytes(100) for n in range(50)})
    store.push(here, STAGE, KEY)
    assert requests == {"GetObject": 1, "PutObject": 51} and at_once[1] > 3
    requests.clear()
    at_once[1] = 0
    assert store.pull(Cache(tmp_path / "there"), STAGE, KEY)
    assert requests == {"GetObject": 51, "ListObjectsV2": 1} and at_once[1] > 3
