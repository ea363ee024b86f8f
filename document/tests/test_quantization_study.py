"""`lora study quantization`: its numbers are those of models that are rounded otherwise, and of
`lora calc`.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from lab.studies.quantization import calibrated
from lab.tables import Cell, Spread, read_table
from tests.lab_projects import BRIEF

from pipeline.data.examples import Example
from pipeline.data.formats import read_examples
from pipeline.inference import engine
from pipeline.inference.score import EvalScores, score
from pipeline.models.quantized_linear import quantizable
from pipeline.project.params.sections import Quantization
from tests.conftest import Built, Lora
from tests.helpers.projects import ROOT, make, refusal

STUDY = "artifacts/studies/quantization"


@pytest.fixture(scope="module")
def studied(brief: Path, built: Built) -> Path:
    """A base that was trained as the document's, and the study of it alone."""

    def build(root: Path) -> None:
        shutil.copytree(brief, root, dirs_exist_ok=True)
        make(root, ["pretrain", "study_quantization"], ["study_quantization.seeds=[0]"])

    return built("quantization", build)


def rows_of(root: Path, table: str) -> dict[str, dict[str, Cell]]:
    return {str(row["precision"]): row for row in read_table(root / f"{STUDY}/{table}.csv")}


def mean(cell: Cell) -> float:
    assert isinstance(cell, Spread)
    return cell


def sentences(root: Path) -> list[Example]:
    return read_examples(root / "data/pretrain.de.txt", "data/pretrain.de.txt")


def scored(root: Path, quantization: Quantization = "none") -> EvalScores:
    return score(engine.load(root / "artifacts/base", quantization=quantization), sentences(root))


def test_fp32_is_the_base_itself(studied: Path) -> None:
    row = rows_of(studied, "precisions")["FP32"]
    assert mean(row["perplexity"]) == pytest.approx(scored(studied).perplexity, rel=1e-5)
    assert (mean(row["error"]), mean(row["output_error"]), mean(row["kept"]), row["bits"]) == (
        0,
        0,
        1,
        32,
    )


@pytest.mark.parametrize(
    ("name", "kind"), [("NF4", "nf4"), ("NF4 double", "nf4-dq"), ("INT8", "int8")]
)
def test_what_bitsandbytes_keeps_has_the_same_perplexity(
    studied: Path, name: str, kind: Quantization
) -> None:
    pytest.importorskip("bitsandbytes")
    row, found, base = rows_of(studied, "precisions")[name], scored(studied, kind), scored(studied)
    assert mean(row["perplexity"]) == pytest.approx(
        found.perplexity, rel=2e-5 if kind != "int8" else 1e-3
    )
    assert mean(row["kept"]) == pytest.approx(
        float((found.choices == base.choices).double().mean())
    )


def test_16_bits_are_what_torch_makes_of_the_blocks_linears(studied: Path) -> None:
    base = engine.load(studied / "artifacts/base")
    with torch.no_grad():
        for name in quantizable(base.model):
            weight = base.model.get_submodule(name).weight
            assert isinstance(weight, torch.Tensor)
            weight.copy_(weight.bfloat16())
    row = rows_of(studied, "precisions")["BF16"]
    assert mean(row["perplexity"]) == pytest.approx(
        score(base, sentences(studied)).perplexity, rel=1e-5
    )


def test_fewer_bits_know_less_and_calibration_helps(studied: Path) -> None:
    rows = rows_of(studied, "precisions")
    rising = [
        mean(rows[name]["perplexity"])
        for name in ("FP32", "NF4", "3-bit nearest", "2-bit nearest", "ternary")
    ]
    assert rising == sorted(rising)
    for bits in ("INT4", "3-bit", "2-bit"):
        assert mean(rows[f"{bits} GPTQ"]["output_error"]) < mean(
            rows[f"{bits} nearest"]["output_error"]
        )
    assert mean(rows["INT4 AWQ"]["output_error"]) <= mean(rows["INT4 nearest"]["output_error"])


def test_the_gram_matrices_are_those_of_what_each_linear_reads(studied: Path) -> None:
    base = engine.load(studied / "artifacts/base")
    names = quantizable(base.model)
    _, grams = calibrated(
        base, sentences(studied), {name: base.model.get_submodule(name) for name in names}
    )
    read, first = list[torch.Tensor](), base.model.get_submodule(names[0])
    first.register_forward_pre_hook(lambda _module, inputs: read.append(inputs[0].flatten(0, -2)))
    score(base, sentences(studied))
    x = torch.cat(read).detach().double()
    torch.testing.assert_close(grams[names[0]], x.T @ x)
    assert all(not base.model.get_submodule(name)._forward_pre_hooks for name in names[1:])


def test_nf4_uses_its_levels_more_evenly_than_int4_on_normal_numbers_and_neither_equally(
    studied: Path,
) -> None:
    rows = rows_of(studied, "codes")
    nf4, even = (rows[name]["entropy"] for name in ("NF4", "INT4 nearest"))
    assert isinstance(nf4, float) and isinstance(even, float)
    assert even < nf4 < 4 and {row["best"] for row in rows.values()} == {4}
    report = (studied / STUDY / "report.md").read_text(encoding="utf-8")
    assert f"On normal numbers NF4 has {nf4:.2f}, INT4 {even:.2f}." in report


def test_sizes_are_the_calculators_beside_the_documents(studied: Path, cli: Lora) -> None:
    quoted = yaml.safe_load((ROOT / "document/data/document.yaml").read_text(encoding="utf-8"))[
        "quantization"
    ]
    rows = rows_of(studied, "sizes")
    told = [row["document_GB"] for row in rows.values() if row["document_GB"] is not None]
    assert told == [one["GB"] for one in quoted.values()]
    for name, precision in (("BF16", "bf16"), ("NF4 double", "nf4-dq"), ("2-bit nearest", "2bit")):
        out = cli("calc", "--model", "qwen3-8b", "--precision", precision, "--json", cwd=studied)[1]
        weights = json.loads(out)["memory"]["weights"]
        assert rows[name]["calculator_GB"] == pytest.approx(weights / 1e9, rel=1e-5)
        assert rows[name]["calculator_GiB"] == pytest.approx(weights / 2**30, rel=1e-5)


def test_another_seed_is_another_base_trained_alike(project: Path) -> None:
    make(project, ["study_quantization"], [*BRIEF, "study_quantization.seeds=[1]"])
    row = rows_of(project, "precisions")["FP32"]
    make(project, ["pretrain"], [*BRIEF, "pretrain.seed=1"])
    assert mean(row["perplexity"]) == pytest.approx(scored(project).perplexity, rel=1e-5)


def test_words_that_the_base_does_not_know_are_refused(cli: Lora, project: Path) -> None:
    brief = [f"--set={one}" for one in BRIEF]
    given = "--set=study_quantization.data=data/finetune.de.txt"
    assert "not in the vocabulary" in refusal(
        cli("study", "quantization", *brief, given, cwd=project)
    )
