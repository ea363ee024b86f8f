"""Bases stay in memory, adapters are views of them, at any strength."""

import os
import shutil
import sys
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.adapters.config import AdapterSpec
from pipeline.errors import UserError
from pipeline.files import artifact
from pipeline.files.base_model import base_fingerprint
from pipeline.inference import engine, model_pool
from pipeline.inference.model_pool import ModelPool
from pipeline.models import device
from pipeline.models.base import CausalLM
from pipeline.models.load import load_base, save_base
from tests.helpers.checkpoints import adapter, checkpoint, token_ids
from tests.helpers.reference_merge import merged_model
from tests.helpers.side_by_side import logits, ours

IDS = token_ids(74, 3, 9)
TARGETS = ("fc1", "k_proj", "q_proj")
ENDS = ("embed_tokens", "lm_head")
KINDS = {  # one per setting of train_embeddings, and DoRA
    "none": AdapterSpec(3, 6.0, TARGETS),
    "all": AdapterSpec(3, 6.0, TARGETS, saved=ENDS),
    "new_rows": AdapterSpec(3, 6.0, TARGETS, rows=dict.fromkeys(ENDS, (60, 5, 41))),
    "dora": AdapterSpec(3, 6.0, TARGETS, dora=True),
}


@pytest.fixture(
    params=[
        *((kind, tied, 64) for kind in KINDS for tied in (False, True)),
        ("all", False, 256),
        ("dora", False, 256),
    ],
    ids=str,
)
def folders(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path]:
    """A base and an adapter of each kind; layers of 256 × 256 are too large to be folded."""
    kind, tied, width = request.param
    base = checkpoint(tmp_path / "base", tie_embeddings=tied, d_model=width)
    spec = KINDS[kind]
    if tied and spec.rows:
        spec = AdapterSpec(spec.rank, spec.alpha, spec.targets, rows={"embed_tokens": (60, 5, 41)})
    return base, adapter(tmp_path / "adapter", base, spec)


