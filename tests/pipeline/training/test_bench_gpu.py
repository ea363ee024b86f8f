"""`python -m bench gpu`, whose numbers need a GPU: all that it runs, at a toy's shapes on the
CPU.
"""

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import gpu
from bench.gpu import known_gpu, measure
from pipeline.calc.fit import gpus
from pipeline.models.generate import generate
from pipeline.stages.gpu_checks.lora_run import Case

CONFIG: dict[str, Any] = {
    "model_type": "qwen3",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
}
TOY = Case("toy", CONFIG, steps=2, batch=3, length=12)


@pytest.mark.parametrize(
    "case", [TOY, replace(TOY, quantization="nf4-dq", checkpointing=True)], ids=["lora", "qlora"]
)
@pytest.mark.sampled(2)
@pytest.mark.slow
def test_every_path_of_the_benchmark_runs_on_a_toy(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "ROUNDS", 1)
    monkeypatch.setattr(gpu, "NEW_TOKENS", 4)
    rows = list(measure(case, torch.device("cpu"), gpus()["h100"]))
    assert len(rows) == 5 and all(row.cells() for row in rows)
    peak, epoch, generation, beside_trl, _ = rows
    assert peak.ratio is not None and 0.8 < peak.ratio < 1.2, (
        "of a toy: scratch memory counts there"
    )
    assert "tokens/s" in epoch.what and "of H100 80 GB's peak" in epoch.what and epoch.ratio
    ours, theirs = (
        float(text.partition(" tokens/s")[0].split()[-1].replace(",", ""))
        for text in (epoch.what, epoch.reference)
    )
    assert epoch.ratio == pytest.approx(ours / theirs, rel=0.02)
    assert "model.generate" in generation.reference
    assert beside_trl.reference.startswith("TRL without padding, sdpa, ")


STAND_IN = """
import sys

assert not {"transformers", "peft", "trl"} & set(sys.modules), "Unsloth comes first"


class FastLanguageModel:
    def from_pretrained(model_name, max_seq_length, dtype, load_in_4bit):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(model_name, dtype=dtype)
        return model, AutoTokenizer.from_pretrained(model_name)

    def get_peft_model(model, use_gradient_checkpointing, **options):
        from peft import LoraConfig, get_peft_model

        return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options))
"""


@pytest.mark.slow
def test_unsloth_trains_in_a_process_where_it_is_imported_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "unsloth.py").write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    with gpu.unsloth(TOY, torch.device("cpu")) as side:
        assert side.epoch() > 0 and side.epoch() > 0


def test_utilization_is_the_flops_of_frozen_weights_over_the_cards_peak() -> None:
    case, card = replace(TOY, length=8), gpus()["h100"]
    ours = gpu.Ours(case, torch.device("cpu"))
    weights = sum(
        p.numel()
        for name, p in ours.model.named_parameters()
        if p.dim() == 2 and "lora" not in name
    )
    shortest = 4 * weights * ours.tokens / 989e12  # seconds at the card's peak
    share = float(ours.utilization(shortest, card).partition("%")[0])
    assert 100 <= share < 150, "attention's scores and the adapter come on top"
    assert float(ours.utilization(2 * shortest, card).partition("%")[0]) == pytest.approx(
        share / 2, abs=1
    )


def test_a_swap_is_all_of_an_adapter_and_generation_all_new_tokens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ours, made = gpu.Ours(TOY, torch.device("cpu")), list[object]()
    ours.other = [torch.full_like(tensor, 2.0) for tensor in ours.other]
    ours.swap()
    assert ours.other and all(bool((p == 2).all()) for p in ours.adapter())

    def counted(*arguments: Any) -> list[object]:
        made.extend(generate(*arguments))
        return made

    monkeypatch.setattr(gpu, "generate", counted)
    ours.generate()
    assert len(made) == gpu.NEW_TOKENS


def test_the_benchmark_says_that_there_is_no_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert list(gpu.gpu()) == [] and capsys.readouterr().out.count("\n") == 1


@pytest.mark.parametrize(
    ("driver", "gib", "name"),
    [
        ("NVIDIA H100 80GB HBM3", 79, "h100"),
        ("NVIDIA A100-SXM4-40GB", 39, "a100-40"),
        ("NVIDIA A100 80GB PCIe", 79, "a100-80"),
        ("NVIDIA GeForce RTX 4090", 24, "rtx4090"),
        ("Tesla T4", 15, "t4"),
        ("NVIDIA L4", 22, "l4"),
        ("NVIDIA L40S", 45, "l40s"),
        ("NVIDIA L40", 45, None),
        ("NVIDIA A10G", 22, "a10g"),
        ("Quadro P400", 2, None),
    ],
)
def test_a_card_is_known_by_its_drivers_name(driver: str, gib: float, name: str | None) -> None:
    card = known_gpu(driver, gib)
    assert (card and card.name) == name
