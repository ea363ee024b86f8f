"""`lora study spectrum`: its numbers are those of `lora spectrum` on models that their own stages
trained.
"""

import csv
import io
import json
import re
import shutil
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lab.studies.spectrum import directions, energy, overlaps, spectra_of
from lab.tables import Cell, Spread, read_table
from safetensors.torch import load_file

from pipeline.adapters.low_rank import LowRank
from pipeline.weights.spectrum import Measured
from tests.conftest import Built, Lora
from tests.helpers.checkpoints import checkpoint
from tests.helpers.projects import make
from tests.helpers.stored_models import random_matrix

STUDY = "artifacts/studies/spectrum"


@pytest.fixture(scope="module")
def studied(brief: Path, built: Built) -> Path:
    """The study of two seeds, and full fine-tuning of the first by its own stage, as the document
    has it.
    """

    def build(root: Path) -> None:
        shutil.copytree(brief, root, dirs_exist_ok=True)
        given = ["study_spectrum.seeds=[0, 1]", "study_spectrum.extracted=[2, 64]"]
        make(root, ["finetune_full", "study_spectrum"], given)

    return built("spectrum", build)


def rows_of(root: Path, table: str, *keys: str) -> dict[tuple[str, ...], dict[str, Cell]]:
    return {
        tuple(str(row[key]) for key in keys): row
        for row in read_table(root / f"{STUDY}/{table}.csv")
    }


def holds(cell: Cell, value: float) -> bool:
    """Whether one of two seeds is `value`."""
    assert isinstance(cell, Spread)
    return value in (pytest.approx(cell.low, rel=1e-4), pytest.approx(cell.high, rel=1e-4))


def test_what_full_fine_tuning_changed_is_what_the_command_says(studied: Path, cli: Lora) -> None:
    _, out, _ = cli(
        "spectrum", "artifacts/expanded", "artifacts/full_finetuned", "--csv", cwd=studied
    )
    said = {row["name"]: row for row in csv.DictReader(io.StringIO(out))}
    rows = rows_of(studied, "energy", "change", "matrices")
    for kind, ends in (
        ("attention", ("q_proj", "k_proj", "v_proj", "out_proj")),
        ("head", ("lm_head",)),
    ):
        own = [
            row
            for name, row in said.items()
            if name.removesuffix(".weight").endswith(ends) and row["energy_1"]
        ]
        for key, column in (
            ("rank_1", "energy_1"),
            ("rank_8", "energy_8"),
            ("relative", "relative"),
        ):
            assert holds(rows["full", kind][key], fmean(float(row[column]) for row in own))
        assert holds(rows["full", kind]["rank_of_90"], fmean(int(row["rank_of_90"]) for row in own))


def test_a_random_matrix_is_as_flat_as_numpys(studied: Path) -> None:
    row = rows_of(studied, "energy", "change", "matrices")["random", "attention"]
    values = np.linalg.svd(np.random.default_rng(0).normal(size=(64, 64)), compute_uv=False) ** 2
    assert isinstance(row["rank_8"], Spread)
    assert row["rank_8"] == pytest.approx(values[:8].sum() / values.sum(), rel=0.05)


def test_a_wide_matrix_counts_with_all_of_its_rank(tmp_path: Path) -> None:
    """Over 1,024 columns the command knows 64 values, of which no number may hold 90%."""
    wide = {"d_model": 128, "layers": 1, "feed_forward": 1100}
    base, tuned = (
        checkpoint(tmp_path / name, seed, **wide) for seed, name in enumerate(("base", "tuned"))
    )
    table = energy(spectra_of(base, [tuned], {}))
    row = next(
        row for row in table.rows if (row["change"], row["matrices"]) == ("full", "feed-forward")
    )
    old, new = (load_file(folder / "model.safetensors") for folder in (base, tuned))
    ranks = []
    for name in (name for name in old if "fc" in name and name.endswith("weight")):
        values = (
            np.linalg.svd((new[name].double() - old[name].double()).numpy(), compute_uv=False) ** 2
        )
        ranks.append(int((values.cumsum() < 0.9 * values.sum()).sum()) + 1)
    assert isinstance(row["rank_of_90"], Spread) and min(ranks) > 64
    assert row["rank_of_90"] == pytest.approx(fmean(ranks))


def test_what_is_not_known_is_not_zero() -> None:
    """A matrix that did not change has no spectrum."""
    same = Measured("0.fc1.weight", (4, 4), 1.0, 0.0)
    changed = Measured("0.fc2.weight", (4, 4), 1.0, 5.0, (4.0, 3.0, 0.0, 0.0))
    by = {row["change"]: row for row in energy({"one": [[same, changed]], "none": [[same]]}).rows}
    assert by["one"]["rank_1"] == 0.64 and by["one"]["relative"] == 2.5
    assert by["none"]["rank_1"] is by["none"]["rank_of_90"] is None


