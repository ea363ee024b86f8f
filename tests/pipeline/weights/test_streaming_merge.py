"""Merge file to file: the same bytes as a merge in memory, and all other files of the base
copied.
"""

import copy
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from pipeline.adapters.config import WEIGHTS, AdapterSpec
from pipeline.adapters.peft import load_adapter
from pipeline.errors import UserError
from pipeline.files import artifact
from pipeline.files.base_model import INDEX, base_fingerprint
from pipeline.inference.engine import load
from pipeline.models.load import skeleton
from pipeline.models.transformers_model import load_pretrained
from pipeline.project.runner import Progress
from pipeline.weights import blocks
from pipeline.weights.merge import Merging, merge_into, write
from pipeline.weights.merge_plan import plan_merge
from tests.helpers.bases import edit_config, toy_checkpoint
from tests.helpers.checkpoints import adapter, checkpoint
from tests.helpers.json_files import read_json, write_json
from tests.helpers.real import stock, toy
from tests.helpers.reference_merge import merged_model
from tests.helpers.side_by_side import randomized
from tests.helpers.stored_models import load_weights, merged_through_files
from tests.pipeline.adapters.test_peft_interop import NAMES, options


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", NAMES)
@pytest.mark.sampled(5)
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
            randomized(
                get_peft_model(stock(base), LoraConfig(task_type="CAUSAL_LM", **chosen))
            ).save_pretrained(theirs)
            ours = copy.deepcopy(base)
            load_adapter(ours, tmp_path / "base", theirs)
            merged_model(ours).save(memory)
            through = merged_through_files(tmp_path / "base", theirs, Path(scratch, "files"))
            kept = load_weights(memory)
            assert through.keys() == kept.keys()
            for name, value in kept.items():
                assert torch.equal(through[name], value), name
            config = read_json(Path(scratch, "files/config.json"))
            assert (
                config["tie_word_embeddings"]
                == read_json(memory / "config.json")["tie_word_embeddings"]
            )

    same()


