"""What `make smollm2` made of preferences on a real model, and TRL's losses on it. `make
check-smollm2` runs this.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.adapters.attach import adapter_layers, attach
from pipeline.adapters.config import AdapterSpec
from pipeline.data.examples import IGNORED, Window
from pipeline.models.transformers_model import load_pretrained
from tests.helpers.json_files import read_json
from tests.helpers.projects import ROOT, lora
from tests.helpers.trl import CASES, compared

PROJECT = ROOT / "smollm2-preferences"
MADE = PROJECT / "artifacts"
PAIRS = "data/concise.en.jsonl"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (MADE / "evaluation/metrics.json").is_file(),
        reason="no smollm2-preferences/: `make smollm2` makes it",
    ),
]


def metrics(made: Path = MADE) -> dict[str, Any]:
    value: dict[str, Any] = read_json(made / "evaluation/metrics.json")
    return value


def sequences(count: int) -> list[Window]:
    """The first pairs, chosen and rejected in turn."""
    tokenizer, windows = AutoTokenizer.from_pretrained(MADE / "base"), []
    for line in (ROOT / PAIRS).read_text(encoding="utf-8").splitlines()[:count]:
        row = json.loads(line)
        asked = tokenizer.apply_chat_template(
            row["prompt"], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        for answer in ("chosen", "rejected"):
            ids = [*asked, *tokenizer(row[answer][0]["content"]).input_ids]
            windows.append(
                Window(0, tuple(ids[:-1]), (IGNORED,) * (len(asked) - 1) + tuple(ids[len(asked) :]))
            )
    return windows


@pytest.mark.parametrize("case", CASES)
def test_losses_rewards_and_gradients_are_trls(tmp_path: Path, case: str) -> None:
    """In fp32, whose rounding 30 blocks add up: gradients are compared as one vector."""
    plain = AutoModelForCausalLM.from_pretrained(
        MADE / "base", dtype=torch.float32, attn_implementation="eager"
    )
    ours, spec = (
        load_pretrained(MADE / "base", torch.float32),
        AdapterSpec(4, 8.0, ("q_proj", "v_proj")),
    )
    attach(ours, spec, torch.float32)
    generator = torch.Generator().manual_seed(0)
    for _, layer in adapter_layers(ours):
        for weight in (layer.lora_A, layer.lora_B):
            torch.nn.init.normal_(weight, std=0.02, generator=generator)
    found = compared(ours, plain, spec, sequences(3), case, tmp_path)
    torch.testing.assert_close(*found.losses, atol=1e-5, rtol=1e-5)
    for mine, wanted in found.rewards:
        assert mine == pytest.approx(wanted, rel=1e-5, abs=1e-5)
    gradient, theirs = (
        torch.cat([pair[side].flatten() for pair in found.gradients.values()]) for side in (0, 1)
    )
    assert (gradient - theirs).norm() < 1e-3 * theirs.norm()


def test_the_concise_answer_is_preferred_of_pairs_that_were_held_out_and_little_is_forgotten() -> (
    None
):
    found = metrics()["dpo"]
    before, after = (found["preferences"][when] for when in ("before", "after"))
    assert before["accuracy"] <= 0.4 and before["margin"] < 0
    assert after["accuracy"] >= 0.8 and after["margin"] > 0.5
    assert found["forgetting"]["divergence"] < 0.06 and found["forgetting"]["answers_kept"] > 0.85
    assert metrics()["gate"]["passed"]


def test_answers_become_shorter() -> None:
    samples = read_json(MADE / "evaluation/samples.json")
    base, trained = (
        sum(len(sample["answer"]) for sample in samples[name]) for name in ("base", "dpo")
    )
    assert trained < base


def test_the_gate_refuses_one_that_is_overtrained_though_it_prefers_better(tmp_path: Path) -> None:
    project = tmp_path / "overtrained"
    shutil.copytree(
        PROJECT, project, ignore=shutil.ignore_patterns("runs", "dpo_adapter", "evaluation")
    )
    rate = ("--set", "finetune_dpo.learning_rate=0.01")
    trained = lora("finetune", "dpo", *rate, cwd=project)
    assert trained.returncode == 0, trained.stderr
    done = lora("evaluate", *rate, cwd=project)
    assert done.returncode == 1
    found = metrics(project / "artifacts")
    assert (
        found["dpo"]["preferences"]["after"]["accuracy"]
        >= metrics()["dpo"]["preferences"]["after"]["accuracy"]
    )
    assert {one["limit"] for one in found["gate"]["broken"]} == {"divergence", "answers_kept"}
    assert "divergence" in done.stdout + done.stderr
