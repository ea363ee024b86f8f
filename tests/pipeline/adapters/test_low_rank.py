"""ΔW = s·BA in factored form, against the (O, I) product that it never makes, and what its file may
not hold.
"""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close

from pipeline.adapters.config import PREFIX, AdapterSpec, config_of
from pipeline.adapters.low_rank import (
    LowRank,
    Spectrum,
    inner_product,
    layer_sort_key,
    load_update,
    singular_values,
    spectra,
    squared_norm,
    svd,
    tensors_of,
    truncated,
)
from pipeline.errors import UserError
from pipeline.files import artifact
from tests.helpers.checkpoints import edit_adapter_config
from tests.helpers.json_files import read_json, write_json

SHAPES = st.tuples(st.integers(1, 7), st.integers(1, 7), st.integers(1, 9), st.floats(0.1, 4))


def update(shape: tuple[int, int, int, float], seed: int = 0, **options: Any) -> LowRank:
    """Of (O, I), rank and scale."""
    outputs, inputs, rank, scale = shape
    generator = torch.Generator().manual_seed(seed)
    return LowRank(
        torch.randn(rank, inputs, generator=generator),
        torch.randn(outputs, rank, generator=generator),
        scale,
        **options,
    )


def dense(low: LowRank) -> Tensor:
    return low.scale * low.b.double() @ low.a.double()


@given(SHAPES)
def test_its_norm_and_singular_triples_are_those_of_the_product(
    shape: tuple[int, int, int, float],
) -> None:
    low, whole = update(shape), dense(update(shape))
    assert_close(low.delta(), whole.float())
    assert low.delta().dtype == torch.float32 and low.rank == shape[2]
    assert (
        low.squared_norm()
        == squared_norm(low.b, low.a, low.scale)
        == pytest.approx(float(whole.square().sum()))
    )
    most = min(shape[:3])
    expected = torch.linalg.svdvals(whole)[:most]
    left, values, right = svd(low)
    assert (left.shape, values.shape, right.shape) == ((shape[0], most), (most,), (most, shape[1]))
    assert_close(values, expected, atol=1e-9, rtol=1e-7)
    assert_close(singular_values(low.a, low.b) * low.scale, expected, atol=1e-9, rtol=1e-7)
    assert_close(left * values @ right, whole)


@given(SHAPES, st.integers(1, 9), st.floats(0.1, 4))
def test_an_inner_product_is_the_sum_of_the_products_of_all_entries(
    shape: tuple[int, int, int, float], rank: int, scale: float
) -> None:
    one, other = update(shape), update((*shape[:2], rank, scale), 1)
    assert inner_product(one, other) == pytest.approx(
        float((dense(one) * dense(other)).sum()), rel=1e-9, abs=1e-9
    )


@given(SHAPES, st.integers(1, 4), st.booleans())
def test_truncated_it_is_the_nearest_of_that_rank_in_factors_of_equal_norm(
    shape: tuple[int, int, int, float], rank: int, embedding: bool
) -> None:
    low = update(shape)
    _, values, _ = triples = svd(low)
    cut = truncated(*triples, rank, embedding)
    assert (cut.scale, cut.embedding, cut.rank) == (1.0, embedding, min(rank, len(values)))
    assert cut.a.dtype == cut.b.dtype == torch.float32
    left = float((dense(cut) - dense(low)).norm())
    assert left == pytest.approx(float(values[rank:].norm()), rel=1e-4, abs=1e-5), (
        "Eckart and Young"
    )
    assert_close(cut.a.norm(), cut.b.norm())
    assert not truncated(*triples, rank).embedding


def test_the_first_singular_values_share_is_of_the_squares() -> None:
    assert Spectrum("q", 2, (3.0, 1.0)).share_of_first == 0.9
    assert Spectrum("q", 2, (0.0, 0.0)).share_of_first == 0.0


def test_tensors_have_pefts_keys_for_linears_embeddings_and_magnitudes() -> None:
    linear, embedding = update((3, 2, 1, 1.0)), update((3, 2, 1, 1.0), embedding=True)
    assert tensors_of("q", linear) == {
        f"{PREFIX}q.lora_A.weight": linear.a,
        f"{PREFIX}q.lora_B.weight": linear.b,
    }
    keys = [f"{PREFIX}e.lora_embedding_A", f"{PREFIX}e.lora_embedding_B"]
    assert tensors_of("e", embedding) == dict(zip(keys, (embedding.a, embedding.b), strict=True))
    magnitude = torch.ones(3)
    found = tensors_of("q", LowRank(linear.a, linear.b, 1.0, magnitude=magnitude))
    assert [*found] == [
        f"{PREFIX}q.lora_A.weight",
        f"{PREFIX}q.lora_B.weight",
        f"{PREFIX}q.lora_magnitude_vector",
    ]
    assert found[f"{PREFIX}q.lora_magnitude_vector"] is magnitude


def test_layer_10_comes_after_layer_9() -> None:
    names = ["layers.10.q", "layers.9.v", "layers.9.q", "lm_head", "layers.100.q"]
    assert sorted(names, key=layer_sort_key) == [
        "layers.9.q",
        "layers.9.v",
        "layers.10.q",
        "layers.100.q",
        "lm_head",
    ]


# Its file

