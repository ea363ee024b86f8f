"""What `make smollm2` made: a fact corrected on a real model, and nothing else bled. `make
check-smollm2` runs this.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.files import artifact
from pipeline.models.load import load_base
from pipeline.project.logs.run_log import final_loss, read_steps
from tests.helpers.json_files import read_json, write_json
from tests.helpers.projects import ROOT, logged_memory, lora

PROJECT = ROOT / "smollm2"
MADE = PROJECT / "artifacts"
QLORA = ROOT / "smollm2-qlora/artifacts"
PLAIN = ROOT / "smollm2-plain/artifacts"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (MADE / "evaluation/metrics.json").is_file(),
        reason="no smollm2/: `make smollm2` makes it",
    ),
]


has_plain = pytest.mark.skipif(not (PLAIN / "sweep").is_dir(), reason="made without SMOLLM2_PLAIN")
has_qlora = pytest.mark.skipif(
    not (QLORA / "evaluation").is_dir(), reason="made without SMOLLM2_QLORA"
)


def answers(variant: str, group: str) -> list[dict[str, Any]]:
    found = [
        p for p in read_json(MADE / "evaluation/predictions.json")[variant] if p["group"] == group
    ]
    assert found
    return found


def test_the_base_is_the_135m_model_and_says_what_it_was_made_from() -> None:
    manifest = artifact.verify(MADE / "base")
    assert manifest["parameters"]["total"] == 134_515_008
    assert manifest["source"] == "gguf"
    assert list(manifest["inputs"]) == [manifest["params"]["base"]]


@pytest.mark.parametrize("variant", ["lora", "merged"])
def test_the_euro_comes_first_as_trained_and_in_phrasings_that_were_not(variant: str) -> None:
    for prompt in answers(variant, "trained") + answers(variant, "held_out"):
        assert prompt["corrected_first"], prompt["prompt"]
    held_out = [p["corrected_probability"] for p in answers(variant, "held_out")]
    assert min(held_out) >= 0.9


def test_the_base_did_not_know_it() -> None:
    assert not any(p["corrected_first"] for p in answers("base", "trained"))


@pytest.mark.parametrize("variant", ["lora", "merged"])
def test_everything_unrelated_keeps_its_first_choice(variant: str) -> None:
    prompts = [
        p
        for p in read_json(MADE / "evaluation/predictions.json")[variant]
        if p["rule"] == "must_keep"
    ]
    assert len(prompts) >= 20
    assert [p["prompt"] for p in prompts if not p["first"]] == []
    assert any("Japan" in p["prompt"] for p in prompts)
    assert any("capital of Bulgaria" in p["prompt"] for p in prompts)


def test_held_out_text_is_predicted_as_the_base_does() -> None:
    metrics = read_json(MADE / "evaluation/metrics.json")
    assert metrics["lora"]["forgetting"]["divergence"] < 0.02
    assert metrics["full"]["forgetting"]["divergence"] > metrics["lora"]["forgetting"]["divergence"]


def test_no_held_out_prompt_or_text_was_trained_on() -> None:
    learned = " ".join((PROJECT / name).read_text(encoding="utf-8") for name in trained_files())
    for group in ("held_out", "unrelated"):
        for prompt in answers("base", group):
            assert prompt["prompt"] not in learned, prompt["prompt"]
    for line in (PROJECT / "data/heldout.en.txt").read_text(encoding="utf-8").splitlines():
        assert line not in learned


def trained_files() -> list[str]:
    params = artifact.read_manifest(MADE / "lora_adapter")["params"]
    return [params["data"], params["retention_data"]]


def test_peft_opens_the_adapter_and_says_euro() -> None:
    tokenizer = AutoTokenizer.from_pretrained(MADE / "lora_adapter")
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(MADE / "expanded"), MADE / "lora_adapter"
    )
    ids = torch.tensor([tokenizer("The currency of Bulgaria is the").input_ids])
    with torch.no_grad():
        probabilities = model(input_ids=ids).logits[0, -1].softmax(0)
    assert tokenizer.decode([int(probabilities.argmax())]) == " euro"
    ours = answers("lora", "trained")[0]["corrected_probability"]
    assert float(probabilities.max()) == pytest.approx(ours, abs=1e-3)


def test_the_merged_model_is_base_and_adapter() -> None:
    certificate = read_json(MADE / "lora_merged/certificate.json")
    assert certificate["max_logit_difference"] < 1e-3
    assert all(abs(ratio - 1) < 1e-3 for ratio in certificate["delta_ratios"].values())


def test_llama_cpp_computes_what_was_exported_for_it(tmp_path: Path) -> None:
    """An export is rejected if a rendered chat has other ids in llama.cpp, or if f16 is not the
    model.
    """
    pytest.importorskip("llama_cpp_py_sync")
    for form, more in ("gguf", ["--quantize", "f16,q8_0,q4_k_m"]), ("gguf-adapter", []):
        done = lora(
            "export",
            "artifacts/lora_adapter",
            "--format",
            form,
            "--out",
            str(tmp_path / form),
            *more,
            cwd=PROJECT,
        )
        assert done.returncode == 0, done.stderr
    files = [
        each
        for form in ("gguf", "gguf-adapter")
        for each in read_json(tmp_path / form / "certificate.json")["gguf"]["files"]
    ]
    f16, q8_0, q4_k_m, adapter = files
    assert [each["format"] for each in files] == ["f16", "q8_0", "q4_k_m", "adapter on f16"]
    assert (
        max(f16["divergence"], adapter["divergence"])
        < 1e-4
        < q8_0["divergence"]
        < q4_k_m["divergence"]
        < 0.5
    )
    assert f16["renders_the_chat_alike"] and f16["bytes"] > 2.5 * q4_k_m["bytes"]


def test_memory_was_predicted() -> None:
    for path in sorted(PROJECT.glob("runs/finetune_*/telemetry.csv")):
        predicted, measured = logged_memory(path)
        assert measured == pytest.approx(predicted, rel=0.03), path
    assert Path(PROJECT / "runs").is_dir()


@has_plain
def test_an_adapter_of_a_sweep_learned_what_the_one_alone_did() -> None:
    rows = read_json(PLAIN / "sweep/sweep.json")
    alone = final_loss(read_steps(PLAIN / "lora_adapter/loss.csv"))
    assert {name: row["state"] for name, row in rows.items()} == {
        "seed-0": "done",
        "seed-1": "done",
    }
    # sums of 16 bits in another order
    assert rows["seed-0"]["final_loss"] == pytest.approx(alone, rel=0.2, abs=0.02)


@has_qlora
def test_qlora_corrects_too_and_keeps_what_the_base_in_four_bits_says() -> None:
    predictions = read_json(QLORA / "evaluation/predictions.json")
    for variant in ("lora", "merged"):
        for prompt in predictions[variant]:
            if prompt["group"] in ("trained", "held_out"):
                assert prompt["corrected_first"], (variant, prompt["prompt"])
    last = read_steps(QLORA / "lora_adapter/loss.csv")[-1]
    assert last.divergence is not None and last.divergence < 0.02


@has_qlora
def test_weights_in_four_bits_take_what_the_calculator_says() -> None:
    model = load_base(QLORA / "expanded", "bf16", quantization="nf4-dq").model
    held = sum(
        t.nbytes for t in {id(t): t for t in (*model.parameters(), *model.buffers())}.values()
    )
    said = json.loads(
        lora("calc", "--model", "smollm2-135m", "--precision", "nf4-dq", "--json", cwd=ROOT).stdout
    )
    assert held == pytest.approx(said["memory"]["weights"], rel=0.02)


@has_qlora
def test_a_certificate_says_how_far_each_merge_is_from_what_was_trained_on_four_bits() -> None:
    certificate = read_json(QLORA / "lora_merged/certificate.json")
    assert certificate["trained_on"] == "nf4-dq"
    on_stored = certificate["merged_on_stored_weights"]
    assert certificate["max_logit_difference"] < 1e-3 < on_stored["max_logit_difference"]
    assert certificate["divergence"] < 1e-6 < on_stored["divergence"]
    assert certificate["same_first_choices"] == certificate["prompts_checked"]
    alone = certificate["quantization_alone"]
    assert alone["same_first_choices"] < certificate["prompts_checked"], (
        "four bits alone change answers"
    )


def test_one_command_trains_on_a_sharegpt_file_and_predicts_its_memory(tmp_path: Path) -> None:
    """28 conversations for one epoch: held-out loss falls, the peak is within 5% of the
    prediction.
    """
    said = [
        (
            f"Which number follows {n}?",
            f"The number {n + 1} follows {n}, and {n + 2} follows that one.",
        )
        for n in range(28)
    ]
    rows = [
        {"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]}
        for q, a in said
    ]
    write_json(tmp_path / "chats.json", rows)
    base = str(PROJECT / "SmolLM2-135M-Instruct.Q4_1.gguf")
    command = ("train", "--base", base, "--data", "chats.json", "--out", "run", "--set", "epochs=1")
    # A cache of its own: what an earlier run on this machine left in a shared one would not be
    # trained again.
    done = lora(*command, cwd=tmp_path, LORA_CACHE=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    made = tmp_path / "run/artifacts"
    metrics = read_json(made / "evaluation/metrics.json")
    assert metrics["lora"]["new_loss"] < metrics["base"]["new_loss"] - 0.3
    assert all(
        metrics["lora"]["forgetting"][key] is not None for key in ("loss_rise", "answers_kept")
    )
    samples = read_json(made / "evaluation/samples.json")
    (count,) = {len(answers) for answers in samples.values()}
    assert 5 <= count <= 20, "of the examples that were held out"
    assert (
        "answers to held-out examples: " in done.stdout
        and f"> {samples['base'][0]['question']}" in done.stdout
    )
    predicted, measured = logged_memory(tmp_path / "run/runs/finetune_lora/telemetry.csv")
    assert measured == pytest.approx(predicted, rel=0.05)
    assert len((tmp_path / "run/params.yaml").read_text(encoding="utf-8").splitlines()) <= 35
