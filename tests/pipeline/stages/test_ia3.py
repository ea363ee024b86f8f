"""(IA)³: one file of the registry, and all that a method can do; its numbers are PEFT's."""

import json
from pathlib import Path

import pytest
import torch
from peft import IA3Config, get_peft_model
from torch.testing import assert_close

from pipeline.calc.families import architecture
from pipeline.calc.method import trainable
from pipeline.errors import UserError
from pipeline.files.artifact import read_manifest
from pipeline.inference.engine import load, next_probabilities
from pipeline.stages.methods.ia3 import COUNTED
from pipeline.views.models import describe
from tests.conftest import Lora
from tests.helpers.json_files import read_json, write_json
from tests.helpers.projects import BRIEF, folder_bytes, logged_memory, make, refusal
from tests.helpers.side_by_side import theirs

GIVEN = [*BRIEF, "finetune_ia3.epochs=3"]
TEXT = "die katze sitzt auf dem"


@pytest.fixture
def tuned(project: Path) -> Path:
    """A project with a section of the method, trained."""
    params = project / "params.yaml"
    params.write_text(
        f"{params.read_text(encoding='utf-8')}\nfinetune_ia3:\n  epochs: 3\n", encoding="utf-8"
    )
    make(project, ["finetune_ia3"], GIVEN)
    return project


@pytest.mark.parametrize(
    "settings",
    [
        [],
        ["target_modules=[attention]"],  # a group of ours, which PEFT does not know
        ["target_modules=[layers.0.fc2, o_proj]", "feedforward_modules=[layers.1.fc2]"],
        ["target_modules=[fc2]", "feedforward_modules=[]"],
    ],
)
def test_peft_opens_it_and_says_the_same(tuned: Path, settings: list[str]) -> None:
    if settings:
        make(
            tuned, ["finetune_ia3"], [*GIVEN, *(f"finetune_ia3.{setting}" for setting in settings)]
        )
    base, adapter = tuned / "artifacts/expanded", tuned / "artifacts/ia3_adapter"
    ours = load(base, adapter)
    model = theirs(base, adapter)
    ids = torch.tensor([ours.tokenizer.encode(TEXT)])
    assert_close(
        next_probabilities(ours, TEXT), model(ids).logits[0, -1].softmax(-1), rtol=1e-5, atol=1e-6
    )
    before = next_probabilities(load(base), TEXT)
    assert (next_probabilities(ours, TEXT) - before).abs().max() > 1e-4, "it was trained"


def test_it_opens_peft_s(tuned: Path, tmp_path: Path) -> None:
    base = tuned / "artifacts/expanded"
    config = IA3Config(
        target_modules=["k_proj", "v_proj", "fc2"],
        feedforward_modules=["fc2"],
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(theirs(base), config)
    torch.manual_seed(0)
    for name, p in model.named_parameters():
        if "ia3_l" in name:
            p.data += 0.3 * torch.randn_like(p)
    model.save_pretrained(tmp_path / "peft")
    ours = load(base, tmp_path / "peft")
    ids = torch.tensor([ours.tokenizer.encode(TEXT)])
    assert_close(
        next_probabilities(ours, TEXT), model(ids).logits[0, -1].softmax(-1), rtol=1e-5, atol=1e-6
    )


def test_the_calculator_counts_what_trains(tuned: Path) -> None:
    base = tuned / "artifacts/expanded"
    config = read_json(base / "config.json")
    parameters = read_manifest(tuned / "artifacts/ia3_adapter")["parameters"]
    peft = get_peft_model(
        theirs(base),
        IA3Config(target_modules=["k_proj", "v_proj", "fc2"], feedforward_modules=["fc2"]),
    )
    assert parameters["trainable"] == peft.get_nb_trainable_parameters()[0] == 2 * (64 + 64 + 256)
    assert trainable(architecture(config, "MiniGPT"), COUNTED) == parameters["trainable"]


@pytest.mark.parametrize(
    "settings",
    [
        [],
        ["batch_size=16", "window=0"],
        ["batch_size=16", "window=0", "gradient_checkpointing=full"],
        ["precision=bf16", "adapter_precision=bf16"],
    ],
)
def test_its_memory_is_predicted(tuned: Path, settings: list[str]) -> None:
    make(
        tuned,
        ["finetune_ia3"],
        [*GIVEN, "finetune_ia3.seed=1", *(f"finetune_ia3.{each}" for each in settings)],
    )
    predicted, measured = logged_memory(tuned / "runs/finetune_ia3/telemetry.csv")
    assert measured == pytest.approx(predicted, rel=0.035)


@pytest.mark.slow
def test_it_is_compared_listed_and_asked_and_what_needs_a_lora_refuses_it(
    tuned: Path, cli: Lora
) -> None:
    make(tuned, ["evaluate"], GIVEN)
    metrics = read_json(tuned / "artifacts/evaluation/metrics.json")
    assert metrics["ia3"]["trainable"] == 768
    assert "| (IA)³ |" in (tuned / "artifacts/evaluation/report.md").read_text(encoding="utf-8")
    assert describe(tuned / "artifacts/ia3_adapter").method == "ia3"
    code, out, _ = cli("prompt", TEXT, "--adapter", "artifacts/ia3_adapter", "--json", cwd=tuned)
    assert code == 0 and json.loads(out)["top_k"]
    assert cli("adapters", "verify", "artifacts/ia3_adapter", cwd=tuned)[0] == 0
    before = folder_bytes(tuned / "artifacts")
    for command in (
        ("merge", "--adapter", "artifacts/ia3_adapter", "--out", "merged"),
        ("export", "artifacts/ia3_adapter", "--format", "vllm", "--out", "vllm"),
    ):
        assert "only LoRA can be merged" in refusal(cli(*command, cwd=tuned))
    assert folder_bytes(tuned / "artifacts") == before


def test_a_resumed_run_has_the_bytes_of_an_unbroken_one(tuned: Path) -> None:
    whole = folder_bytes(tuned / "artifacts/ia3_adapter")
    make(tuned, ["finetune_ia3"], GIVEN, force=True)
    assert folder_bytes(tuned / "artifacts/ia3_adapter") == whole


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("target_modules=[w_proj]", "target_modules: 'w_proj' matches no linear layer"),
        ("feedforward_modules=[k_proj]", r"both match .*layers.0.self_attn.k_proj"),
    ],
)
def test_a_wrong_target_is_one_message(tuned: Path, setting: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make(tuned, ["finetune_ia3"], [*GIVEN, f"finetune_ia3.{setting}"])


def test_a_file_that_does_not_fit_its_config_is_refused(tuned: Path, tmp_path: Path) -> None:
    base, adapter = tuned / "artifacts/expanded", tmp_path / "other"
    adapter.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (adapter / name).write_bytes((tuned / "artifacts/ia3_adapter" / name).read_bytes())
    config = read_json(adapter / "adapter_config.json")
    for change, message in (
        ({"feedforward_modules": []}, "shape"),
        ({"target_modules": ["k_proj"], "feedforward_modules": []}, "ia3_l"),
        ({"target_modules": ".*k_proj"}, "ia3_l"),
    ):
        write_json(adapter / "adapter_config.json", {**config, **change})
        with pytest.raises(UserError, match=message):
            load(base, adapter)