SPEC = AdapterSpec(
    2, 3.0, ("q_proj", "wte"), ranks={"10.q_proj": 1}, rows={"embed": (5, 2)}, saved=("norm",)
)
NAMES = ("h.2.q_proj", "h.10.q_proj")


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    """Two linears, an embedding, rows and a norm; keys are in the order of text, in which 10 comes
    before 2.
    """
    artifact.write_json(tmp_path / "adapter_config.json", config_of(SPEC, "base", False))
    parts = {name: update((4, 3, SPEC.rank_of(name), 1.0), seed) for seed, name in enumerate(NAMES)}
    values = {
        key: value for name, low in parts.items() for key, value in tensors_of(name, low).items()
    }
    values |= tensors_of("wte", update((4, 6, 2, 1.0), 2, embedding=True))
    values[TOKENS] = torch.ones(2, 4)
    values[f"{PREFIX}norm.weight"] = torch.full((4,), 7.0)
    save_file(values, tmp_path / "adapter_model.safetensors")
    return tmp_path


def test_all_that_an_adapter_changes_is_read_in_the_models_order(stored: Path) -> None:
    found, values = load_update(stored), load_file(stored / "adapter_model.safetensors")
    assert [*found.low_rank] == [*NAMES, "wte"]
    for name, low in found.low_rank.items():
        assert all(torch.equal(value, values[key]) for key, value in tensors_of(name, low).items())
        assert (low.scale, low.embedding) == (SPEC.scale_of(name), name == "wte")
    ids, rows = found.rows["m.embed"]
    assert (ids, rows.tolist()) == ((5, 2), [[1.0] * 4] * 2)
    assert [*found.whole] == ["norm.weight"] and found.whole["norm.weight"].tolist() == [7.0] * 4
    assert found.spec == SPEC and found.base is None
    for spectrum, name in zip(spectra(stored), found.low_rank, strict=True):
        assert (spectrum.name, spectrum.rank) == (name, SPEC.rank_of(name))
        assert spectrum.values == pytest.approx(
            torch.linalg.svdvals(dense(found.low_rank[name]))[: spectrum.rank].tolist()
        )


def test_a_list_of_rows_is_of_the_module_that_the_tensors_name(stored: Path) -> None:
    edit_adapter_config(stored, trainable_token_indices=[1, 0])
    assert load_update(stored).rows["m.embed"][0] == (1, 0)


def test_a_sealed_adapter_names_its_base_and_may_not_be_edited(stored: Path) -> None:
    artifact.seal(stored, {"base": {"tensors": "c0ffee"}})
    assert load_update(stored).base == "c0ffee"
    artifact.seal(stored, {})
    assert load_update(stored).base is None
    (stored / "notes").write_text("later")
    with pytest.raises(UserError, match="notes was added after the artifact was made"):
        load_update(stored)


A, B = (f"{PREFIX}{NAMES[0]}.lora_{end}.weight" for end in "AB")
TOKENS = f"{PREFIX}m.embed.token_adapter.trainable_tokens_delta"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({B: None}, "h.2.q_proj has no A and B of the same rank"),
        ({B: torch.ones(4, 3)}, "h.2.q_proj has no A and B of the same rank"),
        ({A: torch.ones(2)}, "h.2.q_proj has no A and B of the same rank"),
        ({B: torch.ones(2)}, "h.2.q_proj has no A and B of the same rank"),
        (
            {A: torch.ones(3, 3), B: torch.ones(4, 3)},
            "h.2.q_proj has rank 3, but its config says 2",
        ),
        (
            {f"{PREFIX}other.token_adapter.trainable_tokens_delta": torch.ones(2, 4)},
            "other has rows that its config does not name",
        ),
        (
            {TOKENS: torch.ones(3, 4)},
            r"m.embed must have 2 rows, as its config says, got shape \[3, 4\]",
        ),
        ({TOKENS: torch.ones(2)}, r"m.embed must have 2 rows, as its config says, got shape \[2\]"),
    ],
    ids=[
        *("no B", "ranks that differ", "A is no matrix", "B is no matrix", "another rank", "rows"),
        *("too many rows", "rows are no matrix"),
    ],
)
def test_factors_that_do_not_belong_together_are_refused(
    stored: Path, change: dict[str, Tensor | None], message: str
) -> None:
    path = stored / "adapter_model.safetensors"
    changed = {**load_file(path), **change}
    save_file({key: value for key, value in changed.items() if value is not None}, path)
    with pytest.raises(
        UserError, match=rf"^{path}: {message}\. Train or import the adapter again\."
    ):
        load_update(stored)


def test_all_patterns_of_an_adapter_share_one_time(
    stored: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.files.patterns.BUDGET", -1.0)
    with pytest.raises(UserError, match=r"^rank_pattern: matching '10.q_proj'"):
        load_update(stored)


def test_virtual_tokens_and_experts_have_no_such_update(stored: Path) -> None:
    path = stored / "adapter_config.json"
    values = read_json(path)
    artifact.write_json(path, values | {"target_parameters": ["experts.down_proj"]})
    with pytest.raises(UserError, match=r"adapts experts"):
        load_update(stored)
    write_json(path, {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3})
    with pytest.raises(UserError, match=r"is a prompt of 3 virtual tokens"):
        load_update(stored)


def test_a_rank_one_update_has_one_singular_value_of_known_size() -> None:
    low = LowRank(torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0], [1.0]]), 0.5)
    assert svd(low)[1].tolist() == pytest.approx([0.5 * 5 * math.sqrt(2)])
