"""Spectra of what fine-tuning changed, against numpy; and the extracted LoRA, against the tuned
model.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.adapters.config import AdapterSpec
from pipeline.adapters.low_rank import load_update, spectra
from pipeline.adapters.peft import load_adapter
from pipeline.errors import UserError
from pipeline.files.artifact import verify
from pipeline.models.base import CausalLM
from pipeline.models.transformers_model import load_pretrained
from pipeline.weights import spectrum as singular_module
from pipeline.weights.blocks import Read
from pipeline.weights.extract import Extraction, Spectra, extract, spectra_of
from pipeline.weights.spectrum import Measured, factors, singular
from tests.helpers.checkpoints import adapter, checkpoint
from tests.helpers.json_files import write_json
from tests.helpers.projects import folder_bytes, played
from tests.helpers.real import stock, toy
from tests.helpers.side_by_side import BATCH, logits, ours
from tests.helpers.stored_models import random_matrix, tuned_from

SIDES = st.integers(1, 40)


def by(size: int, matrix: Tensor) -> Read:
    """A matrix that is read `size` rows at a time."""

    def read() -> Iterator[tuple[slice, Tensor]]:
        for start in range(0, len(matrix), size):
            rows = slice(start, min(start + size, len(matrix)))
            yield rows, matrix[rows]

    return read


def values_of(matrix: Tensor) -> np.ndarray[Any, Any]:
    found: np.ndarray[Any, Any] = np.linalg.svd(matrix.double().numpy(), compute_uv=False)
    return found


@given(SIDES, SIDES, st.integers(1, 9))
def test_singular_values_of_a_matrix_read_in_pieces_are_numpys(
    rows: int, columns: int, size: int
) -> None:
    matrix = random_matrix(rows, columns)
    found, wanted = singular(by(size, matrix), columns, 4), values_of(matrix)
    assert found.complete and found.error == 0
    np.testing.assert_allclose(
        found.values[: len(wanted)], wanted, rtol=1e-9, atol=1e-7 * wanted[0]
    )
    assert (found.values[len(wanted) :] <= 1e-7 * wanted[0]).all()
    torch.testing.assert_close(found.right.T @ found.right, torch.eye(columns, dtype=torch.float64))


@given(SIDES, SIDES, st.integers(1, 9), st.integers(1, 6))
def test_the_factors_are_the_nearest_matrix_of_their_rank(
    rows: int, columns: int, size: int, rank: int
) -> None:
    """Eckart and Young: U√S and √SVᵀ of the largest singular values, from numpy."""
    matrix, rank = random_matrix(rows, columns), min(rank, rows, columns)
    b, a = factors(by(size, matrix), rows, singular(by(size, matrix), columns, rank), rank)
    u, s, v = np.linalg.svd(matrix.double().numpy(), full_matrices=False)
    np.testing.assert_allclose(
        (b @ a).numpy(), (u[:, :rank] * s[:rank]) @ v[:rank], atol=1e-5 * s[0]
    )
    np.testing.assert_allclose(
        torch.linalg.vector_norm(b, dim=0), torch.linalg.vector_norm(a, dim=1), rtol=1e-5
    )


@pytest.mark.parametrize("spectrum", ["flat", "decays", "low rank"])
def test_values_of_a_wide_matrix_are_none_too_large_and_as_near_as_it_says(
    spectrum: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(singular_module, "FULL_COLUMNS", 50)
    decay = {
        "flat": torch.ones(200),
        "decays": 1 / torch.arange(1.0, 201),
        "low rank": (torch.arange(200) < 5) + 0.0,
    }
    left, right = (torch.linalg.qr(random_matrix(300, 300, seed)).Q for seed in (1, 2))
    matrix = (left[:, :200] * decay[spectrum]) @ right[:200] + 0.01 * random_matrix(300, 300)
    found, wanted = singular(by(64, matrix), 300, 20), values_of(matrix)
    assert not found.complete and len(found.values) == 20
    assert (found.values.numpy() <= wanted[:20] * (1 + 1e-9)).all()
    off = [abs(wanted - value).min() for value in found.values.tolist()]
    assert max(off) <= found.error * float(found.values[0]) + 1e-9
    if spectrum != "flat":
        np.testing.assert_allclose(found.values[:5], wanted[:5], rtol=1e-3)


def test_energy_and_ranks_are_those_of_the_squares() -> None:
    one = Measured("w", (4, 4), 10.0, 5.0, (4.0, 3.0, 0.0, 0.0))
    assert one.relative == 0.5
    assert [one.energy(rank) for rank in (1, 2, 64)] == [16 / 25, 1, 1]
    assert [one.rank_of(share) for share in (0.5, 0.64, 0.9, 1.0)] == [1, 1, 2, 2]
    assert one.stable_rank == pytest.approx(25 / 16)
    p = np.array([4 / 7, 3 / 7])
    assert one.effective_rank == pytest.approx(np.exp(-(p * np.log(p)).sum()))
    even = Measured("w", (8, 8), 0.0, 8**0.5, (1.0,) * 8)
    assert even.relative is None and even.stable_rank == pytest.approx(8) == pytest.approx(
        even.effective_rank or 0
    )
    part = Measured("w", (900, 2000), 1.0, 5.0, (3.0,), complete=False)
    assert (
        part.energy(1) == pytest.approx(0.36)
        and part.energy(2) is part.effective_rank is part.rank_of(0.9) is None
    )


# Whole checkpoints.


def sharded(folder: Path, out: Path) -> Path:
    """The same checkpoint in two files."""
    shutil.copytree(folder, out)
    weights = load_file(out / "model.safetensors")
    (out / "model.safetensors").unlink()
    names, index = sorted(weights), dict[str, str]()
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: weights[name] for name in part}, out / file)
        index |= dict.fromkeys(part, file)
    write_json(out / "model.safetensors.index.json", {"weight_map": index})
    return out


def measured(base: Path, tuned: Path) -> Spectra:
    return played(spectra_of(base, tuned))[0]


def extracted(base: Path, tuned: Path, out: Path, rank: int, ends: bool = True) -> Extraction:
    return played(extract(base, tuned, out, rank, ends))[0]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return checkpoint(tmp_path / "base")


def test_a_checkpoints_spectra_are_numpys_in_one_file_or_in_several(
    base: Path, tmp_path: Path
) -> None:
    tuned = tuned_from(base, tmp_path / "tuned", 3, vectors=True)
    old, new = load_file(base / "model.safetensors"), load_file(tuned / "model.safetensors")
    found = measured(base, tuned)
    assert found == measured(base, sharded(tuned, tmp_path / "shards"))
    assert {one.name for one in found.tensors} == old.keys() and not found.skipped
    for one in found.tensors:
        delta = (new[one.name].double() - old[one.name].double()).numpy()
        assert one.change == pytest.approx(np.linalg.norm(delta))
        assert one.before == pytest.approx(np.linalg.norm(old[one.name].double().numpy()))
        if delta.ndim == 2 and delta.any():
            wanted = values_of(torch.from_numpy(delta))
            np.testing.assert_allclose(one.values, wanted, atol=1e-6 * wanted[0])
            assert one.rank_of(0.999) == 3 and one.energy(64) == pytest.approx(1)
    assert any(not one.change for one in found.tensors)  # the table of positions


def test_a_16_bit_checkpoint_is_compared_with_a_32_bit_one(base: Path, tmp_path: Path) -> None:
    half = tmp_path / "half"
    shutil.copytree(base, half)
    weights = {name: t.bfloat16() for name, t in load_file(base / "model.safetensors").items()}
    save_file(weights, half / "model.safetensors")
    one = next(one for one in measured(base, half).tensors if one.name == "lm_head.weight")
    # rounding steps of 2⁻⁷ in [1, 2]
    assert one.relative == pytest.approx(2**-7 / 28**0.5, rel=0.05)


def test_an_adapters_spectra_are_its_own_beside_its_bases_weights(
    base: Path, tmp_path: Path
) -> None:
    spec = AdapterSpec(
        3, 6.0, ("q_proj", "fc1"), rows={"embed_tokens": (18, 19)}, saved=("lm_head",)
    )
    tuned = adapter(tmp_path / "adapter", base, spec)
    found = {one.name.removesuffix(".weight"): one for one in measured(base, tuned).tensors}
    weights = load_file(base / "model.safetensors")
    for one in spectra(tuned):
        assert found[one.name].values == pytest.approx(one.values)
        assert found[one.name].before == pytest.approx(float(weights[f"{one.name}.weight"].norm()))
    change = load_update(tuned)
    ids, rows = change.rows["model.decoder.embed_tokens"]
    step = rows - weights["model.decoder.embed_tokens.weight"][list(ids)]
    assert found["model.decoder.embed_tokens"].values[:2] == pytest.approx(
        values_of(step).tolist(), rel=1e-5
    )
    whole = change.whole["lm_head.weight"] - weights["lm_head.weight"]
    assert found["lm_head"].values[:5] == pytest.approx(values_of(whole)[:5].tolist(), rel=1e-5)


def test_at_the_updates_own_rank_base_and_lora_are_the_tuned_model(
    base: Path, tmp_path: Path
) -> None:
    tuned = tuned_from(base, tmp_path / "tuned", 3)
    found = extracted(base, tuned, tmp_path / "lora", 3)
    assert (found.rank, found.left_out) == (3, []) and found.held == pytest.approx(1)
    assert len(found.low_rank) == 12 and len(found.in_full) == 2
    torch.testing.assert_close(
        logits(ours(base, tmp_path / "lora"), BATCH),
        logits(ours(tuned), BATCH),
        atol=1e-4,
        rtol=1e-4,
    )
    assert (logits(ours(base), BATCH) - logits(ours(tuned), BATCH)).abs().max() > 0.1
    verify(tmp_path / "lora")
    before = folder_bytes(tmp_path / "lora")
    extracted(base, tuned, tmp_path / "lora", 3)
    assert folder_bytes(tmp_path / "lora") == before


def test_what_no_low_rank_carries_is_named_and_counted(base: Path, tmp_path: Path) -> None:
    tuned = tuned_from(base, tmp_path / "tuned", 3, vectors=True)
    found = extracted(base, tuned, tmp_path / "lora", 2, ends=False)
    changed = {one.name: one for one in found.spectra.tensors if one.change}
    held = sum(
        (one.energy(2) or 0) * one.change**2
        for name, one in changed.items()
        if name not in found.left_out
    )
    assert found.held == pytest.approx(held / sum(one.change**2 for one in changed.values()))
    assert {"lm_head.weight", "model.decoder.embed_tokens.weight"} <= {
        *found.left_out
    } and not found.in_full
    assert {name for name, one in changed.items() if not one.values} <= {*found.left_out}
    assert len(changed) == len(found.left_out) + len(found.low_rank)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", ["qwen3", "gpt2", "opt", "gemma"])
def test_peft_opens_what_was_extracted_from_every_family_with_the_tuned_models_logits(
    family: str, tied: bool, base: Path, tmp_path: Path
) -> None:
    ours: CausalLM = toy(family, tie_word_embeddings=tied)
    ours.save(tmp_path / "toy")
    shutil.copy(base / "tokenizer.json", tmp_path / "toy")
    tuned = tuned_from(tmp_path / "toy", tmp_path / "tuned", 2)
    found = extracted(tmp_path / "toy", tuned, tmp_path / "lora", 2)
    assert not found.left_out and found.held == pytest.approx(1)
    model, wanted = load_pretrained(tmp_path / "toy"), load_pretrained(tuned)
    theirs = PeftModel.from_pretrained(stock(model), tmp_path / "lora").eval()
    load_adapter(model, tmp_path / "toy", tmp_path / "lora")
    with torch.no_grad():
        expected = wanted(BATCH)
        torch.testing.assert_close(model(BATCH), expected, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(theirs(input_ids=BATCH).logits, expected, atol=1e-3, rtol=1e-3)
        assert (load_pretrained(tmp_path / "toy")(BATCH) - expected).abs().max() > 0.1


def test_a_layer_that_did_not_change_gets_no_lora(base: Path, tmp_path: Path) -> None:
    tuned = tuned_from(base, tmp_path / "tuned", 2)
    weights = load_file(tuned / "model.safetensors")
    same = "model.decoder.layers.0.fc1.weight"
    weights[same] = load_file(base / "model.safetensors")[same]
    save_file(weights, tuned / "model.safetensors")
    found = extracted(base, tuned, tmp_path / "lora", 2)
    assert len(found.low_rank) == 11
    torch.testing.assert_close(
        logits(ours(base, tmp_path / "lora"), BATCH),
        logits(ours(tuned), BATCH),
        atol=1e-4,
        rtol=1e-4,
    )


def test_nothing_is_written_where_there_is_nothing_to_hold(base: Path, tmp_path: Path) -> None:
    only_ends = tuned_from(base, tmp_path / "ends", 2, linears=False)
    for tuned, reason in ((base, "equal weights"), (only_ends, "no linear layer of a block")):
        other = tmp_path / "copy" if tuned == base else tuned
        if tuned == base:
            shutil.copytree(base, other)
        with pytest.raises(UserError, match=reason):
            extracted(base, other, tmp_path / "lora", 2)
        assert not (tmp_path / "lora").exists()


def test_experts_which_lora_does_not_reach_are_told(base: Path, tmp_path: Path) -> None:
    toy("mixtral").save(tmp_path / "toy")
    shutil.copy(base / "tokenizer.json", tmp_path / "toy")
    tuned = tuned_from(tmp_path / "toy", tmp_path / "tuned", 2)
    found = extracted(tmp_path / "toy", tuned, tmp_path / "lora", 2)
    assert found.left_out and all("experts" in name or "gate" in name for name in found.left_out)
    assert 0 < found.held < 1
    load_adapter(load_pretrained(tmp_path / "toy"), tmp_path / "toy", tmp_path / "lora")
