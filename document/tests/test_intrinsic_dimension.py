"""Training in random subspaces: the projection is an isometry, and in all dimensions it is training
as it always is.
"""

import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lab.random_subspace import OneHot, SubspaceAdam
from lab.tables import Cell, Spread, read_table
from torch import Tensor

from pipeline.data.examples import Window
from pipeline.data.formats import read_examples
from pipeline.data.windows import InMemoryDataset
from pipeline.errors import UserError
from pipeline.inference.engine import load
from pipeline.inference.score import score
from pipeline.models.minigpt import MiniGPT, MiniGPTConfig
from pipeline.stages.methods.full import COUNTED as FULL
from pipeline.stages.methods.full import FinetuneFull
from pipeline.training.batches import Batches
from pipeline.training.loop import steps
from pipeline.training.optimizer import FlatOptimizer
from pipeline.training.task import TrainingTask, build_optimizer
from tests.conftest import Built, Lora
from tests.helpers.projects import make, refusal

SETTINGS = FinetuneFull(epochs=20, learning_rate=1e-3)


class Dense(OneHot):
    """P with orthonormal columns, from D·d normal numbers: what `OneHot` stands for."""

    def __init__(self, large: int, small: int, seed: int) -> None:
        drawn = torch.randn(large, small, generator=torch.Generator().manual_seed(seed))
        self.small, self._matrix = small, torch.linalg.qr(drawn).Q

    def to(self, device: torch.device) -> "Dense":
        self._matrix = self._matrix.to(device)
        return self

    def up(self, inner: Tensor) -> Tensor:
        return torch.mv(self._matrix, inner)

    def down(self, outer: Tensor) -> Tensor:
        return torch.mv(self._matrix.T, outer)


def matrix_of(projection: OneHot) -> Tensor:
    """P, column by column."""
    return torch.stack([projection.up(one) for one in torch.eye(projection.small)], dim=1)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 9))
def test_the_projection_is_an_isometry_and_down_is_its_transpose(
    one: int, other: int, seed: int
) -> None:
    small, large = sorted((one, other))
    projection = OneHot(large, small, seed)
    P = matrix_of(projection)
    torch.testing.assert_close(P.T @ P, torch.eye(small))
    outer = torch.randn(large)
    torch.testing.assert_close(projection.down(outer), P.T @ outer)
    counts = (P != 0).sum(0)
    assert ((P != 0).sum(1) == 1).all() and counts.max() - counts.min() <= 1


def test_seeds_draw_other_subspaces_and_none_is_larger_than_the_space() -> None:
    assert torch.equal(matrix_of(OneHot(30, 5, 1)), matrix_of(OneHot(30, 5, 1)))
    assert not torch.equal(matrix_of(OneHot(30, 5, 1)), matrix_of(OneHot(30, 5, 2)))
    with pytest.raises(UserError, match="31 dimensions is larger than the model \(30 parameters\)"):
        OneHot(30, 31, 0)


def test_a_gradient_keeps_the_share_of_its_length_that_a_dense_gaussian_projection_keeps() -> None:
    """E ‖Pᵀg‖² = d/D ‖g‖², whatever the gradient is: of a single number, of equal ones, of normal
    ones.
    """
    large, small = 600, 60
    for g in (torch.eye(large)[3], torch.ones(large), torch.randn(large)):
        for kind in (OneHot, Dense):
            kept = torch.stack(
                [kind(large, small, seed).down(g).square().sum() for seed in range(60)]
            )
            expected = float(g.square().sum()) * small / large
            assert float(kept.mean()) == pytest.approx(expected, rel=0.15), kind


def model() -> MiniGPT:
    torch.manual_seed(0)
    return MiniGPT(MiniGPTConfig(20, 0, 1, d_model=16, layers=1, heads=2, feed_forward=32))


def task(of: MiniGPT) -> TrainingTask:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(2, 20, (8, 5), generator=generator).tolist()
    windows = [Window(0, tuple(row[:4]), tuple(row[1:])) for row in rows]
    return TrainingTask.of_one(
        of, Batches(InMemoryDataset(windows, ["x"] * 8), 4, 0), SETTINGS, FULL
    )


def losses(of: MiniGPT, optimizer: FlatOptimizer) -> list[float]:
    return [by_learner[0].loss for by_learner in steps(task(of), optimizer)]


def size_of(of: MiniGPT) -> int:
    return sum(p.numel() for p in of.parameters())


def test_in_as_many_dimensions_as_there_are_weights_it_is_full_fine_tuning() -> None:
    """A permutation with signs: Adam treats every number alike, whatever its place and its sign."""
    plain, inner = model(), model()
    wanted = losses(plain, build_optimizer(plain, SETTINGS))
    found = losses(inner, SubspaceAdam(inner, OneHot(size_of(inner), size_of(inner), 5)))
    assert found == pytest.approx(wanted, rel=1e-3)
    assert wanted[-1] < 0.9 * wanted[0]
    # of its keys' biases, which change no answer, only rounding's noise moves
    ids = torch.arange(2, 20)[None]
    torch.testing.assert_close(inner(ids), plain(ids), atol=1e-3, rtol=1e-3)


