"""Merge file to file: the same bytes as a merge in memory, and all other files of the base copied."""

import copy
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from pipeline.adapters.config import AdapterSpec
from pipeline.adapters.peft import load_adapter
from pipeline.inference.engine import load
from pipeline.models.transformers_model import load_pretrained
from pipeline.weights.merge import plan_merge
from pipeline.weights.streaming import update_ratios, written_matrices
from tests.helpers.checkpoints import adapter, checkpoint
from tests.helpers.real import stock, toy
from tests.helpers.reference_merge import merged_model
from tests.pipeline.adapters.test_peft_interop import NAMES, options, randomized


def merged_through_files(base: Path, adapter: Path, out: Path) -> dict[str, Any]:
    out.mkdir()
    merge = plan_merge(base, adapter)
    assert list(merge.write(out))
    for ratio in update_ratios(merge, written_matrices(out)).values():
        assert ratio.value is None or abs(ratio.value - 1) <= 1e-3 + ratio.rounding
    return load_weights(out)


def load_weights(folder: Path) -> dict[str, Any]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", NAMES)
def test_a_merge_through_files_is_the_merge_in_memory(
    family: str, tied: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    toy(family, dtype, std=0.1, tie_word_embeddings=tied).save(tmp_path / "base")
    base = load_pretrained(tmp_path / "base")

    @settings(max_examples=6, deadline=None)
    @given(options(NAMES[family], base))
    def same(chosen: dict[str, Any]) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            theirs, memory = Path(scratch, "adapter"), Path(scratch, "memory")
            randomized(get_peft_model(stock(base), LoraConfig(task_type="CAUSAL_LM", **chosen))).save_pretrained(theirs)
            ours = copy.deepcopy(base)
            load_adapter(ours, tmp_path / "base", theirs)
            merged_model(ours).save(memory)
            through = merged_through_files(tmp_path / "base", theirs, Path(scratch, "files"))
            kept = load_weights(memory)
            assert through.keys() == kept.keys()
            for name, value in kept.items():
                assert torch.equal(through[name], value), name
            config = json.loads(Path(scratch, "files/config.json").read_text())
            assert (
                config["tie_word_embeddings"] == json.loads((memory / "config.json").read_text())["tie_word_embeddings"]
            )

    same()


SPECS = {
    "linears": AdapterSpec(3, 2.0, ("q_proj", "fc1")),
    "in-full": AdapterSpec(3, 2.0, ("v_proj",), saved=("embed_tokens", "lm_head")),
    "rows": AdapterSpec(3, 2.0, ("v_proj",), rows={"embed_tokens": (18, 19), "lm_head": (18, 19)}),
    "head": AdapterSpec(3, 2.0, ("lm_head",)),
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", SPECS)
def test_a_merged_minigpt_answers_like_base_plus_adapter(name: str, tied: bool, tmp_path: Path) -> None:
    spec = SPECS[name]
    if tied and spec.rows:
        spec = replace(spec, rows={"embed_tokens": (18, 19)})
    base = checkpoint(tmp_path / "base", tie_embeddings=tied)
    adapter(tmp_path / "adapter", base, spec)
    merged_through_files(base, tmp_path / "adapter", tmp_path / "out")
    one, other = load(base, tmp_path / "adapter").model, load(tmp_path / "out").model
    ids = torch.randint(3, 70, (4, 9))
    torch.testing.assert_close(other(ids), one(ids), atol=1e-5, rtol=1e-5)
    assert other.shape.tied == (tied and name != "head")
    assert (other.head.weight is other.embeddings.weight) == other.shape.tied
