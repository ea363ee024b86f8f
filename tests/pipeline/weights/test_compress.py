"""Compressed adapters, against NumPy's SVD of the dense update and against PEFT."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from pipeline.adapters.config import AdapterSpec
from pipeline.adapters.low_rank import LowRank, inner_product, load_update
from pipeline.adapters.peft import load_adapter
from pipeline.errors import UserError
from pipeline.models.load import load_base
from pipeline.weights.compress import Compressed, Limit, compress, compress_adapter, total_error
from pipeline.weights.import_adapter import import_adapter
from tests.helpers.bases import toy_checkpoint
from tests.helpers.checkpoints import adapter, checkpoint
from tests.helpers.projects import folder_bytes
from tests.helpers.side_by_side import BATCH, logits, ours, randomized, theirs

SIZES = st.integers(1, 9)
EVERYTHING = AdapterSpec(
    4,
    6.0,
    ("q_proj", "fc1"),
    saved=("lm_head",),
    rows={"embed_tokens": (18, 19)},
    ranks={"fc1": 3, "0.self_attn.q_proj": 2},
    alphas={"fc1": 5.0},
    rslora=True,
)


@st.composite
def updates(draw: st.DrawFn) -> LowRank:
    outputs, inputs, rank = draw(SIZES), draw(SIZES), draw(SIZES)
    random = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    a, b = torch.randn(rank, inputs, generator=random), torch.randn(outputs, rank, generator=random)
    return LowRank(a, b, draw(st.sampled_from((0.25, 1.0, 3.0))))


def dense(update: LowRank) -> np.ndarray[Any, np.dtype[np.float64]]:
    product: np.ndarray[Any, np.dtype[np.float64]] = (
        update.scale * update.b.double() @ update.a.double()
    ).numpy()
    return product


@given(updates(), SIZES)
def test_a_rank_keeps_the_largest_singular_values_and_no_matrix_of_it_is_nearer(
    update: LowRank, rank: int
) -> None:
    found, row = compress("m", update, Limit(rank=rank))
    left, values, right = np.linalg.svd(dense(update), full_matrices=False)
    count = min(rank, update.rank, len(values))
    best = left[:, :count] * values[:count] @ right[:count]
    np.testing.assert_allclose(dense(found), best, atol=1e-5 * values[0])
    assert (found.rank, found.scale) == (count, 1.0) and (row.before, row.after) == (
        update.rank,
        count,
    )
    assert row.error == pytest.approx(
        np.linalg.norm(values[count:]) / np.linalg.norm(values), abs=1e-6
    )
    random = np.random.default_rng(rank)
    for step in (1e-3, 1.0):  # Eckart and Young: other matrices of this rank, near and far
        b, a = (
            np.array(f.double() + step * random.standard_normal(f.shape))
            for f in (found.b, found.a)
        )
        assert np.linalg.norm(dense(update) - b @ a) >= row.cut - 1e-5 * row.size


@given(updates(), st.floats(0.01, 1.0))
def test_an_energy_takes_the_lowest_rank_that_holds_it(update: LowRank, energy: float) -> None:
    found, row = compress("m", update, Limit(energy=energy))
    values = np.linalg.svd(dense(update), compute_uv=False)
    shares = np.cumsum(values**2) / (values**2).sum()
    assert shares[found.rank - 1] >= energy - 1e-9
    assert found.rank == 1 or shares[found.rank - 2] < energy
    assert np.linalg.norm(dense(found)) ** 2 >= (energy - 1e-6) * np.linalg.norm(dense(update)) ** 2
    assert row.error**2 <= 1 - energy + 1e-6


@given(updates())
def test_at_its_own_rank_and_at_energy_1_nothing_is_lost(update: LowRank) -> None:
    for limit in (Limit(rank=update.rank), Limit(rank=99), Limit(energy=1.0)):
        found, row = compress("m", update, limit)
        np.testing.assert_allclose(
            dense(found), dense(update), atol=1e-5 * np.abs(dense(update)).max()
        )
        assert row.error < 1e-6


@given(updates(), updates())
def test_the_inner_product_of_updates_is_that_of_their_entries(
    one: LowRank, other: LowRank
) -> None:
    shape = one.b.shape[0], one.a.shape[1]
    random = torch.Generator().manual_seed(0)
    b = torch.randn(shape[0], other.rank, generator=random)
    other = LowRank(torch.randn(other.rank, shape[1], generator=random), b, -other.scale)
    assert inner_product(one, other) == pytest.approx(
        (dense(one) * dense(other)).sum(), abs=1e-9, rel=1e-9
    )


def test_an_update_of_zero_stays_zero() -> None:
    zero = LowRank(torch.ones(3, 5), torch.zeros(4, 3), 2.0)
    for limit in (Limit(rank=2), Limit(energy=0.9)):
        found, row = compress("m", zero, limit)
        assert not found.delta().any() and row.error == 0 and total_error([row]) == 0


def test_the_total_error_is_that_of_all_modules_as_one_vector() -> None:
    rows = [Compressed("x", 4, 2, 3.0, 1.0), Compressed("y", 4, 2, 4.0, 2.0)]
    assert total_error(rows) == pytest.approx((1 + 4) ** 0.5 / 5)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return checkpoint(tmp_path / "base")


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("limit", [Limit(rank=2), Limit(energy=0.7)], ids=str)
def test_peft_opens_the_compressed_adapter_and_all_that_is_not_low_rank_stays(
    limit: Limit, base: Path, tmp_path: Path
) -> None:
    source = adapter(tmp_path / "source", base, EVERYTHING)
    rows = compress_adapter(source, base, tmp_path / "small", limit)
    before, after = load_update(source), load_update(tmp_path / "small")
    assert {row.module for row in rows} == before.low_rank.keys() == after.low_rank.keys()
    for row in rows:
        np.testing.assert_allclose(
            dense(after.low_rank[row.module]),
            dense(compress("m", before.low_rank[row.module], limit)[0]),
            atol=1e-6,
        )
        assert after.low_rank[row.module].rank == row.after
    assert before.rows.keys() == after.rows.keys() and before.whole.keys() == after.whole.keys()
    kept = [key for key in load_file(source / "adapter_model.safetensors") if ".lora_" not in key]
    assert kept and all(
        torch.equal(load_file(source / "adapter_model.safetensors")[key], tensor)
        for key, tensor in load_file(tmp_path / "small/adapter_model.safetensors").items()
        if key in kept
    )
    found = logits(ours(base, tmp_path / "small"), BATCH)
    wanted = logits(theirs(base, tmp_path / "small"), BATCH)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    assert (found - logits(ours(base, source), BATCH)).abs().max() > 1e-3, "nothing was cut off"


@pytest.mark.parametrize(
    "spec", [EVERYTHING, AdapterSpec(3, 2.0, ("q_proj", "fc2"), dora=True)], ids=["all", "dora"]
)
def test_at_full_rank_the_logits_stay_and_two_runs_give_the_same_bytes(
    spec: AdapterSpec, base: Path, tmp_path: Path
) -> None:
    source = adapter(tmp_path / "source", base, spec)
    given_bytes = folder_bytes(source)
    compress_adapter(source, base, tmp_path / "same", Limit(rank=99))
    torch.testing.assert_close(
        logits(ours(base, tmp_path / "same"), BATCH),
        logits(ours(base, source), BATCH),
        atol=1e-5,
        rtol=1e-4,
    )
    first = folder_bytes(tmp_path / "same")
    compress_adapter(source, base, tmp_path / "same", Limit(rank=99))
    assert folder_bytes(tmp_path / "same") == first and folder_bytes(source) == given_bytes


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
def test_an_adapter_of_peft_is_compressed_in_every_layout(family: str, tmp_path: Path) -> None:
    base = tmp_path / "base"
    toy_checkpoint(base, family)
    names = {"gpt2": ["c_attn", "mlp.c_proj"], "qwen3": ["q_proj", "down_proj", "embed_tokens"]}[
        family
    ]
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=names)
    made = randomized(get_peft_model(theirs(base), config))
    made.save_pretrained(tmp_path / "theirs")
    compress_adapter(tmp_path / "theirs", base, tmp_path / "small", Limit(rank=2))
    small = tmp_path / "small"
    model = load_base(base).model
    load_adapter(model, base, small)
    found = logits(model, BATCH)
    torch.testing.assert_close(found, logits(theirs(base, small), BATCH), atol=1e-4, rtol=1e-4)
    assert (found - logits(made, BATCH)).abs().max() > 1e-3


def test_what_cannot_be_compressed_is_refused_and_nothing_is_written(
    base: Path, tmp_path: Path
) -> None:
    rows_only = adapter(
        tmp_path / "rows", base, AdapterSpec(2, 2.0, ("q_proj",), rows={"embed_tokens": (3,)})
    )
    bound = tmp_path / "bound"
    import_adapter(rows_only, base, bound)
    other = checkpoint(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match="was trained on another base"):
        compress_adapter(bound, other, tmp_path / "out", Limit(rank=1))
    with pytest.raises(UserError, match="is also an input"):
        compress_adapter(bound, base, bound, Limit(rank=1))
    with pytest.raises(UserError, match="is a full model, not an adapter"):
        compress_adapter(base, base, tmp_path / "out", Limit(rank=1))
    assert not (tmp_path / "out").exists()