def test_the_change_stays_in_the_subspace_and_every_weight_moves_as_far_as_without_it() -> None:
    before, after = model(), model()
    projection = OneHot(size_of(after), 7, 3)
    optimizer = SubspaceAdam(after, projection)
    next(steps(task(after), optimizer))
    change = torch.cat(
        [
            (a - b).detach().flatten()
            for a, b in zip(after.parameters(), before.parameters(), strict=True)
        ]
    )
    flat = torch.cat([weight.flatten() for _, weight in optimizer.trained()])
    assert torch.equal(flat, torch.cat([p.detach().flatten() for p in after.parameters()]))
    torch.testing.assert_close(projection.up(projection.down(change)), change)
    # Adam's first step is the learning rate
    assert float(change.abs().median()) == pytest.approx(1e-3, rel=0.1)


def test_more_dimensions_learn_more_and_a_dense_projection_learns_as_much() -> None:
    def last(kind: type[OneHot], small: int) -> float:
        found = []
        for seed in range(4):
            inner = model()
            optimizer = SubspaceAdam(inner, kind(size_of(inner), small, seed))
            found.append(sum(losses(inner, optimizer)[-4:]) / 4)
        return sum(found) / len(found)

    sparse = [last(OneHot, small) for small in (2, 16, 64)]
    assert sparse[0] > sparse[1] > sparse[2]
    assert last(Dense, 16) == pytest.approx(sparse[1], rel=0.25)


@pytest.fixture(scope="module")
def studied(brief: Path, built: Built) -> Path:
    """The study of one seed, and full fine-tuning of that seed by its own stage, as the document
    has it.
    """

    def build(root: Path) -> None:
        shutil.copytree(brief, root, dirs_exist_ok=True)
        given = [
            "study_intrinsic_dimension.seeds=[0]",
            "study_intrinsic_dimension.dimensions=[64, 256, 1024]",
        ]
        make(root, ["finetune_full", "study_intrinsic_dimension"], given)

    return built("dimension", build)


def table_of(root: Path, name: str) -> list[dict[str, Cell]]:
    return read_table(root / f"artifacts/studies/intrinsic_dimension/{name}.csv")


def mean(cell: Cell) -> float:
    assert isinstance(cell, Spread)
    return cell


def test_the_last_row_is_full_fine_tuning_and_the_first_the_base(studied: Path) -> None:
    base, *inner, full = table_of(studied, "dimensions")
    examples = read_examples(studied / "data/finetune.de.txt", "data/finetune.de.txt")
    for folder, row in (("expanded", base), ("full_finetuned", full)):
        scored = score(load(studied / "artifacts" / folder), examples)
        assert mean(row["loss"]) == pytest.approx(scored.loss, rel=1e-5)
        assert mean(row["right"]) == pytest.approx(
            float((scored.choices == scored.labels).double().mean())
        )
    for begins in ("base", "random weights"):
        losses = [mean(row["loss"]) for row in inner if row["begins"] == begins]
        assert (
            len(losses) == 3
            and losses == sorted(losses, reverse=True)
            and losses[-1] < 0.5 < losses[0]
        )


def test_the_least_is_the_first_that_reaches_the_share(studied: Path) -> None:
    _, *inner, full = table_of(studied, "dimensions")
    for row in (*inner, full):
        assert row["enough"] is (mean(row["right"]) >= 0.9 * mean(full["right"]) - 1e-6)
    for begins, ours in zip(("base", "random weights"), table_of(studied, "least"), strict=False):
        enough = [row["dimensions"] for row in inner if row["begins"] == begins and row["enough"]]
        short = [
            row["dimensions"] for row in inner if row["begins"] == begins and not row["enough"]
        ]
        assert mean(ours["least"]) == enough[0] and short == [64]
        parameters = sum(p.numel() for p in load(studied / "artifacts/expanded").model.parameters())
        assert ours["parameters"] == full["dimensions"] == parameters


def test_a_subspace_that_is_larger_than_the_model_and_a_rate_that_diverges_are_refused(
    cli: Lora, project: Path
) -> None:
    one = ["study", "intrinsic_dimension", "--set", "study_intrinsic_dimension.seeds=[0]"]
    said = refusal(cli(*one, "--set", "study_intrinsic_dimension.dimensions=[999999]", cwd=project))
    assert "999,999 dimensions is larger than the model" in said
    said = refusal(cli(*one, "--set", "study_intrinsic_dimension.learning_rate=1e30", cwd=project))
    assert "Lower study_intrinsic_dimension.learning_rate" in said
