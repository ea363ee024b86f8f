"""Intruder dimensions, against NumPy's SVD of W and W + ΔW, and what damping leaves of them."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pipeline.adapters.config import AdapterSpec
from pipeline.adapters.low_rank import LowRank, load_update
from pipeline.errors import UserError
from pipeline.weights import intruders as module
from pipeline.weights.intruders import Pair, Searched, damp, damped, find_intruders, intruders_of
from pipeline.weights.spectrum import in_blocks
from tests.helpers.bases import toy_checkpoint
from tests.helpers.checkpoints import adapter, checkpoint
from tests.helpers.projects import folder_bytes, played
from tests.helpers.side_by_side import BATCH, logits, ours, theirs
from tests.helpers.stored_models import load_weights, merged_through_files, strong

Array = np.ndarray[Any, np.dtype[np.float64]]


def drawn(rows: int, columns: int, seed: int) -> Tensor:
    return torch.randn(
        rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


def pair_of(before: Tensor, after: Tensor) -> Pair:
    return Pair("m", (before.shape[0], before.shape[1]), in_blocks(before), in_blocks(after))


def by_definition(before: Array, after: Array, top: int, epsilon: float) -> dict[int, float]:
    """Position → largest |cos| of each intruder, from full SVDs."""
    base = np.linalg.svd(before, full_matrices=False)[0]
    tuned = np.linalg.svd(after, full_matrices=False)[0][:, :top]
    similar = abs(base.T @ tuned).max(0)
    return {n + 1: float(value) for n, value in enumerate(similar) if value < epsilon}


@given(
    st.integers(2, 14),
    st.integers(2, 14),
    st.integers(0, 99),
    st.sampled_from((0.1, 1.0, 9.0)),
    st.integers(1, 12),
)
def test_intruders_are_those_of_the_definition(
    rows: int, columns: int, seed: int, size: float, top: int
) -> None:
    before = drawn(rows, columns, seed)
    after = before + size * drawn(rows, 1, seed + 1) @ drawn(1, columns, seed + 2)
    found = find_intruders(pair_of(before, after), top, 0.6)
    wanted = by_definition(before.numpy(), after.numpy(), top, 0.6)
    values = np.linalg.svd(after.numpy(), compute_uv=False)
    assert {one.position: one.similarity for one in found.intruders} == pytest.approx(
        wanted, abs=1e-5
    )
    for one in found.intruders:
        assert one.value == pytest.approx(values[one.position - 1])
    assert found.complete and found.vectors.shape == (rows, len(wanted))


def planted(rows: int = 40, columns: int = 24) -> tuple[Tensor, Tensor, Tensor]:
    """W with falling singular values, the same with a strong new direction, and that direction
    (O,).
    """
    left, right = (
        torch.linalg.qr(drawn(rows, columns, 0)).Q,
        torch.linalg.qr(drawn(columns, columns, 1)).Q,
    )
    before = left * torch.linspace(4, 1, columns, dtype=torch.float64) @ right.T
    # orthogonal to every u of W
    new = torch.linalg.qr(torch.cat([left, drawn(rows, 1, 2)], dim=1)).Q[:, -1]
    return before, before + 6 * new[:, None] @ right[:, -1:].T, new


def test_a_planted_direction_is_found_first_and_nothing_is_found_without_it() -> None:
    before, after, new = planted()
    found = find_intruders(pair_of(before, after), 10, 0.5)
    assert [one.position for one in found.intruders] == [1]
    assert float(found.vectors[:, 0] @ new) ** 2 == pytest.approx(36 / 37)
    for unchanged in (before, 3 * before):
        assert not find_intruders(pair_of(before, unchanged), 24, 0.99).intruders


def test_a_base_of_zeros_has_no_counterpart_and_values_that_are_not_finite_are_refused() -> None:
    zero = torch.zeros(6, 4, dtype=torch.float64)
    found = find_intruders(pair_of(zero, drawn(6, 1, 0) @ drawn(1, 4, 1)), 3, 0.5)
    assert [(one.position, one.similarity) for one in found.intruders] == [(1, 0.0)]
    assert not find_intruders(pair_of(zero, zero), 3, 0.5).intruders
    with pytest.raises(UserError, match="m has values that are not finite"):
        find_intruders(pair_of(zero, zero + torch.nan), 3, 0.5)


@pytest.mark.parametrize("limit", [0, 30], ids=["both wide", "columns in full"])
def test_wide_matrices_are_compared_with_their_largest_vectors(
    limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FULL_COLUMNS", limit)
    monkeypatch.setattr("pipeline.weights.spectrum.FULL_COLUMNS", limit)
    before, after, new = planted(200, 24) if limit else planted(300, 250)
    found = find_intruders(pair_of(before, after), 10, 0.5)
    assert [one.position for one in found.intruders] == [1] and found.complete is (limit > 0)
    assert float(found.vectors[:, 0] @ new) ** 2 == pytest.approx(36 / 37, abs=0.01)
    # what has not converged is alike in both
    same = find_intruders(pair_of(before, before), 10, 0.99)
    assert not same.intruders


@given(st.integers(0, 50), st.sampled_from((0.0, 0.3, 1.0)))
def test_damping_scales_the_singular_values_of_intruders_and_no_others(
    seed: int, factor: float
) -> None:
    before = drawn(9, 7, seed).float().double()
    update = LowRank(drawn(2, 7, seed + 1).float(), 4 * drawn(9, 2, seed + 2).float(), 0.5)
    after = before + update.scale * update.b.double() @ update.a.double()
    pair = pair_of(before, after)
    found = find_intruders(pair, 5, 0.7)
    result = damped(update, found.vectors, pair.after, factor)
    left, values, right = np.linalg.svd(after.numpy(), full_matrices=False)
    for one in found.intruders:
        values[one.position - 1] *= factor
    wanted = left * values @ right - before.numpy()
    np.testing.assert_allclose(result.delta().double().numpy(), wanted, atol=1e-4)
    assert result.rank == update.rank + len(found.intruders)
    if factor == 1:
        torch.testing.assert_close(result.delta(), update.delta(), atol=1e-5, rtol=1e-5)


# Whole checkpoints and adapters.


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return checkpoint(tmp_path / "base", d_model=24)


def searched(base: Path, tuned: Path, epsilon: float = 0.7) -> list[Searched]:
    return played(intruders_of(base, tuned, 10, epsilon))[0]


SPECS = {
    "lora": AdapterSpec(2, 4.0, ("q_proj", "fc1", "fc2"), rslora=True),
    "dora": AdapterSpec(2, 4.0, ("q_proj", "fc2"), dora=True),
    "rows beside": AdapterSpec(
        2, 4.0, ("v_proj",), rows={"embed_tokens": (3, 4)}, saved=("lm_head", "fc1")
    ),
}


@pytest.mark.parametrize("kind", SPECS)
def test_an_adapters_intruders_are_those_of_the_merged_model(
    kind: str, base: Path, tmp_path: Path
) -> None:
    made = strong(tmp_path / "made", base, SPECS[kind])
    merged = merged_through_files(base, made, tmp_path / "merged")
    found = {one.pair.module: one for one in searched(base, made)}
    suffixes = (*SPECS[kind].targets, *(name for name in SPECS[kind].saved if name != "lm_head"))
    assert found and all(name.endswith(suffixes) for name in found)
    for name, one in found.items():
        before, after = (
            source[f"{name}.weight"].double().numpy() for source in (load_weights(base), merged)
        )
        wanted = by_definition(before, after, 10, 0.7)
        assert {i.position: i.similarity for i in one.intruders} == pytest.approx(wanted, abs=1e-4)
    assert any(one.intruders for one in found.values())
    whole = {one.pair.module: one.intruders for one in searched(base, tmp_path / "merged")}
    assert len(whole) == 12
    for name, intruders in whole.items():
        assert len(intruders) == (len(found[name].intruders) if name in found else 0)


def test_a_conv1d_is_searched_in_its_outputs(tmp_path: Path) -> None:
    base = tmp_path / "base"
    toy_checkpoint(base, "gpt2")
    made = strong(tmp_path / "made", base, AdapterSpec(2, 8.0, ("c_fc",)))
    merged = merged_through_files(base, made, tmp_path / "merged")
    for one in searched(base, made):
        before, after = (
            w[f"{one.pair.module}.weight"].double().T.numpy() for w in (load_weights(base), merged)
        )
        assert one.pair.shape == before.shape == (128, 32)
        assert {i.position: i.similarity for i in one.intruders} == pytest.approx(
            by_definition(before, after, 10, 0.7), abs=1e-4
        )


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
def test_a_damped_adapter_is_opened_by_peft_and_at_1_it_is_the_same(
    base: Path, tmp_path: Path
) -> None:
    made = strong(tmp_path / "made", base, SPECS["lora"])
    found = searched(base, made)
    assert any(one.intruders for one in found)
    for factor, out in ((1.0, tmp_path / "same"), (0.0, tmp_path / "removed")):
        damp(base, made, out, found, factor, {"top": 10})
        first = folder_bytes(out)
        damp(base, made, out, found, factor, {"top": 10})
        assert folder_bytes(out) == first
        here, there = (logits(opened(base, out), BATCH) for opened in (ours, theirs))
        torch.testing.assert_close(here, there, atol=1e-3, rtol=1e-3)
        same = bool((here - logits(ours(base, made), BATCH)).abs().max() < 1e-3)
        assert same is (factor == 1)
    removed = load_update(tmp_path / "removed").low_rank
    for one in found:
        rank = load_update(made).low_rank[one.pair.module].rank
        assert removed[one.pair.module].rank == rank + len(one.intruders)
        # in W + ΔW'' nothing is left along the intruders
        after = (
            torch.cat([block for _, block in one.pair.before()]) + removed[one.pair.module].delta()
        )
        assert (one.vectors.T.float() @ after).abs().max() < 1e-3 if one.intruders else True


def test_what_cannot_be_damped_is_refused(base: Path, tmp_path: Path) -> None:
    dora = strong(tmp_path / "dora", base, SPECS["dora"])
    with pytest.raises(UserError, match="was trained with DoRA"):
        damp(base, dora, tmp_path / "out", searched(base, dora), 0.5, {})
    made = strong(tmp_path / "made", base, SPECS["lora"])
    with pytest.raises(UserError, match="has no intruder to damp"):
        damp(base, made, tmp_path / "out", searched(base, made, 0.0), 0.5, {})
    with pytest.raises(UserError, match="is also an input"):
        damp(base, made, made, searched(base, made), 0.5, {})
    with pytest.raises(UserError, match="Name the base model first"):
        searched(made, base)
    ends = adapter(tmp_path / "ends", base, AdapterSpec(2, 2.0, ("lm_head",)))
    with pytest.raises(UserError, match="changes no linear layer of a block"):
        searched(base, ends)
    shutil.rmtree(ends)
    assert not (tmp_path / "out").exists()