def test_a_base_keeps_every_bit_whatever_is_loaded_on_it(folders: tuple[Path, Path]) -> None:
    base, changes = folders
    models = ModelPool()
    plain = models.load("base", base, None)[0].loaded.model
    before = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    adapted, was_there = models.load("adapted", base, changes)
    assert was_there
    for strength in (1, 0.5, 2, 0, 1):
        logits(adapted.at(strength).model, IDS)
    assert not torch.equal(logits(adapted.loaded.model, IDS), logits(plain, IDS))
    models.unload("adapted")
    after = plain.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_a_model_that_was_given_stays_whatever_becomes_of_its_files(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base")
    loaded = engine.load(base, adapter(tmp_path / "adapter", base, KINDS["none"]), "adapted")
    models = ModelPool()
    models.add(loaded)
    os.utime(base / "model.safetensors", (1, 1))
    assert models.get("adapted").loaded.model is loaded.model


def test_what_an_adapter_does_not_train_in_full_is_in_memory_once(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base")
    models = ModelPool()
    plain = models.load("base", base, None)[0].loaded.model
    view = models.load("a", base, adapter(tmp_path / "a", base, KINDS["all"]))[0].loaded.model
    shared = {p.data_ptr() for p in plain.parameters()} & {p.data_ptr() for p in view.parameters()}
    unshared = sum(p.numel() for p in view.parameters() if p.data_ptr() not in shared)
    assert unshared == 2 * 74 * 64 + 2 * (2 * 3 * (64 + 64) + 3 * (64 + 256))


def test_strength_0_is_the_base_and_1_the_adapter_to_the_last_bit(
    folders: tuple[Path, Path],
) -> None:
    base, changes = folders
    model, _ = ModelPool().load("a", base, changes)
    for _ in range(2):
        assert torch.equal(logits(model.at(0).model, IDS), logits(ours(base), IDS))
        assert torch.equal(logits(model.at(1).model, IDS), logits(ours(base, changes), IDS))
        model.at(0.3)


def test_models_in_turn_answer_as_those_that_are_loaded_alone_to_the_last_bit(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    base, changes = folders
    other = checkpoint(tmp_path / "other", seed=5)
    models = {"first": (base, changes), "other": (other, None), "plain": (base, None)}
    models["again"] = base, changes
    names = []
    for loaded in ModelPool().in_turn(models):
        names.append(loaded.name)
        assert torch.equal(logits(loaded.model, IDS), logits(ours(*models[loaded.name]), IDS))
    assert names == ["first", "plain", "again", "other"]


def test_the_next_model_leaves_the_base_that_it_shares_and_no_adapter(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base")
    changes = adapter(tmp_path / "a", base, KINDS["all"])
    pool = ModelPool()
    plain = pool.load_next("base", base, None)
    adapted = pool.load_next("a", base, changes)
    shared = {p.data_ptr() for p in plain.model.blocks.parameters()}
    assert shared & {p.data_ptr() for p in adapted.model.blocks.parameters()}
    last = pool.load_next("b", base, changes)
    assert pool.names == ["b"] and not [*adapted.model.blocks.parameters()]
    assert shared & {p.data_ptr() for p in last.model.blocks.parameters()}
    checkpoint(base, seed=7)  # now it is another one
    fresh = pool.load_next("a", base, changes)
    assert not [*plain.model.blocks.parameters()]
    assert torch.equal(logits(fresh.model, IDS), logits(ours(base, changes), IDS))


@pytest.mark.parametrize("s", [0.25, 0.5, 1.5, 2.0])
def test_any_other_strength_is_w_plus_s_times_the_change_of_w(
    folders: tuple[Path, Path], s: float
) -> None:
    base, changes = folders
    model, _ = ModelPool().load("a", base, changes)
    old, new = load_base(base).model, merged_model(ours(base, changes))
    with torch.no_grad():
        for w, changed in zip(old.parameters(), new.parameters(), strict=True):
            w.add_(s * (changed - w))
    torch.testing.assert_close(
        logits(model.at(s).model, IDS), logits(old, IDS), atol=2e-4, rtol=1e-4
    )


def test_a_base_whose_files_changed_is_loaded_anew_for_all_that_stand_on_it(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base")
    changes = adapter(tmp_path / "a", base, KINDS["all"])
    models = ModelPool()
    models.load("base", base, None)
    models.load("a", base, changes)
    checkpoint(base, seed=7)
    for name, folder in (("base", None), ("a", changes)):
        assert torch.equal(
            logits(models.get(name).loaded.model, IDS), logits(ours(base, folder), IDS)
        )
    assert models.get("a").base is models.get("base").base


def test_an_adapter_that_was_trained_again_answers_anew_and_one_that_is_gone_is_refused(
    tmp_path: Path,
) -> None:
    base = checkpoint(tmp_path / "base")
    changes = adapter(tmp_path / "a", base, KINDS["none"])
    models = ModelPool()
    first = models.load("a", base, changes)[0]
    assert models.get("a") is first
    adapter(changes, base, KINDS["none"], seed=2)
    assert torch.equal(logits(models.get("a").loaded.model, IDS), logits(ours(base, changes), IDS))
    shutil.rmtree(changes)
    with pytest.raises(UserError, match=r"adapter_config.json: No such file"):
        models.get("a")


def test_an_adapter_of_another_base_is_refused_and_the_others_stay(project: Path) -> None:
    models = ModelPool()
    base, changes = project / "artifacts/base", project / "artifacts/lora_adapter"
    models.load("base", base, None)
    with pytest.raises(
        UserError, match="was trained on another base: the sha256 of its tensors is"
    ):
        models.load("base", base, changes)
    assert models.get("base").loaded.adapter is None
    good, _ = models.load("lora", project / "artifacts/expanded", changes)
    assert torch.equal(
        logits(good.at(1).model, IDS), logits(ours(project / "artifacts/expanded", changes), IDS)
    )


def test_a_base_that_changes_while_its_adapter_is_verified_is_refused(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = project / "artifacts/expanded"
    fingerprint = base_fingerprint(base)

    def changing(folder: Path) -> dict[str, str]:
        (folder / "model.safetensors").touch()
        return fingerprint

    monkeypatch.setattr("pipeline.inference.model_pool.base_fingerprint", changing)
    with pytest.raises(UserError, match="changed while it was loaded"):
        ModelPool().load("lora", base, project / "artifacts/lora_adapter")


def test_a_base_stays_while_it_is_used_and_no_longer(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base")
    changes = adapter(tmp_path / "a", base, KINDS["all"])
    models = ModelPool()
    assert [models.load(name, base, changes)[1] for name in ("a", "a", "b")] == [False, True, True]
    models.unload("a")
    assert models.load("c", base, None)[1]
    models.unload("b")
    models.unload("c")
    assert models.names == []
    assert not models.load("a", base, changes)[1]
    with pytest.raises(UserError, match=r"b is not loaded. Loaded: a\."):
        models.get("b")


def test_a_model_that_finds_no_room_takes_that_of_the_one_unused_for_longest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device has room for two bases."""
    bases = {name: checkpoint(tmp_path / name) for name in "abc"}
    size, weights = device.model_bytes(load_base(bases["a"]).model), list[weakref.ref[Tensor]]()
    move = device.move_for_inference

    def watched(model: CausalLM, *args: Any) -> CausalLM:
        moved = move(model, *args)
        weights.append(weakref.ref(next(model.parameters())))
        return moved

    def in_memory() -> int:
        return sum(weight() is not None for weight in weights)

    monkeypatch.setattr(engine, "move_for_inference", watched)
    monkeypatch.setattr(device, "model_bytes", lambda *_: size)
    monkeypatch.setattr(device, "free_bytes", lambda _: size * (2 - in_memory()))
    models = ModelPool(parks=True)
    models.load("a", bases["a"], None)
    models.load("b", bases["b"], adapter(tmp_path / "changes", bases["b"], KINDS["dora"]))
    before = logits(models.get("b").loaded.model, IDS)
    models.get("a")
    models.load("c", bases["c"], None)
    assert in_memory() == 2 and sorted(models.names) == ["a", "b", "c"]
    assert torch.equal(logits(models.get("b").loaded.model, IDS), before)
    assert in_memory() == 2
    with pytest.raises(UserError, match="a is not loaded"):
        models.loaded("a")
    for name in "abc":
        models.unload(name)
    assert models.names == [] and in_memory() == 0


def test_a_base_in_other_bits_or_with_other_files_counts_among_the_most_bases(
    tmp_path: Path,
) -> None:
    base = checkpoint(tmp_path / "base")
    changes = adapter(tmp_path / "a", base, KINDS["none"])
    plain = shutil.copytree(changes, tmp_path / "b")
    params = {"quantization": "nf4-dq"}
    artifact.seal(changes, {"base": base_fingerprint(base), "params": params})
    models = ModelPool(most_bases=1)
    models.load("base", base, None)
    models.load("a", base, changes)
    assert models.names == ["a"] and len(models.bases) == 1
    models.load("base", base, None)
    models.load("b", base, plain)
    assert models.names == ["base", "b"] and len(models.bases) == 1
    checkpoint(base, seed=7)
    models.load("b", base, plain)
    assert models.names == ["b"] and len(models.bases) == 1


def test_other_threads_may_find_models_while_one_loads_and_unloads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models, errors = ModelPool(), list[Exception]()
    model = models.load("a", checkpoint(tmp_path / "base"), None)[0]
    monkeypatch.setattr(model_pool.Resident, "current", True)
    deadline, interval = time.monotonic() + 2, sys.getswitchinterval()

    def load_and_unload() -> None:
        models._put("a", model)
        models.unload("a")

    def repeat(call: Callable[[], object]) -> None:
        try:
            while time.monotonic() < deadline:
                call()
        except Exception as error:
            errors.append(error)

    calls = (load_and_unload, lambda: models.find("a"), lambda: models.device)
    threads = [threading.Thread(target=repeat, args=(call,)) for call in calls]
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert errors == []


def test_one_thread_serves_small_models_and_all_cores_a_large_one_or_what_the_user_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    base, threads = checkpoint(tmp_path / "base"), list[int]()
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    ModelPool().load("a", base, None)
    assert set(threads) == {1}
    monkeypatch.setattr(device, "LARGE", 100_000)
    ModelPool().load("a", base, None)
    assert threads[-1] == len(os.sched_getaffinity(0))
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    ModelPool().load("a", base, None)
    assert threads[-1] == 7


def test_a_saved_view_has_the_bytes_of_its_base(tmp_path: Path) -> None:
    base, copy = checkpoint(tmp_path / "base"), tmp_path / "copy"
    copy.mkdir()
    save_base(copy, load_base(base)._replace(model=model_pool.view(load_base(base).model)))
    assert (copy / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()