def test_two_runs_share_more_directions_than_chance_and_chance_is_that_of_random_subspaces(
    studied: Path,
) -> None:
    rows = rows_of(studied, "subspaces", "pair", "side")
    for pair in ("LoRA, r = 8 and 64", "LoRA, r = 8, two seeds", "LoRA, r = 64, two seeds"):
        for side in ("inputs", "outputs"):
            shared, chance = rows[pair, side]["phi_8_8"], rows["random", side]["phi_8_8"]
            assert isinstance(shared, Spread) and isinstance(chance, Spread)
            assert shared.low > 2 * chance.high and chance == pytest.approx(8 / 64, rel=0.1)


@pytest.mark.slow
def test_phi_is_the_papers_formula_on_adapters_that_train_alone(
    studied: Path, tmp_path: Path
) -> None:
    """Two seeds of rank 8, each trained by its own stage, their directions from numpy."""
    root, found = tmp_path / "project", []
    shutil.copytree(studied, root)
    for seed in (0, 1):
        make(root, ["finetune_lora"], ["finetune_lora.rank=8", f"finetune_lora.seed={seed}"])
        found.append(load_file(root / "artifacts/lora_adapter/adapter_model.safetensors"))
    names = [name for name in found[0] if name.endswith("lora_A.weight")]
    expected = []
    for name in names:
        updates = [
            one[name.replace("lora_A", "lora_B")].double() @ one[name].double() for one in found
        ]
        (_, _, v), (_, _, w) = (np.linalg.svd(update.numpy()) for update in updates)
        expected.append(np.linalg.norm(v[:2] @ w[:2].T) ** 2 / 2)
    row = rows_of(studied, "subspaces", "pair", "side")["LoRA, r = 8, two seeds", "inputs"]
    assert isinstance(row["phi_2_2"], Spread)
    assert row["phi_2_2"] == pytest.approx(np.mean(expected), abs=1e-3)


def test_the_extracted_lora_knows_what_that_of_the_command_knows(
    studied: Path, cli: Lora, tmp_path: Path
) -> None:
    rows = rows_of(studied, "extracted", "rank")
    given = [
        "artifacts/expanded",
        "artifacts/full_finetuned",
        "--rank",
        "2",
        "--out",
        str(tmp_path / "lora"),
    ]
    _, out, _ = cli("spectrum", *given, "--data", "data/finetune.de.txt", "--json", cwd=studied)
    said = json.loads(out)
    assert holds(rows[("2",)]["held"], said["extracted"]["held"])
    assert holds(rows[("2",)]["new_loss"], said["quality"]["base + LoRA"]["loss"])
    assert holds(rows[("tuned",)]["new_loss"], said["quality"]["tuned"]["loss"])
    losses = [
        cell
        for rank in ("0", "2", "64", "tuned")
        if isinstance(cell := rows[(rank,)]["new_loss"], Spread)
    ]
    assert len(losses) == 4 and losses == sorted(losses, reverse=True)


def test_the_text_says_what_it_speaks_of(studied: Path) -> None:
    text = " ".join((studied / STUDY / "report.md").read_text(encoding="utf-8").split())
    assert re.search(
        r"Of what LoRA learned, rank 2 holds \S+( ±\d+)? with r = 8 and \S+( ±\d+)? with r = 64\.",
        text,
    )
    assert text.index("φ(i, j), from 0 to 1, is the share of") < text.index(
        "φ(1, 1) and φ(8, 8) of the inputs: "
    )


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 5))
def test_the_overlap_of_subspaces_is_the_papers_formula(k: int, n: int, seed: int) -> None:
    one, other = (
        torch.linalg.qr(random_matrix(12, size, seed + size)).Q.double() for size in (k, n)
    )
    found = overlaps(one, other)
    for i in range(1, k + 1):
        for j in range(1, n + 1):
            shared = np.linalg.norm(one[:, :i].T.numpy() @ other[:, :j].numpy()) ** 2 / min(i, j)
            assert float(found[i - 1, j - 1]) == pytest.approx(shared)
    assert float(overlaps(one, one)[-1, -1]) == pytest.approx(1)


def test_random_subspaces_overlap_by_the_larger_share_of_the_space() -> None:
    """E φ(i, j) = max(i, j) / n, the baseline for φ of trained updates."""
    pairs = [
        [torch.linalg.qr(random_matrix(40, 8, 2 * seed + which).double()).Q for which in (0, 1)]
        for seed in range(200)
    ]
    mean = torch.stack([overlaps(*pair) for pair in pairs]).mean(0)
    for i, j in ((1, 1), (2, 8), (8, 8), (4, 1)):
        assert float(mean[i - 1, j - 1]) == pytest.approx(max(i, j) / 40, rel=0.2)


def test_directions_of_an_update_are_numpys() -> None:
    update = LowRank(random_matrix(3, 20, 1), random_matrix(10, 3, 2), 0.5)
    left, right = directions(update)
    u, _, v = np.linalg.svd(update.delta().double().numpy())
    np.testing.assert_allclose(abs((left.T.numpy() @ u[:, :3]).diagonal()), 1, rtol=1e-6)
    np.testing.assert_allclose(abs((right.T.numpy() @ v[:3].T).diagonal()), 1, rtol=1e-6)
