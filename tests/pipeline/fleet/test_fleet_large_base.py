"""A sweep on Slurm whose base has the shapes of SmolLM2-135M, with random weights."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load
from transformers import LlamaConfig, LlamaForCausalLM

from tests.helpers.bases import toy_tokenizer
from tests.helpers.json_files import read_json
from tests.helpers.projects import lora, make_base, swept_weights
from tests.helpers.slurm import cluster

PARAMS = """\
base: base
training: {window: 0, batch_size: 4, schedule: constant, warmup_steps: 0}
import: {dtype: fp32}
expand_vocab: {data: [], audit_data: data/text.txt}
evaluate: {old_data: data/text.txt}
finetune_lora:
  data: data/pairs.jsonl
  epochs: 3
  learning_rate: 2.0e-4
  precision: fp32
  rank: 8
  target_modules: [q_proj, v_proj, down_proj]
  train_embeddings: none
"""
PAIRS = '{"prompt": "The currency of Bulgaria is", "completion": " the euro."}\n' * 4
SWEEP = ["finetune", "sweep", "--grid", "rank=4,8", "--grid", "seed=0,1"]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    root = tmp_path / "smol"
    (root / "data").mkdir(parents=True)
    (root / "data/pairs.jsonl").write_text(PAIRS)
    (root / "data/text.txt").write_text("Sofia is the capital.\n")
    (root / "params.yaml").write_text(PARAMS)
    (root / "fleet.yaml").write_text("pool: {engine: slurm, at_once: 2, time: 1h}")
    config = LlamaConfig(
        vocab_size=49_152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    assert model.num_parameters() == 134_515_008
    model.save_pretrained(root / "base")
    toy_tokenizer().save_pretrained(root / "base")
    return make_base(root)


@pytest.mark.slow
def test_in_parts_its_adapters_differ_by_rounding_alone(project: Path, tmp_path: Path) -> None:
    with cluster(tmp_path / "slurm", 2) as slurm:
        options = ["--on", "pool", "--parts", "2"]
        told = lora(*SWEEP, *options, cwd=project, SLURM_CONF=slurm.environment["SLURM_CONF"])
    assert told.returncode == 0 and "4 adapters, in 2 units on pool (slurm)" in told.stderr
    found = swept_weights(project)
    assert lora(*SWEEP, "--force", cwd=project).returncode == 0
    differences = []
    for name, data in swept_weights(project).items():
        tensors = load(found[name])
        for key, value in load(data).items():
            assert value.isfinite().all() and value.abs().max() > 0  # B has moved from 0
            differences.append((value - tensors[key]).abs().max().item())
    rows = read_json(project / "artifacts/sweep/sweep.json")
    print(
        f"{len(differences)} tensors of {len(rows)} adapters, largest difference {max(differences):.1e}"
    )
    assert len(rows) == 4 and max(differences) <= 1e-5
