"""The figures' numbers against plain mathematics and other libraries, and the pictures as a reader
gets them.
"""

import math
import shutil
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from lab.figures import Figures, finetuning_subspace, modules, placement
from lab.figures.attention import ink_on, layer_attention
from lab.figures.finetuning_subspace import (
    LITTLE_TO_MUCH,
    held_by,
    held_if_normal,
    needed_for,
    needed_if_normal,
    ramp,
)
from lab.figures.gradient_example import GradientProbe, formulas, parameter_gradients
from lab.figures.lora_intuition import (
    Plane,
    best_of_rank,
    circle,
    farthest,
    share_of_rank,
)
from lab.report import FROZEN, GREEN, INK, PRINT, RED, SMALL, Findings
from lab.runner import drain, render
from lab.tables import Cell, read_table
from safetensors.numpy import load_file
from tests.lab_projects import BRIEF
from torch import nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, OPTForCausalLM

from pipeline.adapters.config import read_spec
from pipeline.adapters.lora import LoRALinear
from pipeline.data.formats import read_examples
from pipeline.errors import UserError
from pipeline.inference import engine
from pipeline.inference.score import score
from pipeline.models.load import load_base
from pipeline.project.logs.run_log import read_steps
from pipeline.project.params.sections import Init
from pipeline.project.runner import Job
from pipeline.stages.registry import open_project
from tests.conftest import Built, Lora
from tests.helpers.checkpoints import checkpoint, token_ids
from tests.helpers.json_files import read_json
from tests.helpers.projects import STAGES, folder_bytes, load, make, refusal, section_overrides

Matrix = npt.NDArray[np.float64]
NAMES = (
    "finetuning_subspace",
    "loss_curves",
    "gradient_example",
    "lora_intuition",
    "placement",
    "attention",
)
SENTENCE = "die katze sitzt auf dem"
SVG = "{http://www.w3.org/2000/svg}"

sizes = st.tuples(st.integers(2, 6), st.integers(2, 6))
matrices = sizes.flatmap(lambda size: arrays(np.float64, size, elements=st.floats(-4, 4, width=32)))
squares = arrays(np.float64, st.integers(10, 60), elements=st.floats(0, 9, width=32)).filter(
    lambda s: s.sum() > 0.01
)


@pytest.fixture(scope="module")
def figured(finished: Path, built: Built) -> Path:
    """The whole pipeline and its figures."""

    def build(root: Path) -> None:
        shutil.copytree(finished, root, dirs_exist_ok=True)
        make(root, ["figures"])

    return built("figured", build)


def job_of(root: Path, overrides: Sequence[str] = ()) -> Job:
    """The stage's, to measure and not to write."""
    project = open_project(root / "params.yaml", overrides)
    return Job(project, STAGES["figures"], root / "out", root / "run", "", 100)


def table(root: Path, name: str) -> list[dict[str, Cell]]:
    return read_table(root / f"artifacts/figures/{name}.csv")


def number(cell: Cell) -> float:
    assert isinstance(cell, int | float)
    return float(cell)


def changed(root: Path) -> dict[str, tuple[Matrix, Matrix]]:
    """(before, change) of every parameter, from the files alone."""
    before, after = (
        load_file(root / f"artifacts/{name}/model.safetensors")
        for name in ("expanded", "full_finetuned")
    )
    names = [name for name in before if "embed_positions" not in name]
    return {
        name: (before[name].astype(float), after[name].astype(float) - before[name])
        for name in names
    }


# --- what is asked of any matrix


