"""Machines that share no cache: each has a folder of its own here, and between them lies a store."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import UserError
from pipeline.files import artifact
from pipeline.fleet.engines import local
from pipeline.fleet.sweeps import FleetSweep
from pipeline.project.cache import ADAPTERS, Cache
from pipeline.project.entries import stored_cache
from pipeline.project.entries.adapter_entries import outcomes, restore_adapter
from pipeline.project.entries.store import Store, Unreachable
from pipeline.project.entries.stored_cache import StoredCache
from pipeline.project.probes import held
from pipeline.stages.registry import open_project
from tests.helpers.projects import (
    BRIEF,
    cut_off,
    lora,
    make_base,
    make_one,
    new_project,
    note_texts,
    played,
    refusal,
    swept_weights,
)
from tests.helpers.s3 import BUCKET, USER, serving_s3
from tests.helpers.slurm import cluster

SETTINGS = ("finetune_lora.epochs=2", "finetune_sweep.grid={rank: [1, 2, 4]}")
STAGE, KEY = "finetune_lora", "ab" * 32


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(new_project(tmp_path_factory.mktemp("store") / "mini"), BRIEF)


@pytest.fixture
def project(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Its cluster `pool` has a store in a folder, and its cache is `here`."""
    root = tmp_path / "project"
    shutil.copytree(made, root, ignore=shutil.ignore_patterns(".lora-cache"))
    (root / "fleet.yaml").write_text("pool: {engine: local, store: team}")
    name_remote(root, url="../../team")
    for level in ("GLOBAL", "SYSTEM"):
        monkeypatch.setenv(f"DVC_{level}_CONFIG_DIR", str(tmp_path / "none"))
    monkeypatch.setenv("LORA_STORE", "")  # that it is removed at the end
    monkeypatch.setenv("LORA_CACHE", str(tmp_path / "here"))
    monkeypatch.setattr("sys.argv", ["lora", "finetune", "sweep"])
    return root


def name_remote(root: Path, **settings: str) -> None:
    (root / ".dvc").mkdir(exist_ok=True)
    lines = [f"    {key} = {value}\n" for key, value in settings.items()]
    (root / ".dvc/config").write_text("".join(["['remote \"team\"']\n", *lines]))


def send(root: Path, parts: int = 2) -> list[str]:
    """Send the sweep to the pool, and collect it; returns the notes."""
    opened = open_project(root / "params.yaml", SETTINGS)
    _, sent = played(FleetSweep(opened, SETTINGS, "pool", parts).events())
    _, collected = make_one(root, "finetune_sweep", SETTINGS)
    return note_texts([*sent, *collected])


