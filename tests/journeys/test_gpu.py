"""On a CUDA GPU, where there is one: the same numbers as on the CPU, and the memory that the
calculator says.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.adapters.attach import add_lora, resolve
from pipeline.adapters.config import AdapterSpec
from pipeline.calc.families import architecture
from pipeline.calc.memory import predict
from pipeline.calc.settings import TrainingConfig
from pipeline.calc.sources.open_model import entry
from pipeline.data.examples import Window
from pipeline.models.generate import generate
from pipeline.models.load import load_base
from pipeline.models.transformers_model import TransformersModel, from_config
from pipeline.stages.methods.lora import Lora
from pipeline.training.batches import Batch, collate
from pipeline.training.losses import chunk_of, fuses_head
from pipeline.training.optimizer import FlatOptimizer
from pipeline.training.step import loss_of
from pipeline.training.task import prepare_model
from tests.helpers.bases import FAMILIES, toy_checkpoint

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")
LENGTHS = (5, 11, 3, 17)


def batch() -> Batch:
    """Sequences of four lengths, half of their tokens learned."""
    rows = [[(7 * i + 3 * n) % 200 + 5 for i in range(n + 1)] for n in LENGTHS]
    return collate(
        [
            Window(0, tuple(r[:-1]), tuple(t if i % 2 else -100 for i, t in enumerate(r[1:])))
            for r in rows
        ]
    )


@pytest.mark.parametrize("family", [*FAMILIES, "gemma3_text"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_packed_step_is_the_cpus(tmp_path: Path, family: str, precision: str) -> None:
    settings: dict[str, Any] = FAMILIES["gemma"] if family == "gemma3_text" else {}
    toy_checkpoint(tmp_path, family, **settings)
    found = {}
    for device in ("cpu", "cuda"):
        model = load_base(tmp_path, precision).model.to(device)
        assert model.supports_packing
        loss = loss_of(model, batch().to(torch.device(device)))
        torch.autograd.backward(loss)
        norm = torch.nn.utils.get_total_norm(
            [p.grad for p in model.parameters() if p.grad is not None]
        )
        found[device] = (loss.item(), float(norm))
    assert found["cuda"] == pytest.approx(found["cpu"], rel=0.05 if precision == "bf16" else 1e-3)


def test_generation_is_the_cpus(tmp_path: Path) -> None:
    toy_checkpoint(tmp_path, "qwen3")
    model = load_base(tmp_path).model
    there = load_base(tmp_path).model.to("cuda")
    assert list(generate(there, (5, 9, 17), {1}, 20)) == list(generate(model, (5, 9, 17), {1}, 20))


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_qwen3_8bs_peak_on_the_gpu_is_the_calculators(checkpointing: str) -> None:
    """Random weights of the exact shapes; LoRA r = 8 on q, k, v, o; 1 x 2048 tokens, 40% of them
    labels.
    """
    if torch.cuda.mem_get_info()[1] < 40 * 2**30:
        pytest.skip("a GPU of 40 GB is needed")
    config = entry("qwen3-8b")["config"]
    run = TrainingConfig(loss="chunked", label_share=0.4, checkpointing=checkpointing)
    with torch.device("cuda"):
        model: TransformersModel = from_config(config, torch.bfloat16)
    model.requires_grad_(False)
    add_lora(model, resolve(model, ("attention",)), AdapterSpec(8, 8, ()), torch.float32)
    prepare_model(model.train(), "full" if checkpointing == "full" else "none")
    optimizer = FlatOptimizer(model)
    ids = torch.randint(0, 1000, (1, 2049)).tolist()[0]
    labels = tuple(t if i % 5 < 2 else -100 for i, t in enumerate(ids[1:]))
    step = collate([Window(0, tuple(ids[:-1]), labels)]).to(torch.device("cuda"))
    for number in range(2):
        torch.cuda.reset_peak_memory_stats()
        torch.autograd.backward(loss_of(model, step))
        optimizer.collect_gradients()
        optimizer.step(1e-4)
        assert number or torch.cuda.max_memory_allocated() > 0
    sequence = step.ids.shape[1]
    run = replace(
        run,
        chunk=chunk_of(model, len(step.labels)),
        loss="fused" if fuses_head(model) else "chunked",
    )
    formula = predict(
        architecture(config, "qwen3-8b"), Lora(), replace(run, sequence=sequence)
    ).peak
    assert torch.cuda.max_memory_allocated() == pytest.approx(formula, rel=0.05)