@given(matrices, st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_no_other_matrix_of_the_rank_is_nearer_than_the_best(
    change: Matrix, rank: int, seed: int
) -> None:
    """Eckart & Young: its distance is the norm of the singular values that are left out; others are
    at least as far.
    """
    best = best_of_rank(change, rank)
    left_out = np.linalg.svd(change, compute_uv=False)[rank:]
    assert np.linalg.matrix_rank(best, tol=1e-6) <= rank
    assert np.linalg.norm(change - best) == pytest.approx(np.linalg.norm(left_out), abs=1e-6)
    random = np.random.default_rng(seed)
    b, a = random.normal(size=(len(change), rank)), random.normal(size=(rank, change.shape[1]))
    for _ in range(20):  # alternating least squares goes downhill from any start
        b = change @ np.linalg.pinv(a)
        a = np.linalg.pinv(b) @ change
    assert np.linalg.norm(change - b @ a) >= np.linalg.norm(change - best) - 1e-6


@given(matrices, st.integers(1, 3))
def test_the_share_of_a_rank_is_that_of_its_best_matrix(change: Matrix, rank: int) -> None:
    values = np.linalg.svd(change, compute_uv=False)
    whole = np.linalg.norm(change) ** 2
    wanted = np.linalg.norm(best_of_rank(change, rank)) ** 2 / whole if whole > 1e-9 else None
    if wanted is not None:
        assert share_of_rank(tuple(values), rank) == pytest.approx(wanted, abs=1e-6)


@given(matrices)
def test_in_its_plane_a_change_does_what_it_does_in_all_dimensions(change: Matrix) -> None:
    weight = np.arange(change.size, dtype=float).reshape(change.shape)
    plane = Plane.of("p", weight, change)
    u, _, vt = np.linalg.svd(change, full_matrices=False)
    for z in circle(9).T:
        x = z @ vt[:2]  # signs of the vectors may differ: norms do not
        assert np.linalg.norm(change @ x) == pytest.approx(
            np.linalg.norm(plane.change @ z), abs=1e-6
        )
    ours, theirs = np.abs(plane.weight), np.abs(u[:, :2].T @ weight @ vt[:2].T)
    values = np.linalg.svd(change, compute_uv=False)
    # else the vectors are any of a plane
    if min(abs(np.diff(values[:3])).min(initial=9.0), values[1]) > 1e-2:
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


@given(arrays(np.float64, (2, 2), elements=st.floats(-4, 4, width=32)))
def test_the_ellipses_are_farthest_apart_by_the_second_singular_value(change: Matrix) -> None:
    plane = Plane.example("e", (1, 0.5, 0, 2), tuple(change.flatten()))
    x = circle(2001)
    apart = np.linalg.norm((plane.change - plane.update) @ x, axis=0)
    target, reached = farthest(plane)
    assert np.linalg.norm(target - reached) == pytest.approx(plane.values[1], abs=1e-9)
    assert apart.max() <= plane.values[1] + 1e-9
    assert apart.max() == pytest.approx(plane.values[1], abs=1e-4)


# --- what is asked of any set of changes


@given(squares, st.sampled_from([0.01, 0.1, 0.5]))
def test_what_a_part_holds_is_the_sum_of_the_largest(values: Matrix, part: float) -> None:
    count = max(1, round(part * len(values)))
    wanted = sorted(values, reverse=True)[:count]
    assert held_by(torch.tensor(values), part) == pytest.approx(sum(wanted) / values.sum())


@given(squares)
def test_the_part_that_is_needed_is_the_least(values: Matrix) -> None:
    part = needed_for(torch.tensor(values), 0.9)
    count = round(part * len(values))
    ordered = np.sort(values)[::-1]
    assert ordered[:count].sum() >= 0.9 * values.sum() - 1e-9
    assert ordered[: count - 1].sum() < 0.9 * values.sum() + 1e-9


def test_of_normal_changes_a_tenth_holds_what_a_sample_says() -> None:
    sample = torch.tensor(np.random.default_rng(0).normal(size=400_000)).square()
    for part in (0.01, 0.1, 0.5):
        assert held_if_normal(part) == pytest.approx(held_by(sample, part), abs=0.004)
    assert held_if_normal(needed_if_normal(0.9)) == pytest.approx(0.9)
    assert needed_if_normal(0.9) == pytest.approx(needed_for(sample, 0.9), abs=0.004)


# --- Figure 1


def test_every_neuron_is_a_row_of_the_files(figured: Path) -> None:
    rows = table(figured, "finetuning_subspace")
    found = {(row["block"], row["module"], row["neuron"]): row for row in rows}
    for name, (before, change) in changed(figured).items():
        if change.ndim == 1:
            continue
        *path, module, _ = name.split(".")
        block = next((int(part) for part in path if part.isdigit()), None)
        for n in (0, len(change) // 2, len(change) - 1):
            row = found[block, module, n]
            size = np.linalg.norm(change[n])
            assert number(row["change"]) == pytest.approx(size, rel=1e-4, abs=1e-7)
            assert number(row["relative_change"]) == pytest.approx(
                size / np.linalg.norm(before[n]), rel=1e-4, abs=1e-7
            )
    assert len(rows) == sum(
        len(change) for _, change in changed(figured).values() if change.ndim == 2
    )


def test_the_concentration_is_that_of_all_changes(figured: Path) -> None:
    changes = changed(figured)
    all_ = np.concatenate([change.flatten() ** 2 for _, change in changes.values()])
    inside = np.concatenate(
        [change.flatten() ** 2 for name, (_, change) in changes.items() if ".layers." in name]
    )
    rows = {row["part"]: row for row in table(figured, "finetuning_subspace_concentration")}
    for part, squared in (("weights", all_), ("weights of the blocks", inside)):
        tenth = np.sort(squared)[::-1][: round(len(squared) / 10)].sum() / squared.sum()
        assert number(rows[part]["top_10"]) == pytest.approx(tenth, rel=1e-4)
        assert number(rows[part]["moved"]) == pytest.approx((squared > 0).mean(), rel=1e-4)
        assert rows[part]["count"] == len(squared)
    modules = table(figured, "finetuning_subspace_modules")
    assert sum(number(row["share_of_change"]) for row in modules) == pytest.approx(1, abs=1e-4)
    assert sum(number(row["weights"]) for row in modules) == len(all_) == 112_768
    head = next(row for row in modules if row["module"] == "lm_head")
    assert number(head["share_of_change"]) == pytest.approx(
        (changes["lm_head.weight"][1] ** 2).sum() / all_.sum(), rel=1e-4
    )


def test_adapters_stand_where_the_adapters_own_config_puts_them(figured: Path) -> None:
    config = read_json(figured / "artifacts/lora_adapter/adapter_config.json")
    for row in table(figured, "finetuning_subspace_modules"):
        assert row["lora_rank"] == (config["r"] if row["module"] in config["target_modules"] else 0)
        saved = row["module"] in config["modules_to_save"]
        assert row["rows_in_full"] == (number(row["weights"]) / 64 if saved else 0)


# --- Figure 2


def test_the_curves_are_the_runs_and_flat_where_evaluate_says(figured: Path) -> None:
    metrics = read_json(figured / "artifacts/evaluation/metrics.json")
    epochs = table(figured, "loss_curves")
    methods = {str(row["method"]): row for row in table(figured, "loss_curves_methods")}
    assert list(methods) == ["full", "freeze", "lora"]
    for method, row in methods.items():
        folder = {"full": "full_finetuned", "freeze": "layer_frozen", "lora": "lora_adapter"}[
            method
        ]
        steps = read_steps(figured / "artifacts" / folder / "loss.csv")
        means = [
            np.mean([step.loss for step in steps if step.epoch == epoch]) for epoch in range(1, 51)
        ]
        found = [number(each["loss"]) for each in epochs if each["method"] == method]
        np.testing.assert_allclose(found, means, rtol=1e-5)
        assert row["flat_from_epoch"] == metrics[method]["flat_from_epoch"]
        assert row["trainable"] == metrics[method]["trainable"]
        assert number(row["drop_by_30"]) == pytest.approx(
            (means[0] - means[29]) / (means[0] - means[-1]), rel=1e-4
        )


# --- Figure 3


def test_the_slope_is_that_of_finite_differences_and_no_gradient_is_larger(figured: Path) -> None:
    rows = table(figured, "gradient_example_landscape")
    middle = len(rows) // 2
    theta, loss, tangent = (
        [number(row[key]) for row in rows] for key in ("theta", "loss", "tangent")
    )
    loaded = engine.load(figured / "artifacts/expanded")
    examples = read_examples(figured / "data/fact_correction.de.txt", "x")
    assert loss[middle] == tangent[middle] == pytest.approx(score(loaded, examples).loss, rel=1e-5)
    slope = (tangent[-1] - tangent[0]) / (theta[-1] - theta[0])
    third = (loss[middle + 1] - loss[middle - 1]) / (theta[middle + 1] - theta[middle - 1])
    fourth = (loss[middle + 2] - loss[middle - 2]) / (theta[middle + 2] - theta[middle - 2])
    # Richardson: errors of h² are gone
    assert (4 * third - fourth) / 3 == pytest.approx(slope, rel=2e-3)
    stock = OPTForCausalLM.from_pretrained(figured / "artifacts/expanded")
    texts = [loaded.tokenizer.encode(example.text) for example in examples]
    lines = [torch.tensor([[*ids, *loaded.tokenizer.end_ids]]) for ids in texts]
    labels = sum(line.numel() - 1 for line in lines)
    for line in lines:
        (stock(line, labels=line).loss * ((line.numel() - 1) / labels)).backward()
    largest = max(
        stock.parameters(), key=lambda p: 0 if p.grad is None else float(p.grad.abs().max())
    )
    place = largest.grad.abs().argmax()
    assert float(largest.grad.flatten()[place]) == pytest.approx(slope, rel=1e-3)
    assert theta[middle] == pytest.approx(float(largest.detach().flatten()[place]), rel=1e-4)


def test_gradients_exist_where_something_trains_and_nowhere_else(figured: Path) -> None:
    rows = table(figured, "gradient_example_tensors")
    assert all(row["has_grad"] == row["requires_grad"] for row in rows)
    manifest = read_json(figured / "artifacts/lora_adapter/manifest.json")
    given_ = [row for row in rows if row["has_grad"]]
    assert sum(number(row["parameters"]) for row in given_) == manifest["parameters"]["trainable"]
    stored = load_file(figured / "artifacts/lora_adapter/adapter_model.safetensors")
    names = {name.removeprefix("base_model.model.").replace(".weight", "") for name in stored}
    assert {str(row["tensor"]).replace(".weight", "") for row in given_} == names
    zero = {str(row["tensor"]) for row in given_ if row["grad_norm"] == 0}
    # as B = 0
    assert zero == {str(row["tensor"]) for row in rows if str(row["tensor"]).endswith("lora_A")}
    groups = table(figured, "gradient_example_groups")
    assert (
        sum(number(row["parameters_with_grad"]) for row in groups)
        == manifest["parameters"]["trainable"]
    )
    assert sum(number(row["tensors"]) for row in groups) == len(rows)


@pytest.mark.parametrize("init", ["document", "pissa"])
def test_the_documents_gradients_are_autograds_of_the_unfolded_product(init: Init) -> None:
    torch.manual_seed(0)
    base, x = nn.Linear(6, 5), torch.randn(2, 7, 6, requires_grad=True)
    layer = LoRALinear(base, 2, 0.5, init=init)
    nn.init.normal_(layer.lora_B)
    probe = GradientProbe(layer)
    torch.autograd.backward((layer(x) ** 3).sum())
    A, B = (p.detach().requires_grad_() for p in (layer.lora_A, layer.lora_B))
    moved = layer.neg_initial_B @ layer.initial_A if init == "pissa" else torch.zeros(5, 6)
    h = x.detach() @ (base.weight + 0.5 * moved).T + base.bias + 0.5 * (x.detach() @ A.T) @ B.T
    torch.autograd.backward((h**3).sum())
    assert A.grad is not None and B.grad is not None and x.grad is not None
    assert_close(probe.of_A.float(), A.grad, rtol=1e-4, atol=1e-4)
    assert_close(probe.of_B.float(), B.grad, rtol=1e-4, atol=1e-4)
    row = probe.row("it")
    assert row["error_A"] < 1e-5 and row["error_B"] < 1e-5
    through = (3 * h.detach() ** 2) @ base.weight.detach()
    assert row["through_W"] == pytest.approx(float(through.norm() / x.grad.norm()), rel=1e-4)
    layer.lora_A.grad = 2 * A.grad
    assert probe.row("it")["error_A"] == pytest.approx(1, rel=1e-4), (
        "a factor that is missing is seen"
    )


def test_the_trained_adapter_has_a_row_for_each_matrix(figured: Path) -> None:
    rows = table(figured, "gradient_example_formulas")
    stored = load_file(figured / "artifacts/lora_adapter/adapter_model.safetensors")
    names = [
        name.removeprefix("base_model.model.") for name in stored if name.endswith("lora_A.weight")
    ]
    assert {f"{row['module']}.lora_A.weight" for row in rows} == set(names)
    assert max(number(row[key]) for row in rows for key in ("error_A", "error_B")) < 1e-5
    assert min(number(row["through_W"]) for row in rows) > 0.5


@pytest.mark.parametrize("setting", ["dora=true", "init_lora_weights=pissa", "quantization=nf4-dq"])
def test_the_formulas_are_tried_on_any_adapter(figured: Path, tmp_path: Path, setting: str) -> None:
    root = shutil.copytree(figured, tmp_path / "project", ignore=shutil.ignore_patterns("runs"))
    make(root, ["finetune_lora"], [f"finetune_lora.{setting}", "finetune_lora.epochs=2"])
    assert len(formulas(job_of(root))) == 8


def test_the_way_from_tisch_to_sofa_ends_where_the_trained_adapter_is(
    figured: Path, tmp_path: Path
) -> None:
    rows = table(figured, "gradient_example_descent")
    root = tmp_path / "project"
    shutil.copytree(figured, root, ignore=shutil.ignore_patterns("runs"))
    # four sentences: an epoch is a step
    lora = {"data": "data/fact_correction.de.txt", "epochs": 10, "window": 0}
    make(root, ["finetune_lora"], section_overrides("finetune_lora", lora))
    for step, adapter in ((0, None), (10, root / "artifacts/lora_adapter")):
        loaded = engine.load(root / "artifacts/expanded", adapter)
        said = engine.next_probabilities(loaded, SENTENCE)
        for word in ("tisch", "sofa", "bett", "boden"):
            (token,) = loaded.tokenizer.continuation(SENTENCE, word)
            assert number(rows[step][word]) == pytest.approx(float(said[token]), rel=1e-3)
    assert [row["step"] for row in rows if row["document_sofa"] is not None] == [0, 10, 30, 50]


# --- Figure 4


def test_the_shares_are_those_of_numpys_singular_values(figured: Path) -> None:
    example, *rows = table(figured, "lora_intuition")
    settings = load(figured / "params.yaml").of(Figures)
    values = np.linalg.svd(np.reshape(settings.change, (2, 2)), compute_uv=False)
    assert [example["sigma_1"], example["sigma_2"]] == pytest.approx(list(values), rel=1e-5)
    assert number(example["rank_1"]) == pytest.approx(values[0] ** 2 / (values**2).sum(), rel=1e-5)
    found = {(row["block"], row["module"]): row for row in rows}
    for name, (_, change) in changed(figured).items():
        if change.ndim == 2:
            *path, module, _ = name.split(".")
            row = found.pop((next((int(part) for part in path if part.isdigit()), None), module))
            values = np.linalg.svd(change, compute_uv=False)
            for rank in (1, 4, 8):
                share = (values[:rank] ** 2).sum() / (values**2).sum()
                assert number(row[f"rank_{rank}"]) == pytest.approx(share, rel=1e-4)
            assert number(row["ratio"]) == pytest.approx(values[1] / values[0], rel=1e-4)
            assert row["drawn"] == name.endswith(f"{settings.module}.weight")
    assert not found


def test_the_ellipses_are_images_of_the_circle(figured: Path) -> None:
    settings = load(figured / "params.yaml").of(Figures)
    weight, change = (np.reshape(numbers, (2, 2)) for numbers in (settings.weight, settings.change))
    points = [row for row in table(figured, "lora_intuition_points") if row["case"] == "example"]
    for row in points:
        x = np.array([number(row["input_x"]), number(row["input_y"])])
        for name, matrix in (("pretrained", weight), ("full", weight + change)):
            image = [row[f"{name}_x"], row[f"{name}_y"]]
            np.testing.assert_allclose(np.array(image, dtype=float), matrix @ x, atol=1e-5)


# --- Figure 5


def test_the_block_is_the_files_of_base_and_adapter(figured: Path) -> None:
    base = load_file(figured / "artifacts/expanded/model.safetensors")
    adapter = load_file(figured / "artifacts/lora_adapter/adapter_model.safetensors")
    rows = {row["module"]: row for row in table(figured, "placement")}
    prefix = "model.decoder.layers.0."
    assert {
        name.removeprefix(prefix).rsplit(".", 1)[0] for name in base if name.startswith(prefix)
    } == set(rows)
    for name, row in rows.items():
        own = [value for key, value in base.items() if key.startswith(f"{prefix}{name}.")]
        assert row["parameters"] == sum(value.size for value in own)
        shape = base[f"{prefix}{name}.weight"].shape
        assert str(row["shape"]) == " × ".join(map(str, shape))
        for which in "AB":
            factor = adapter.get(f"base_model.model.{prefix}{name}.lora_{which}.weight")
            assert row[which] == (None if factor is None else " × ".join(map(str, factor.shape)))
    assert sum(number(row["trained"]) for row in rows.values()) == 2_048


# --- §2.1


@pytest.mark.parametrize(("model", "folder"), [("base", "expanded"), ("LoRA", "lora_merged")])
def test_the_attention_is_what_transformers_computes(
    figured: Path, model: str, folder: str
) -> None:
    """Of the adapter: in the merged checkpoint, which knows of no adapter."""
    stock = OPTForCausalLM.from_pretrained(
        figured / "artifacts" / folder, attn_implementation="eager"
    )
    ids = engine.encode(engine.load(figured / "artifacts/expanded"), SENTENCE)
    wanted = stock(torch.tensor([ids]), output_attentions=True).attentions
    rows = [row for row in table(figured, "attention") if row["model"] == model]
    words = SENTENCE.split()
    assert len(rows) == 2 * 4 * 15
    for row in rows:
        query, key = words.index(str(row["query"])), words.index(str(row["key"]))
        weight = wanted[row["layer"]][0, row["head"], query, key]
        assert number(row["weight"]) == pytest.approx(float(weight.detach()), abs=1e-5)


def test_the_documents_row_stands_beside_those_of_dem(figured: Path) -> None:
    document, *rows = table(figured, "attention_row")
    assert [document[word] for word in SENTENCE.split()] == [0.08, 0.45, 0.3, 0.15, 0.02]
    assert document["most"] == "katze" and document["distance"] == pytest.approx(0, abs=1e-6)
    for row in rows:
        shares = np.array([row[word] for word in SENTENCE.split()], dtype=float)
        assert shares.sum() == pytest.approx(1, abs=1e-4)
        assert number(row["distance"]) == pytest.approx(
            np.abs(shares - [0.08, 0.45, 0.3, 0.15, 0.02]).sum() / 2, abs=1e-4
        )


# --- the files


@pytest.mark.slow
def test_two_runs_give_the_same_bytes(figured: Path, tmp_path: Path) -> None:
    root = tmp_path / "project"
    shutil.copytree(figured, root, ignore=shutil.ignore_patterns("runs"))
    make(root, ["figures"], force=True)
    assert folder_bytes(root / "artifacts/figures") == folder_bytes(figured / "artifacts/figures")
    assert not (root / "runs/figures/parts").exists()


def test_the_manifest_names_every_file_and_the_report_every_figure(figured: Path) -> None:
    folder = figured / "artifacts/figures"
    about = read_json(folder / "manifest.json")["figures"]
    assert tuple(about) == NAMES
    files = {file for one in about.values() for file in one["files"]}
    assert files | {"report.md", "manifest.json"} == {path.name for path in folder.iterdir()}
    report = (folder / "report.md").read_text(encoding="utf-8")
    for name, one in about.items():
        assert f"]({name}.png)" in report and f"({one['place']})" in report
    for number_, place in enumerate(("§2", "§2.3", "§2.3", "§2.3", "§6"), 1):
        assert f"(Figure {number_}, {place})" in report


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("finetuning_subspace", ["lm_head", "block 1: q, k, v", "trained in full", "if normal"]),
        ("loss_curves", ["Full fine-tuning, flat from 22", "LoRA", "112,768"]),
        ("gradient_example", ["slope −0.221", "sofa", "attention A", "66,176"]),
        ("lora_intuition", ["(W + BA)x", "v_proj of block 1", "0.056 apart"]),
        ("placement", ["q_proj", "64 × 64", "A 4 × 64", "GELU", "residual", "4 heads"]),
        ("attention", ["katze", "document", "0.45", "head 3"]),
    ],
)
def test_an_svg_is_xml_that_holds_its_words(figured: Path, name: str, words: list[str]) -> None:
    tree = ElementTree.parse(figured / f"artifacts/figures/{name}.svg")
    assert tree.getroot().tag == f"{SVG}svg"
    texts = ["".join(text.itertext()).strip() for text in tree.iter(f"{SVG}text")]
    for word in words:
        assert any(word in text for text in texts), texts


