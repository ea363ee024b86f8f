"""What a merge does to a matrix, block by block, against the formula on the whole matrix in
fp64.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close

from pipeline.adapters.config import AdapterSpec
from pipeline.errors import UserError
from pipeline.files.base_model import TensorLocation
from pipeline.files.safetensors_file import read_header
from pipeline.weights import blocks as blocks_module
from pipeline.weights.blocks import blocks, read_blocks, read_rows, stored_name
from pipeline.weights.edits import (
    AddLowRank,
    AddToExperts,
    Replace,
    RescaleRows,
    SetRows,
    Update,
    same_edit,
)
from pipeline.weights.merge_check import Written, describe, update_ratios, written_matrices
from pipeline.weights.merge_plan import plan_merge
from tests.helpers.checkpoints import adapter, checkpoint
from tests.helpers.projects import cut_off

OUT, IN, RANK, STACKED = 7, 5, 2, 3  # STACKED: experts
SCALE = 0.5
PARTS = (slice(0, 2), slice(2, 3), slice(3, 7))
EXPERTS = (slice(0, 1), slice(1, 3))


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


LEFT, RIGHT = draw(OUT, RANK), draw(RANK, IN)
STACK_LEFT, STACK_RIGHT = draw(STACKED, OUT, RANK), draw(STACKED, RANK, IN)
WEIGHT, STACK = draw(OUT, IN), draw(STACKED, OUT * IN)
Formula = Callable[[Tensor], Tensor]
PRODUCT = SCALE * (LEFT.double() @ RIGHT.double())
EDITS: dict[str, tuple[Update, Tensor, tuple[slice, ...], Formula]] = {
    "lora": (AddLowRank(LEFT, RIGHT, SCALE), WEIGHT, PARTS, lambda w: w + PRODUCT),
    "experts": (
        AddToExperts(STACK_LEFT, STACK_RIGHT, SCALE),
        STACK,
        EXPERTS,
        lambda w: w + SCALE * (STACK_LEFT.double() @ STACK_RIGHT.double()).flatten(1),
    ),
    "dora": (
        RescaleRows(LEFT, RIGHT, SCALE, draw(OUT).abs()),
        WEIGHT,
        PARTS,
        lambda w: torch.nn.functional.normalize(w + PRODUCT, dim=1) * draw(OUT).abs()[:, None],
    ),
    "dora, transposed": (
        RescaleRows(LEFT, RIGHT, SCALE, draw(IN).abs(), transposed=True),
        WEIGHT,
        PARTS,
        lambda w: torch.nn.functional.normalize(w + PRODUCT, dim=0) * draw(IN).abs(),
    ),
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_by_blocks_is_its_formula_and_so_are_its_products(name: str) -> None:
    edit, weight, parts, formula = EDITS[name]
    edit = edit.with_norms((rows, weight[rows]) for rows in parts)
    wanted = formula(weight.double())
    assert_close(torch.cat([edit(weight[rows], rows) for rows in parts]), wanted.float())
    rounded = torch.cat([edit(weight[rows].bfloat16(), rows) for rows in parts])
    assert rounded.dtype == torch.bfloat16
    update, change = wanted - weight.double(), draw(*weight.shape)
    dots = [edit.dot_products(weight[rows], (weight + change)[rows], rows) for rows in parts]
    assert sum(dot for dot, _ in dots) == pytest.approx(float((update * change).sum()), rel=1e-4)
    assert sum(size for _, size in dots) == pytest.approx(float(update.square().sum()), rel=1e-4)


@pytest.mark.parametrize("times", [0.0, 1.0, 2.0])
def test_the_ratio_says_how_often_an_update_was_added_and_what_rounding_may_change(
    times: float, tmp_path: Path
) -> None:
    base = checkpoint(tmp_path / "base")
    adapter(tmp_path / "adapter", base, AdapterSpec(3, 2.0, ("q_proj", "fc1")))
    merge = plan_merge(base, tmp_path / "adapter")
    stored, updates = load_file(base / "model.safetensors"), dict[str, Tensor]()
    for name, edit in merge.edits.items():
        updates[name] = edit(stored[name], slice(0, len(stored[name]))) - stored[name]

    def written(name: str) -> Written:
        return Written(
            1e-3, ((rows, old + times * updates[name][rows]) for rows, old in merge.blocks(name))
        )

    ratios = update_ratios(merge, written)
    assert ratios.keys() == {name.removesuffix(".weight") for name in updates}
    for name, update in updates.items():
        ratio = ratios[name.removesuffix(".weight")]
        assert ratio.value == pytest.approx(times, abs=1e-3)
        assert ratio.rounding == pytest.approx(
            1e-3 * float(stored[name].norm() / update.norm()), rel=1e-3
        )


def test_an_update_of_zeros_has_no_ratio(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base")
    adapter(tmp_path / "adapter", base, AdapterSpec(3, 2.0, ("q_proj",)))
    merge = plan_merge(base, tmp_path / "adapter")
    merge = replace(
        merge,
        edits={name: replace(edit, scale=0.0) for name, edit in merge.edits.items()},  # type: ignore[type-var]
    )
    assert {ratio.value for ratio in update_ratios(merge, written_matrices(base)).values()} == {
        None
    }


def test_rows_are_set_and_a_matrix_is_replaced_whatever_the_blocks() -> None:
    ids, values = torch.tensor([6, 0, 2]), draw(3, IN)
    wanted = WEIGHT.clone()
    wanted[ids] = values
    assert torch.equal(
        torch.cat([SetRows(ids, values)(WEIGHT[rows], rows) for rows in PARTS]), wanted
    )
    other = draw(OUT, IN) + 1
    assert torch.equal(torch.cat([Replace(other)(WEIGHT[rows], rows) for rows in PARTS]), other)
    assert Replace(other)(WEIGHT.bfloat16(), slice(0, OUT)).dtype == torch.bfloat16


def test_edits_are_the_same_if_they_do_the_same() -> None:
    edit = AddLowRank(LEFT, RIGHT, SCALE)
    assert (
        same_edit(None, None)
        and same_edit(edit, edit)
        and same_edit(edit, AddLowRank(LEFT.clone(), RIGHT, SCALE))
    )
    for other in (
        None,
        AddLowRank(LEFT + 1, RIGHT, SCALE),
        AddLowRank(LEFT, RIGHT, 1.0),
        Replace(LEFT),
    ):
        assert not same_edit(edit, other) and not same_edit(other, edit)


@given(st.integers(0, 5000), st.integers(0, 300), st.integers(1, 4))
def test_blocks_cover_a_matrix_or_are_evenly_spread_samples_of_it(
    rows: int, columns: int, samples: int
) -> None:
    block, blocks_module.BLOCK = blocks_module.BLOCK, 2**12
    try:
        every, some = [*blocks(rows, columns)], [*blocks(rows, columns, samples)]
    finally:
        blocks_module.BLOCK = block

    def covered(slices: list[slice]) -> Iterator[int]:
        return (row for span in slices for row in range(span.start, span.stop))

    assert [*covered(every)] == [*range(rows)]
    sizes = {span.stop - span.start for span in every[:-1]}
    assert len(sizes) <= 1 and all(
        size * columns <= 2**12 < (size + 1) * max(1, columns) for size in sizes
    )
    assert all(span in every for span in some)
    assert min(samples, len(every)) <= len(some) <= max(2 * samples, 1) or not rows
    places = [every.index(span) for span in some]
    assert places == [*range(0, len(every), max(1, len(every) // samples))]


def test_a_parameter_is_found_by_its_name_or_by_the_only_one_that_ends_so() -> None:
    stored = ("model.a.weight", "b.weight", "one.c.weight", "two.c.weight", "model.embed.weight")
    assert stored_name("model.a.weight", stored) == "model.a.weight"
    assert stored_name("a.weight", stored) == "model.a.weight", "the files have a prefix more"
    assert stored_name("model.b.weight", stored) == "b.weight", "or less"
    assert stored_name("c.weight", stored) is None, "either could be meant"
    assert stored_name("head.weight", stored) is None
    assert (
        stored_name("head.weight", stored, ("model.embed.weight", "head.weight"))
        == "model.embed.weight"
    )
    assert stored_name("lost.weight", stored, ("model.embed.weight", "head.weight")) is None


def test_a_certificate_is_described_by_its_extremes() -> None:
    ratios = {"a": 0.99991, "b": None, "c": 1.00004}
    assert [*describe({"delta_ratios": ratios, "max_logit_difference": 1.234e-6})] == [
        "2 matrices hold their update 0.9999 to 1.0000 times",
        "largest logit difference 1.2e-06",
    ]
    assert [*describe({"delta_ratios": {"b": None}})] == [*describe({})] == []


def test_a_stored_matrix_is_read_by_blocks_by_samples_of_them_and_by_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks_module, "BLOCK", 2 * IN)
    stored, file = draw(20, IN), tmp_path / "m.safetensors"
    save_file({"before": draw(3), "weight": stored}, file)
    location = TensorLocation(file, read_header(file)["weight"])
    for samples, starts in ((None, range(0, 20, 2)), (3, range(0, 20, 6))):
        read = list(read_blocks(location, samples))
        assert [rows for rows, _ in read] == [slice(start, start + 2) for start in starts]
        assert all(torch.equal(block, stored[rows]) for rows, block in read)
    assert torch.equal(read_rows(location, [19, 0, 7]), stored[[19, 0, 7]])
    cut_off(file, 1)
    with pytest.raises(UserError, match=r"m\.safetensors was truncated while it was read"):
        read_rows(location, [19])
    with pytest.raises(UserError, match=r"m\.safetensors was truncated while it was read"):
        list(read_blocks(location))