def another_machine(root: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The project without what it made of the sweep, and an empty cache."""
    for name in ("runs", "artifacts/sweep"):
        shutil.rmtree(root / name)
    monkeypatch.setenv("LORA_CACHE", str(cache))


def trained(root: Path) -> list[str]:
    keys = list[str]()
    for path in root.glob("runs/**/trained.jsonl"):
        keys += map(json.loads, path.read_text().splitlines())
    return sorted(keys)


def stored_adapters(store: Path) -> list[str]:
    return sorted(path.parent.name for path in store.glob(f"lora-cache/{ADAPTERS}/*/manifest.json"))


def run_on_nodes(monkeypatch: pytest.MonkeyPatch, caches: Sequence[Path]) -> None:
    """Let units of this machine have a cache each, as if each were on another."""
    places = [{"LORA_CACHE": str(cache), "OMP_NUM_THREADS": "1"} for cache in caches]
    monkeypatch.setattr(local, "_places", lambda most: places[:most])


def cached_adapters(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.glob(f"{ADAPTERS}/[!.]*/"))


def test_units_with_caches_of_their_own_make_one_sweep_to_the_bit(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = [tmp_path / "node1", tmp_path / "node2"]
    run_on_nodes(monkeypatch, nodes)
    notes = send(project)
    assert "3 of 3 adapters are taken from the cache" in " ".join(notes)
    keys = stored_adapters(tmp_path / "team")
    assert len(keys) == 3 and trained(project) == keys == cached_adapters(tmp_path / "here")
    assert sorted(key for node in nodes for key in cached_adapters(node)) == keys
    weights = swept_weights(project)

    # with an empty cache everything comes from the store
    another_machine(project, tmp_path / "there", monkeypatch)
    notes = send(project)
    assert not [note for note in notes if "units" in note] and not trained(project)
    assert swept_weights(project) == weights and len(weights) == 3

    monkeypatch.setenv("LORA_STORE", "")
    make_one(project, "finetune_sweep", SETTINGS, force=True)
    assert swept_weights(project) == weights


def test_a_damaged_result_of_the_store_is_named_and_made_again(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    send(project, parts=1)
    weights, keys = swept_weights(project), stored_adapters(tmp_path / "team")
    (damaged,) = tmp_path.glob(f"team/lora-cache/{ADAPTERS}/{keys[0]}/*/*.safetensors")
    cut_off(damaged)
    another_machine(project, tmp_path / "there", monkeypatch)
    with held() as findings:
        notes = send(project)
    (finding,) = findings
    assert str(finding).startswith(f"store team: {damaged} has ")
    assert str(finding).endswith("; the result is made again")
    assert "finetune_sweep: 1 adapter, 2 from the cache, in 1 unit on pool" in " ".join(notes)
    assert trained(project) == keys[:1] and swept_weights(project) == weights
    another_machine(project, tmp_path / "third", monkeypatch)
    send(project)
    assert not trained(project) and swept_weights(project) == weights


def test_a_store_that_does_not_answer_is_told_before_anything_starts(
    project: Path, tmp_path: Path
) -> None:
    (tmp_path / "team").write_text("not a folder")
    grid = [f"--set={setting}" for setting in SETTINGS]
    for store, message in (
        ("team", "fleet.yaml: store: team: "),
        ("nowhere", "fleet.yaml: store: DVC has no remote nowhere, only team."),
    ):
        (project / "fleet.yaml").write_text(f"pool: {{engine: local, store: {store}}}")
        told = lora("finetune", "sweep", *grid, "--on", "pool", cwd=project)
        assert message in refusal((told.returncode, told.stdout, told.stderr))
        assert not [*project.glob("runs/*/fleet/*/units/*")]


@pytest.fixture
def cache(project: Path, tmp_path: Path) -> StoredCache:
    return StoredCache(tmp_path / "here", Store.open(project, "team"))


def result(folder: Path) -> Path:
    folder.mkdir()
    (folder / "weights").write_bytes(b"1234")
    artifact.seal(folder, {"kind": "adapter"})
    return folder


def fail(cache: StoredCache, times: int, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Let uploads fail so many times; returns the list of attempts."""
    tried, put = list[Any](), cache.remote.fs.put

    def attempt(*names: Any) -> None:
        tried.append(names)
        if len(tried) <= times:
            raise ConnectionError("reset by peer")
        put(*names)

    monkeypatch.setattr(cache.remote.fs, "put", attempt)
    monkeypatch.setattr(stored_cache, "PAUSES", (0.0, 0.0))
    return tried


def test_an_upload_is_tried_again(
    cache: StoredCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = fail(cache, 2, monkeypatch)
    cache.store(STAGE, KEY, result(tmp_path / "made"))
    assert len(tried) == 3 and cache.remote.has(STAGE, KEY)


def test_what_was_not_uploaded_stays_in_the_cache_and_is_uploaded_once_it_is_read(
    cache: StoredCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail(cache, 3, monkeypatch)
    with pytest.raises(Unreachable, match=r"store: team: reset by peer\. Check it with `dvc"):
        cache.store(STAGE, KEY, result(tmp_path / "made"))
    assert Cache(cache.root).has(STAGE, KEY) and not cache.remote.has(STAGE, KEY)
    assert cache.restore(STAGE, KEY, tmp_path / "again") and cache.remote.has(STAGE, KEY)


def test_a_store_that_stops_to_answer_is_not_one_without_the_result(
    cache: StoredCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise ConnectionError("reset by peer")

    assert not outcomes(cache, {"rank-1": KEY})
    assert not restore_adapter(cache, KEY, tmp_path / "adapter")
    monkeypatch.setattr(cache.remote.fs, "cat_file", refuse)
    with pytest.raises(Unreachable, match="reset by peer"):
        outcomes(cache, {"rank-1": KEY})
    with pytest.raises(Unreachable, match="reset by peer"):
        restore_adapter(cache, KEY, tmp_path / "adapter")


def test_a_stage_whose_result_cannot_be_uploaded_ends_with_the_error_and_resumes_from_the_cache(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORA_STORE", "team")
    monkeypatch.setattr(stored_cache, "PAUSES", ())
    with monkeypatch.context() as away:

        def refuse(*_: Any, **__: Any) -> None:
            raise Unreachable("fleet.yaml: store: team: away.")

        away.setattr(Store, "push", refuse)
        with pytest.raises(UserError, match="team: away"):
            make_one(project, STAGE, SETTINGS)
    assert not (tmp_path / "team" / "lora-cache" / STAGE).exists()
    _, events = make_one(project, STAGE, SETTINGS)
    assert "nothing to do, taken from the cache" in " ".join(note_texts(events))
    assert [*(tmp_path / "team" / "lora-cache" / STAGE).glob("*/manifest.json")]


def test_a_part_that_was_not_uploaded_is_uploaded_by_the_next_attempt(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORA_WORK", str(tmp_path / "unit"))
    grid = [f"--set={setting}" for setting in SETTINGS]
    for store, stored in (("", 0), ("team", 1)):
        told = lora("finetune", "sweep", "--only", "rank-1", *grid, cwd=project, LORA_STORE=store)
        assert told.returncode == 0, told.stderr
        assert len(stored_adapters(tmp_path / "team")) == stored
    assert len(trained(tmp_path / "unit")) == 1


def test_clones_that_share_a_store_train_nothing_twice(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for clone, seeds, is_made in (("a", "0", False), ("b", "1", False), ("c", "0,1", True)):
        root = tmp_path / clone
        shutil.copytree(project, root)
        monkeypatch.setenv("LORA_CACHE", str(root / "cache"))
        command = ["fleet", "run", "lora", "--vary", f"seed={seeds}", f"--set={SETTINGS[0]}"]
        told = lora(*command, "--on", "pool", cwd=root)
        assert told.returncode == 0 and "all in the cache" in told.stdout, told.stderr
        assert ("on pool (local)" not in told.stderr) == is_made
    assert len([*(root / "cache" / STAGE).glob("[!.]*/")]) == 2


def test_what_another_machine_measured_comes_from_the_store(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_one(project, STAGE, SETTINGS)
    command = ["evaluate", "--adapter", "artifacts/lora_adapter", "--on", "pool"]
    told = lora(*command, cwd=project)
    assert told.returncode == 0 and "on pool (local)" in told.stderr, told.stderr
    shutil.rmtree(project / "artifacts/measured")
    monkeypatch.setenv("LORA_CACHE", str(tmp_path / "there"))
    again = lora(*command, cwd=project)
    assert (again.returncode, again.stdout) == (0, told.stdout), again.stderr
    assert "units" not in again.stderr


@pytest.mark.slow
def test_a_sweep_goes_through_s3(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in USER.items():
        monkeypatch.setenv(name, value)
    run_on_nodes(monkeypatch, [tmp_path / "node1", tmp_path / "node2"])
    with serving_s3() as address:
        name_remote(project, url=f"s3://{BUCKET}/{tmp_path.name}", endpointurl=address)
        send(project)
        weights, keys = swept_weights(project), trained(project)
        remote = Store.open(project, "team")
        assert len(keys) == 3 and all(remote.has(ADAPTERS, key) for key in keys)
        another_machine(project, tmp_path / "there", monkeypatch)
        send(project)
        assert not trained(project) and swept_weights(project) == weights


@pytest.mark.slow
def test_nodes_of_slurm_have_the_caches_that_setup_names(project: Path, tmp_path: Path) -> None:
    setup = f'export LORA_CACHE="{tmp_path}/disk-$SLURMD_NODENAME"'
    pool = {"engine": "slurm", "store": "team", "at_once": 2, "setup": [setup]}
    (project / "fleet.yaml").write_text(json.dumps({"pool": pool}))
    grid = [f"--set={setting}" for setting in SETTINGS]
    with cluster(tmp_path / "slurm") as nodes:
        command = ["finetune", "sweep", *grid, "--on", "pool", "--parts", "2"]
        told = lora(*command, cwd=project, **nodes.environment)
    assert told.returncode == 0, told.stderr
    assert "3 of 3 adapters are taken from the cache" in told.stderr
    keys = stored_adapters(tmp_path / "team")
    assert len(keys) == 3 and trained(project) == keys == cached_adapters(tmp_path / "here")
    disks = [*tmp_path.glob("disk-node*")]
    assert {key for disk in disks for key in cached_adapters(disk)} == {*keys}