class Written(NamedTuple):
    """A line of text as it was drawn, its size in points and its box in pixels, from the upper left
    corner.
    """

    text: str
    points: float
    left: float
    top: float
    right: float
    bottom: float

    def overlaps(self, other: "Written") -> bool:
        """By more than the slack that boxes have around their letters."""
        across = min(self.right, other.right) - max(self.left, other.left)
        down = min(self.bottom, other.bottom) - max(self.top, other.top)
        return across > 2 and down > 3


@pytest.fixture(scope="module")
def drawn(figured: Path) -> dict[str, Findings]:
    job = job_of(figured)
    return {name: drain(render(job, module)) for name, module in modules().items()}


def written(one: Findings) -> tuple[list[Written], float, float]:
    """Every line of text of a figure, and the figure's width and height in pixels."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg, RendererAgg
    from matplotlib.figure import Figure

    found: list[Written] = []
    plain: Callable[..., None] = RendererAgg.draw_text

    def probe(
        self: Any,
        gc: Any,
        x: float,
        y: float,
        s: str,
        prop: Any,
        angle: float,
        ismath: Any = False,
        mtext: Any = None,
    ) -> None:
        w, h, d = self.get_text_width_height_descent(s, prop, ismath)
        box = (x, y - h + d, x + w, y + d) if angle == 0 else (x - h + d, y - w, x + d, y)
        found.append(Written(s, prop.get_size_in_points(), *box))
        plain(self, gc, x, y, s, prop, angle, ismath, mtext)

    with matplotlib.rc_context(PRINT), pytest.MonkeyPatch.context() as patch:
        figure = Figure(figsize=one.size, layout="constrained")
        one.draw(figure)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()  # lays out
        patch.setattr(RendererAgg, "draw_text", probe)
        canvas.draw()
    return found, figure.bbox.width, figure.bbox.height


@pytest.mark.parametrize("name", NAMES)
def test_no_text_is_small_or_cut_or_over_another(drawn: dict[str, Findings], name: str) -> None:
    texts, width, height = written(drawn[name])
    assert len(texts) > 10
    for text in texts:
        assert text.points >= SMALL, text
        assert (
            text.left > -1 and text.top > -1 and text.right < width + 1 and text.bottom < height + 1
        ), text
    pairs = ((a, b) for n, a in enumerate(texts) for b in texts[:n] if a.overlaps(b))
    assert not list(pairs)


# --- in grey


def luminance(color: str) -> float:
    """WCAG's relative luminance of #rrggbb."""
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize(
    ("one", "other", "least"),
    [
        (FROZEN, GREEN, 2.0),  # boxes, and bars of what is frozen beside what trains
        (FROZEN, RED, 2.0),  # neurons, and bars
        (FROZEN, INK, 7.0),  # text on boxes
        (GREEN, INK, 4.5),
        ("#FFFFFF", GREEN, 3.0),  # lines on paper
        ("#FFFFFF", RED, 3.0),
    ],
)
def test_neighbours_stay_apart_in_grey(one: str, other: str, least: float) -> None:
    assert contrast(one, other) >= least


