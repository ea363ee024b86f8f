"""`lora spectrum`: its output, files and errors."""

import csv
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pipeline.adapters.config import AdapterSpec
from pipeline.data.tokenizers.word import WordTokenizer
from pipeline.errors import UserError
from pipeline.files.safetensors_file import shapes
from tests.conftest import Lora
from tests.helpers.checkpoints import WORDS, adapter, checkpoint
from tests.helpers.projects import LORA, lora, refusal
from tests.helpers.side_by_side import BATCH, logits, ours, theirs
from tests.helpers.stored_models import tuned_from
from tests.helpers.tokenizers import folder_with


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A base, a fine-tuned copy, and an adapter on it."""
    base = checkpoint(tmp_path / "base")
    tuned_from(base, tmp_path / "tuned", 3, vectors=True)
    adapter(tmp_path / "adapter", base, AdapterSpec(2, 2.0, ("v_proj",), saved=("lm_head",)))
    (tmp_path / "some.txt").write_text("".join(f"{' '.join(WORDS[i : i + 5])}\n" for i in range(9)))
    return tmp_path


@pytest.mark.slow
def test_the_table_fits_80_columns_and_names_what_low_rank_does_not_carry(models: Path) -> None:
    output = lora("spectrum", "base", "tuned", cwd=models, COLUMNS="80")
    assert (output.returncode, output.stderr) == (0, "")
    head, *lines = output.stdout.splitlines()
    assert head.split() == ["matrix", "‖Δ‖/‖W‖", "1", "2", "4", "8", "16", "64", "stable", "90%"]
    table = [line for line in lines if line.startswith(("0.", "1.", "lm_head", "embed_tokens"))]
    assert len(table) == 14 and max(map(len, table)) <= 80
    assert all(line.split()[4:8] == ["100%"] * 4 for line in table)  # rank 3
    assert "22 other tensors, norms and biases for the most part, changed too" in output.stdout
    assert "Unchanged: embed_positions." in output.stdout


def test_json_and_csv_hold_the_same_numbers_and_those_are_numpys(cli: Lora, models: Path) -> None:
    code, out, err = cli("spectrum", "base", "tuned", "--json", cwd=models)
    assert (code, err) == (0, "")
    tensors = {one["name"]: one for one in json.loads(out)["tensors"]}
    name = "model.decoder.layers.1.fc2.weight"
    old, new = (
        load_file(models / folder / "model.safetensors")[name].double()
        for folder in ("base", "tuned")
    )
    values = np.linalg.svd((new - old).numpy(), compute_uv=False)
    assert tensors[name]["shape"] == list(old.shape)
    assert tensors[name]["values"][:3] == pytest.approx(values[:3].tolist())
    assert tensors[name]["energy"]["2"] == pytest.approx(
        (values[:2] ** 2).sum() / (values**2).sum()
    )
    code, out, err = cli("spectrum", "base", "tuned", "--csv", cwd=models)
    rows = {row["name"]: row for row in csv.DictReader(io.StringIO(out))}
    assert (code, err, rows.keys()) == (0, "", tensors.keys())
    for key, row in rows.items():
        assert float(row["relative"] or -1) == pytest.approx(
            -1 if tensors[key]["relative"] is None else tensors[key]["relative"], rel=1e-5
        )
    assert float(rows[name]["energy_2"]) == pytest.approx(tensors[name]["energy"]["2"], rel=1e-5)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
def test_the_extracted_adapter_is_verified_asked_and_opened_by_peft(
    cli: Lora, models: Path
) -> None:
    arguments = ["base", "tuned", "--rank", "2", "--out", "lora", "--data", "some.txt", "--json"]
    code, out, _ = cli("spectrum", *arguments, cwd=models)
    result = json.loads(out)
    assert code == 0 and result["extracted"]["rank"] == 2
    assert {"model.decoder.final_layer_norm.bias"} <= {*result["extracted"]["left_out"]}
    assert result["quality"]["tuned"]["as_tuned"] == 1
    assert result["quality"]["base"]["as_tuned"] < result["quality"]["base + LoRA"]["as_tuned"] <= 1
    code, output, _ = cli("adapters", "verify", "lora", cwd=models)
    assert code == 0 and "files, names, shapes and base are those it was trained with" in output
    assert cli("prompt", WORDS[1], "--adapter", "lora", cwd=models)[0] == 0
    here, there = (
        logits(opened(models / "base", models / "lora"), BATCH) for opened in (ours, theirs)
    )
    torch.testing.assert_close(here, there, atol=1e-5, rtol=1e-4)
    (models / "base" / "model.safetensors").write_bytes(
        (models / "tuned" / "model.safetensors").read_bytes()
    )
    for command in (["adapters", "verify", "lora"], ["spectrum", "base", "lora"]):
        assert "was trained on another base" in refusal(cli(*command, cwd=models))


def test_the_table_is_shown_before_models_are_asked(
    cli: Lora, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise UserError("No room.")

    monkeypatch.setattr("pipeline.inference.score.quality", fail)
    arguments = ["base", "tuned", "--rank", "2", "--out", "lora", "--data", "some.txt"]
    code, out, err = cli("spectrum", *arguments, cwd=models)
    assert (code, err) == (1, "error: No room.\n")
    assert "0.self_attn.q_proj" in out and "12 matrices at rank 2" in out


def test_what_is_left_out_is_listed_and_embeddings_are_optional(cli: Lora, models: Path) -> None:
    asked = ["spectrum", "base", "tuned", "--rank", "2", "--out", "lora"]
    _, out, _ = cli(*asked, cwd=models)
    assert "In full: lm_head, embed_tokens." in out and "Left out: final_layer_norm.bias" in out
    kept = shapes(models / "lora/adapter_model.safetensors")
    assert {
        "base_model.model.lm_head.weight",
        "base_model.model.model.decoder.embed_tokens.weight",
    } <= kept.keys()
    _, out, _ = cli(*asked, "--embeddings", "none", cwd=models)
    assert "In full" not in out and "Left out: lm_head, embed_tokens, " in out
    assert all(".lora_" in name for name in shapes(models / "lora/adapter_model.safetensors"))
    _, out, _ = cli("spectrum", "base", "tuned", "--rank", "900", "--out", "lora", cwd=models)
    assert "12 matrices at rank 64" in out


def test_for_wide_matrices_the_number_of_computed_values_is_shown(cli: Lora, models: Path) -> None:
    base = checkpoint(models / "wide", d_model=160, layers=1, feed_forward=1100)
    tuned_from(base, models / "tuned_wide", 3)
    _, out, _ = cli("spectrum", "wide", "tuned_wide", cwd=models)
    assert "Of 1 wide matrix the 64 largest values come" in out
    _, out, _ = cli("spectrum", "wide", "tuned_wide", "--rank", "100", "--out", "lora", cwd=models)
    assert "Of 1 wide matrix the 100 largest values come" in out


def test_an_adapter_is_set_beside_its_bases_weights(cli: Lora, models: Path) -> None:
    code, out, err = cli("spectrum", "base", "adapter", cwd=models)
    assert (code, err) == (0, "")
    assert [line.split()[0] for line in out.splitlines()[1:4]] == [
        "0.self_attn.v_proj",
        "1.self_attn.v_proj",
        "lm_head",
    ]


def test_for_dora_a_note_says_that_magnitudes_are_not_included(cli: Lora, models: Path) -> None:
    adapter(models / "dora", models / "base", AdapterSpec(2, 2.0, ("v_proj", "fc1"), dora=True))
    code, out, err = cli("spectrum", "base", "dora", cwd=models)
    assert (code, err) == (0, "")
    assert len([line for line in out.splitlines() if line.startswith(("0.", "1."))]) == 4
    assert "Not included: the magnitudes of DoRA, as the spectra are of s·BA alone." in out


@pytest.mark.filterwarnings("ignore")
def test_an_embeddings_lora_is_read_with_the_copy_of_the_base_that_peft_puts_beside_it(
    cli: Lora, models: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(models / "base")
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=3,
        target_modules=["q_proj", "embed_tokens"],
        init_lora_weights=False,
    )
    get_peft_model(model, config).save_pretrained(models / "peft", save_embedding_layers=True)
    assert any(".base_layer." in name for name in shapes(models / "peft/adapter_model.safetensors"))
    code, out, err = cli("spectrum", "base", "peft", "--json", cwd=models)
    assert (code, err) == (0, "")
    assert [len(one["values"]) for one in json.loads(out)["tensors"]] == [3, 3, 3]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ("base nowhere", "nowhere is not a folder"),
        ("nowhere base", "nowhere is not a folder"),
        ("adapter base", "adapter is an adapter"),
        ("base empty", "empty has no model.safetensors"),
        ("base wider", "lm_head.weight has shape [74, 64] in base and [74, 32] in wider"),
        ("base cut", "damaged or truncated"),
        ("base endless", "lm_head.weight has values that are not finite"),
        ("base tuned --rank 2", "--rank and --out must be used together"),
        ("base tuned --out x", "--rank and --out must be used together"),
        ("base tuned --data some.txt", "Add --rank and --out"),
        ("base tuned --json --csv", "exclude each other"),
        ("base tuned --rank 2 --out x --data some.txt --csv", "Use --json"),
        (
            "base others --rank 2 --out x --data some.txt",
            "some.txt:1: base and others must tokenize it identically, but differ in token 1 of 6 "
            "and 6",
        ),
        (
            "base longer --rank 2 --out x --data some.txt",
            "some.txt:1: base and longer must tokenize it identically, but differ in token 1 of 6 "
            "and 15",
        ),
        ("base base --rank 2 --out x", "nothing to extract"),
        ("base adapter --rank 2 --out x", "is an adapter already"),
        ("base tuned --rank 2 --out tuned", "Name another folder"),
        ("base tuned --rank 2 --out empty/..", "contain one another"),
        ("base tuned --rank 2 --out x --data nothing.txt", "nothing.txt"),
        ("wider adapter", "Name the model that it was trained on"),
    ],
)
def test_each_wrong_request_is_one_message(
    cli: Lora, models: Path, arguments: str, reason: str
) -> None:
    (models / "empty").mkdir()
    checkpoint(models / "wider", d_model=32)
    shutil.copytree(models / "base", models / "cut")
    whole = (models / "base/model.safetensors").read_bytes()
    (models / "cut/model.safetensors").write_bytes(whole[:-9])
    shutil.copytree(models / "base", models / "endless")
    endless = load_file(models / "base/model.safetensors") | {
        "lm_head.weight": torch.full((74, 64), torch.inf)
    }
    save_file(endless, models / "endless/model.safetensors")
    for name in ("others", "longer"):
        shutil.copytree(models / "tuned", models / name)
    WordTokenizer.of_words(WORDS[::-1]).save(models / "others", 32)
    folder_with(models / "longer")
    assert reason in refusal(cli("spectrum", *arguments.split(), cwd=models))
    assert not (models / "x").exists()


def test_what_a_terminal_would_obey_is_shown_in_names(cli: Lora, models: Path) -> None:
    for folder in ("base", "tuned"):
        weights = load_file(models / folder / "model.safetensors")
        weights["lm_\x1b[31mhead"] = torch.full((4, 4), float(len(folder)))
        save_file(weights, models / folder / "model.safetensors")
    for form in ([], ["--csv"], ["--json"]):
        code, out, err = cli("spectrum", "base", "tuned", *form, cwd=models)
        assert (code, err) == (0, "")
        assert "\x1b" not in out and "[31mhead" in out


def test_tensors_of_only_one_checkpoint_are_listed_as_not_included(cli: Lora, models: Path) -> None:
    shutil.copytree(models / "base", models / "fewer")
    weights = load_file(models / "base/model.safetensors")
    for name in ("fc1.bias", "fc2.bias"):
        del weights[f"model.decoder.layers.1.{name}"]
    save_file(weights, models / "fewer/model.safetensors")
    for pair in (("fewer", "tuned"), ("tuned", "fewer")):
        code, out, err = cli("spectrum", *pair, cwd=models)
        assert (code, err) == (0, "")
        assert "Not included: model.decoder.layers.1.fc1.bias and 1 more, missing in fewer." in out


def test_equal_checkpoints_differ_in_nothing(cli: Lora, models: Path) -> None:
    assert cli("spectrum", "base", "base", cwd=models) == (0, "No tensor differs.\n", "")


MEASURED = """
import resource, subprocess, sys
code = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024))
sys.exit(code)
"""


def write_two(root: Path, count: int, side: int) -> int:
    """Write a base and a tuned copy of `count` square matrices each. Returns the bytes of one
    checkpoint.
    """
    numbers = torch.randint(0, 2**14, (count, side * side), dtype=torch.int16).view(torch.bfloat16)
    for name in ("base", "tuned"):
        (root / name).mkdir()
        numbers[5, ::7] = 1.0 if name == "tuned" else 2.0
        weights = {f"blocks.{i}.w.weight": one.view(side, side) for i, one in enumerate(numbers)}
        save_file(weights, root / name / "model.safetensors")
    return (root / "base/model.safetensors").stat().st_size


@pytest.mark.slow
def test_two_checkpoints_of_half_a_gigabyte_are_compared_in_less_memory_than_one_takes(
    tmp_path: Path,
) -> None:
    size = write_two(tmp_path, 64, 2048)
    command = [sys.executable, "-c", MEASURED, LORA, "spectrum", "base", "tuned"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    shutil.rmtree(tmp_path)  # pytest keeps the folders of its last runs
    assert int(done.stdout) < 0.8 * size


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="only Linux forgets a process's peak"
)
@pytest.mark.slow
def test_two_checkpoints_are_compared_in_little_more_memory_than_before(
    cli: Lora, tmp_path: Path
) -> None:
    size = write_two(tmp_path, 64, 1024)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what is resident now
    before = peak()
    assert cli("spectrum", "base", "tuned", cwd=tmp_path)[0] == 0
    assert peak() - before < 0.8 * size


def peak() -> int:
    """Peak resident memory of this process, in bytes."""
    (line,) = [
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmHWM")
    ]
    return int(line.split()[1]) * 1024
