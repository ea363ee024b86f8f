"""The families that people use, at toy size, through every stage, and what comes out in
transformers and PEFT.
"""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline.files.safetensors_file import shapes
from pipeline.project.runner import Progress, run
from pipeline.stages.registry import open_project
from tests.helpers.families import FAMILIES, GENERATION, OTHERS, VOCABULARY, new_project
from tests.helpers.json_files import read_json
from tests.helpers.projects import PIPELINE, ROOT, STAGES, WORK, folder_bytes, make, make_one
from tests.helpers.side_by_side import assert_alike, logits, ours, theirs

ADAPTERS = {
    "finetune_lora": "lora_adapter",
    "finetune_prefix": "prefix",
    "finetune_prompt": "prompt",
}
TRAINED = {"finetune_full": "full_finetuned", "finetune_freeze": "layer_frozen", **ADAPTERS}
CHECKPOINTS = ("base", "expanded", "from_scratch", "full_finetuned", "layer_frozen", "lora_merged")
IDS = torch.tensor([[5, 9, 70, 17, 3, 64, VOCABULARY + 1, 33, 12, 1, 40, VOCABULARY]])
Made = Callable[[str], Path]

pytestmark = pytest.mark.filterwarnings("ignore")
each_family = pytest.mark.parametrize("name", FAMILIES)
WHOLE = ("llama", "gpt2")  # RMSNorm and rotary positions; LayerNorm, learned positions and Conv1D


def rare(name: str, *more: str, often: bool = False) -> Any:
    """A case for the slow tier, unless it is one of the two families that have them all."""
    return pytest.param(*more, name, marks=() if often or name in WHOLE else pytest.mark.slow)


def begun(project: Path, root: Path) -> Path:
    """A copy with an expanded base and nothing else made."""
    root.mkdir()
    shutil.copy(project / "params.yaml", root)
    for name in ("data", "artifacts/base", "artifacts/expanded"):
        shutil.copytree(project / name, root / name)
    return root


@each_family
@pytest.mark.slow
def test_every_checkpoint_of_the_pipeline_opens_in_transformers_with_our_logits(
    family: Made, name: str
) -> None:
    artifacts = family(name) / "artifacts"
    found = {
        checkpoint: logits(ours(artifacts / checkpoint), IDS) for checkpoint in CHECKPOINTS[1:]
    }
    for checkpoint, answers in found.items():
        assert_alike(answers, logits(theirs(artifacts / checkpoint), IDS))
        assert checkpoint == "expanded" or (answers - found["expanded"]).abs().max() > 0.01, (
            "nothing was learned"
        )


@each_family
def test_the_adapter_opens_in_peft_and_the_merged_model_is_base_plus_adapter(
    family: Made, name: str
) -> None:
    artifacts = family(name) / "artifacts"
    tuned = logits(ours(artifacts / "expanded", artifacts / "lora_adapter"), IDS)
    assert_alike(tuned, logits(theirs(artifacts / "expanded", artifacts / "lora_adapter"), IDS))
    assert_alike(tuned, logits(theirs(artifacts / "lora_merged"), IDS))
    certificate = read_json(artifacts / "lora_merged/certificate.json")
    assert certificate["max_logit_difference"] <= 1e-5
    ratios = certificate["delta_ratios"].values()
    assert len(ratios) == FAMILIES[name].linears and all(abs(ratio - 1) < 1e-3 for ratio in ratios)


@pytest.mark.parametrize(
    ("embeddings", "targets", "name"),
    [
        *(rare(name, "none", "attention") for name in FAMILIES),
        *(rare(name, "new_rows", "all-linear", often=True) for name in FAMILIES),
    ],
)
@pytest.mark.sampled(3)
def test_peft_opens_every_kind_of_adapter(
    family: Made, name: str, embeddings: str, targets: str, tmp_path: Path
) -> None:
    root = begun(family(name), tmp_path / "p")
    settings = [
        f"finetune_lora.train_embeddings={embeddings}",
        f"finetune_lora.target_modules={targets}",
    ]
    make(root, ["finetune_lora", "merge"], settings)
    base, adapter, merged = (
        root / "artifacts" / part for part in ("expanded", "lora_adapter", "lora_merged")
    )
    tuned = logits(ours(base, adapter), IDS)
    assert_alike(tuned, logits(theirs(base, adapter), IDS))
    assert_alike(tuned, logits(theirs(merged), IDS))
    assert (tuned - logits(ours(base), IDS)).abs().max() > 0.01