def test_a_ramp_grows_darker_all_the_way() -> None:
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    for ramp_ in (ramp(), colormaps["Blues"]):
        steps = [luminance(to_hex(ramp_(share))) for share in np.linspace(0, 1, 33)]
        assert all(after < before for before, after in pairwise(steps))
        assert steps[0] / steps[-1] > 8
    ends = [luminance(color) for color in LITTLE_TO_MUCH]
    assert ends == sorted(ends, reverse=True)


@pytest.mark.parametrize("share", [n / 50 for n in range(51)])
def test_numbers_on_a_map_can_be_read(share: float) -> None:
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    ink = {"white": "#FFFFFF"}.get(ink_on(share), ink_on(share))
    assert contrast(to_hex(colormaps["Blues"](share)), ink) >= 4


# --- the command and its settings


@pytest.fixture
def own(figured: Path, tmp_path: Path) -> Path:
    """One to run the stage in: in a shared one it would wait for another process that does."""
    return shutil.copytree(figured, tmp_path / "project")


def test_lora_figures_says_what_each_shows_and_where_it_is(
    cli: Lora, figured: Path, own: Path
) -> None:
    code, out, _ = cli("figures", cwd=own)
    assert code == 0
    flat = " ".join(out.split())
    about = read_json(figured / "artifacts/figures/manifest.json")["figures"]
    for name, one in about.items():
        assert name in flat and all(word in flat for word in one["shows"].split())
    assert "_concentration.csv" in flat and out.rstrip().endswith("report.md")