SPECS = {
    "linears": AdapterSpec(3, 2.0, ("q_proj", "fc1")),
    "in-full": AdapterSpec(3, 2.0, ("v_proj",), saved=("embed_tokens", "lm_head")),
    "rows": AdapterSpec(
        3, 2.0, ("v_proj",), rows={"embed_tokens": (18, 19), "lm_head": (5, 19, 30)}
    ),
    "head": AdapterSpec(3, 2.0, ("lm_head",)),
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", SPECS)
def test_a_merged_minigpt_answers_like_base_plus_adapter(
    name: str, tied: bool, tmp_path: Path
) -> None:
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


def test_a_merge_counts_the_files_that_it_has_written(tmp_path: Path) -> None:
    toy_checkpoint(tmp_path / "base", shard="30KB")
    adapter(tmp_path / "adapter", tmp_path / "base", SPECS["head"])
    (tmp_path / "out").mkdir()
    events = [*merge_into(tmp_path / "out", Merging(tmp_path / "base", tmp_path / "adapter"))]
    files = {path.name for path in (tmp_path / "out").glob("*.safetensors")}
    done = [event for event in events if isinstance(event, Progress)]
    assert [(event.done, event.total) for event in done] == [
        (n + 1, len(files)) for n in range(len(files))
    ]
    assert {event.text for event in done} == files and len(files) > 1


def test_what_a_quantized_base_dequantizes_to_is_merged_also_where_weights_are_transposed(
    tmp_path: Path,
) -> None:
    base, trained = tmp_path / "base", tmp_path / "adapter"
    toy_checkpoint(base, "gpt2")
    adapter(trained, base, AdapterSpec(3, 12.0, ("c_attn", "mlp.c_proj")))
    artifact.seal(trained, {"base": base_fingerprint(base), "params": {"quantization": "nf4"}})
    merged_through_files(base, trained, tmp_path / "out")
    ids = torch.tensor([[5, 9, 200, 17, 3, 64]])
    tuned, stored = (load(base, trained, quantization=kind).model(ids) for kind in (None, "none"))
    torch.testing.assert_close(load(tmp_path / "out").model(ids), tuned, atol=1e-4, rtol=1e-4)
    assert (tuned - stored).abs().max() > 1e-3, "quantizing changes the answers"


@pytest.mark.parametrize(("factor", "same"), [(1.0, True), (1.0001, True), (1.1, False)])
def test_a_copy_of_the_bases_head_may_differ_by_the_rounding_of_its_dtype_alone(
    factor: float, same: bool, tmp_path: Path
) -> None:
    base, trained = tmp_path / "base", tmp_path / "adapter"
    model = toy_checkpoint(base, dtype=torch.bfloat16)
    adapter(trained, base, SPECS["head"])
    values = load_file(trained / WEIGHTS)
    copied = model.lm_head.weight.detach().float() * factor
    save_file({**values, "base_model.model.lm_head.base_layer.weight": copied}, trained / WEIGHTS)
    if same:
        assert plan_merge(base, trained).edits.keys() == {"lm_head.weight"}
        return
    with pytest.raises(
        UserError, match=r"contains its own lm_head.weight, which differs from the base model's"
    ):
        plan_merge(base, trained)


@pytest.mark.parametrize("trusted", [False, True])
def test_the_plan_runs_the_models_code_only_if_it_is_trusted(
    trusted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = list[bool]()

    def spy(base: Path, trust_remote_code: bool = False) -> Any:
        asked.append(trust_remote_code)
        return skeleton(base, trust_remote_code)

    monkeypatch.setattr("pipeline.weights.merge_plan.skeleton", spy)
    base = checkpoint(tmp_path / "base")
    adapter(tmp_path / "adapter", base, SPECS["head"])
    plan_merge(base, tmp_path / "adapter", trusted)
    assert asked == [trusted]


def test_a_matrix_of_many_blocks_is_merged_and_measured_by_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = checkpoint(tmp_path / "base")
    adapter(tmp_path / "adapter", base, SPECS["linears"])
    whole = merged_through_files(base, tmp_path / "adapter", tmp_path / "whole")
    monkeypatch.setattr(blocks, "BLOCK", 100)
    parts = merged_through_files(base, tmp_path / "adapter", tmp_path / "parts")
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, atol=1e-6, rtol=1e-6)


def test_an_index_may_have_no_metadata(tmp_path: Path) -> None:
    base = tmp_path / "base"
    toy_checkpoint(base, dtype=torch.bfloat16)
    weight_map = dict.fromkeys(load_weights(base), "model.safetensors")
    write_json(base / INDEX, {"metadata": None, "weight_map": weight_map})
    adapter(tmp_path / "adapter", base, SPECS["head"])
    (tmp_path / "out").mkdir()
    plan = plan_merge(base, tmp_path / "adapter", dtype="F32")
    assert [*write(plan, tmp_path / "out")]
    assert read_json(tmp_path / "out" / INDEX)["metadata"] is None


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_the_written_dtype_is_named_by_the_key_that_the_base_has(key: str, tmp_path: Path) -> None:
    base = tmp_path / "base"
    toy_checkpoint(base, dtype=torch.bfloat16)
    edit_config(base, **{"dtype": None, key: "bfloat16"})
    adapter(tmp_path / "adapter", base, SPECS["head"])
    (tmp_path / "out").mkdir()
    plan = plan_merge(base, tmp_path / "adapter", dtype="F32")
    assert [*write(plan, tmp_path / "out")]
    before, after = (read_json(folder / "config.json") for folder in (base, tmp_path / "out"))
    assert after == {**before, key: "float32", "tie_word_embeddings": False}
    assert {value.dtype for value in load_weights(tmp_path / "out").values()} == {torch.float32}