@each_family
def test_a_layer_too_large_to_fold_its_update_gives_the_same(
    family: Made, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = (family(name) / "artifacts" / part for part in ("expanded", "lora_adapter"))
    folded = logits(ours(base, adapter), IDS)
    monkeypatch.setattr("pipeline.adapters.lora.FOLD_BELOW", 0)
    assert_alike(logits(ours(base, adapter), IDS), folded)


@pytest.mark.parametrize("name", ["gemma", "gpt2", "opt"])
def test_an_update_of_the_head_alone_unties_the_merged_model(
    family: Made, name: str, tmp_path: Path
) -> None:
    root = begun(family(name), tmp_path / "p")
    make(
        root,
        ["finetune_lora", "merge"],
        ["finetune_lora.target_modules=lm_head", "finetune_lora.train_embeddings=none"],
    )
    base, adapter, merged = (
        root / "artifacts" / part for part in ("expanded", "lora_adapter", "lora_merged")
    )
    assert read_json(merged / "config.json")["tie_word_embeddings"] is False
    tuned = logits(ours(base, adapter), IDS)
    assert_alike(tuned, logits(ours(merged), IDS))
    assert_alike(tuned, logits(theirs(merged), IDS))
    assert_alike(tuned, logits(theirs(base, adapter), IDS))


@each_family
def test_a_tied_model_stays_tied_on_disk_and_an_untied_one_untied(family: Made, name: str) -> None:
    for checkpoint in CHECKPOINTS:
        folder = family(name) / "artifacts" / checkpoint
        assert ("lm_head.weight" in shapes(folder / "model.safetensors")) is not FAMILIES[name].tied
        assert read_json(folder / "config.json")["tie_word_embeddings"] is FAMILIES[name].tied


@each_family
def test_the_tensors_keep_the_names_that_the_family_publishes(family: Made, name: str) -> None:
    """Mixtral's experts are one tensor each kind in memory, and one each expert on disk."""
    given = shapes(family(name) / "base/model.safetensors").keys()
    for checkpoint in CHECKPOINTS:
        assert shapes(family(name) / "artifacts" / checkpoint / "model.safetensors").keys() == given


@each_family
def test_nothing_on_disk_speaks_of_this_machine_and_everyone_may_read_it(
    family: Made, name: str
) -> None:
    root = family(name)
    given = read_json(root / "base/config.json")
    same = given.keys() - {"vocab_size", "_name_or_path", "transformers_version"}
    for checkpoint in CHECKPOINTS:
        folder = root / "artifacts" / checkpoint
        assert len({path.stat().st_mode for path in folder.iterdir()}) == 1
        assert not [
            path for path in folder.glob("*.json") if str(root) in path.read_text(encoding="utf-8")
        ]
        config = read_json(folder / "config.json")
        assert {key: config.get(key) for key in same} == {key: given[key] for key in same}
        assert (folder / "generation_config.json").read_text(encoding="utf-8") == GENERATION


@pytest.mark.parametrize(
    ("stage", "name"),
    [rare(name, stage, often=stage == "finetune_lora") for stage in TRAINED for name in FAMILIES],
)
def test_interrupted_and_resumed_it_ends_with_the_bytes_of_an_unbroken_run(
    family: Made, name: str, stage: str, tmp_path: Path
) -> None:
    root = begun(family(name), tmp_path / "p")
    for last in (2, 3):
        stopped_after(root, stage, last)
    _, seen = make_one(root, stage)
    assert any("resumed after step 3" in event.text for event in seen)
    done = "artifacts/" + TRAINED[stage]
    assert folder_bytes(root / done) == folder_bytes(family(name) / done)


def stopped_after(root: Path, stage: str, last: int) -> None:
    """Run a stage with a checkpoint at each step, and drop it there."""
    events = run(open_project(root / "params.yaml"), STAGES[stage], WORK[stage], checkpoint_every=1)
    next(event for event in events if isinstance(event, Progress) and event.done == last)
    events.close()


@each_family
def test_blocks_that_run_again_in_backward_give_the_same_adapter(
    family: Made, name: str, tmp_path: Path
) -> None:
    root = begun(family(name), tmp_path / "p")
    make(root, ["finetune_lora"], ["finetune_lora.gradient_checkpointing=full"])
    found, expected = (
        load_file(project / "artifacts/lora_adapter/adapter_model.safetensors")
        for project in (root, family(name))
    )
    for key, tensor in expected.items():
        assert_alike(found[key], tensor, 1e-5)


@pytest.mark.parametrize("name", ["qwen3", pytest.param("gemma2", marks=pytest.mark.slow)])
@pytest.mark.slow
def test_in_16_bits_every_stage_gives_what_transformers_and_peft_give(
    name: str, tmp_path: Path
) -> None:
    root = new_project(tmp_path / "p", FAMILIES[name], torch.bfloat16)
    half = [f"{stage}.precision=bf16" for stage in TRAINED]
    make(
        root,
        PIPELINE,
        [*half, "finetune_lora.adapter_precision=bf16", "merge.max_logit_difference=2"],
    )
    artifacts = root / "artifacts"
    for checkpoint in CHECKPOINTS[1:]:
        weights = load_file(artifacts / checkpoint / "model.safetensors").values()
        assert {tensor.dtype for tensor in weights} == {torch.bfloat16}
        assert_alike(
            logits(ours(artifacts / checkpoint), IDS),
            logits(theirs(artifacts / checkpoint), IDS),
            0.5,
        )
    tuned = logits(ours(artifacts / "expanded", artifacts / "lora_adapter"), IDS)
    assert_alike(
        tuned, logits(theirs(artifacts / "expanded", artifacts / "lora_adapter"), IDS), 0.5
    )


@pytest.mark.parametrize("name", ["gemma", "opt"])
def test_trained_in_16_bits_a_base_of_32_gives_its_weights_in_32(
    family: Made, name: str, tmp_path: Path
) -> None:
    root = begun(family(name), tmp_path / "p")
    make(root, ["finetune_full"], ["finetune_full.precision=bf16"])
    trained, before = (
        root / f"artifacts/{one}/model.safetensors" for one in ("full_finetuned", "expanded")
    )
    assert shapes(trained) == shapes(before)
    assert {tensor.dtype for tensor in load_file(trained).values()} == {torch.float32}
    assert_alike(logits(ours(trained.parent), IDS), logits(theirs(trained.parent), IDS))


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.sampled(2)
@pytest.mark.slow
def test_models_with_a_bias_in_the_head_or_attention_of_their_own_go_through_too(
    name: str, tmp_path: Path
) -> None:
    root = new_project(tmp_path / "p", OTHERS[name])
    make(root, PIPELINE)
    base, adapter, merged = (
        root / "artifacts" / part for part in ("expanded", "lora_adapter", "lora_merged")
    )
    assert ("base_model.model.lm_head.bias" in shapes(adapter / "adapter_model.safetensors")) is (
        name == "phi"
    )
    tuned = logits(ours(base, adapter), IDS)
    assert_alike(tuned, logits(theirs(base, adapter), IDS))
    assert_alike(tuned, logits(theirs(merged), IDS))


SILENT = """
import sys
from pathlib import Path
from pipeline.inference import engine
from pipeline.inference.model_pool import ModelPool
from pipeline.stages.registry import open_project
from tests.helpers.projects import PIPELINE, make
root = Path(sys.argv[1])
make(root, PIPELINE)
folders = engine.variant_folders(open_project(root / "params.yaml"))
for loaded in ModelPool().in_turn(folders):
    engine.complete(loaded, "The currency of Bulgaria is the")
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "mixtral"])
def test_no_library_writes_to_the_terminal(tmp_path: Path, name: str) -> None:
    root = str(new_project(tmp_path / name, FAMILIES[name]))
    done = subprocess.run(
        [sys.executable, "-c", SILENT, root], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