def test_figures_are_of_minigpt(cli: Lora, own: Path) -> None:
    said = refusal(cli("figures", "--set", "base=HuggingFaceTB/SmolLM2-135M", cwd=own))
    assert (
        "figures measures what the document says of MiniGPT; base is HuggingFaceTB/SmolLM2-135M."
        in said
    )


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            "figures.weight=[1, 2, 3]",
            "figures.weight must be the 4 numbers of a 2 × 2 matrix, row by row, got 3",
        ),
        ("figures.change=[1, x, 3, 4]", "figures.change must be a finite number, got 'x'"),
        ("figures.module=layers.7.fc1", "must be the end of one module's name"),
        ("figures.module=fc1", "layers.0.fc1 and model.decoder.layers.1.fc1"),
        ("figures.reach=0", "figures.reach must be more than 0"),
    ],
)
@pytest.mark.sampled(2)
def test_a_setting_that_means_nothing_is_refused(
    cli: Lora, own: Path, override: str, said: str
) -> None:
    assert said in refusal(cli("figures", "--set", override, cwd=own))


def test_a_matrix_may_have_a_number_twice_and_a_list_of_settings_may_not(figured: Path) -> None:
    params = load(figured / "params.yaml", ["figures.change=[1, 0, 0, 1]"])
    assert params.of(Figures).change == (1.0, 0.0, 0.0, 1.0)
    with pytest.raises(UserError, match="twice"):
        load(figured / "params.yaml", ["study_trajectory.seeds=[0, 0]"])


def test_a_change_of_nothing_is_drawn_all_the_same() -> None:
    plane = Plane.example("e", (1, 0, 0, 1), (0, 0, 0, 0))
    assert plane.ratio == 0 and share_of_rank(plane.values, 1) == 1
    assert not math.isnan(float(np.abs(plane.update).max()))


@pytest.mark.parametrize(
    "given_",
    [
        "finetune_lora.train_embeddings=new_rows",
        "finetune_lora.dora=true",
        "finetune_lora.quantization=nf4",
        "finetune_lora.target_modules=[layers.1.fc1]",
    ],
)
def test_other_adapters_are_drawn_as_well(project: Path, given_: str) -> None:
    from matplotlib.figure import Figure

    overrides = [*BRIEF, given_]
    manifest = make(project, ["finetune_lora"], overrides)
    job = job_of(project, overrides)
    for one in (finetuning_subspace.render(job), placement.render(job)):
        one.draw(Figure(figsize=one.size))
    (table_,) = placement.render(job).tables
    adapted = {row["module"] for row in table_.rows if row["trained"]}
    assert adapted == (
        {"fc1"} if "fc1" in given_ else {f"self_attn.{p}_proj" for p in ("q", "k", "v", "out")}
    )
    model = engine.load(project / "artifacts/expanded").model
    found = parameter_gradients(
        job, read_spec(project / "artifacts/lora_adapter", model.embedding_and_head[0])
    )
    assert (
        sum(row["parameters"] for row in found if row["has_grad"])
        == manifest["parameters"]["trainable"]
    )


@torch.no_grad()
def test_attention_is_that_of_transformers_and_every_row_sums_to_1(tmp_path: Path) -> None:
    base, ids = checkpoint(tmp_path / "base"), token_ids(74, 2, 11)
    ours = load_base(base).model
    theirs = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager").eval()
    expected = theirs(ids, output_attentions=True).attentions
    for layer in range(2):
        result = layer_attention(ours, ids, layer)
        torch.testing.assert_close(result, expected[layer], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(result.sum(-1), torch.ones(2, 4, 11))
        assert (result.triu(1) == 0).all()
