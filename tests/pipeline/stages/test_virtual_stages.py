"""finetune_prefix and finetune_prompt as any stage: resumed, bound, counted, loaded beside others;
merge is refused.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pipeline.errors import UserError
from pipeline.export.model_card import card
from pipeline.files.artifact import read_manifest
from pipeline.inference.engine import load
from pipeline.inference.model_pool import ModelPool
from pipeline.models.load import load_base
from pipeline.views.models import adapters, describe
from tests.conftest import Lora
from tests.helpers.checkpoints import token_ids
from tests.helpers.json_files import read_json
from tests.helpers.projects import BRIEF, METHODS, PIPELINE, cut_off, folder_bytes, make, refusal
from tests.helpers.side_by_side import logits, ours, theirs

IDS = token_ids(99, 2, 6)
each_kind = pytest.mark.parametrize("kind", ["prefix", "prompt"])


def parts(root: Path, kind: str) -> tuple[Path, Path]:
    """The expanded base, and what was trained on it."""
    return root / "artifacts/expanded", root / "artifacts" / kind


@pytest.mark.filterwarnings("ignore")
@each_kind
@torch.no_grad()
def test_what_the_stage_made_opens_in_peft_and_has_learned(finished: Path, kind: str) -> None:
    base, adapter = parts(finished, kind)
    found, wanted = logits(ours(base, adapter), IDS), theirs(base, adapter)(IDS).logits
    assert (found - wanted[:, -6:]).abs().max() < 1e-4
    metrics = read_json(finished / "artifacts/evaluation/metrics.json")
    assert metrics[kind]["new_loss"] < metrics["expanded"]["new_loss"] - 1
    assert (
        metrics[kind]["trainable"]
        == load_file(adapter / "adapter_model.safetensors")["prompt_embeddings"].numel()
    )


@each_kind
def test_nothing_of_the_base_is_in_the_adapter_or_changed(project: Path, kind: str) -> None:
    base, adapter = parts(project, kind)
    before = folder_bytes(base)
    make(project, [f"finetune_{kind}"], [*BRIEF, f"finetune_{kind}.seed=4"])
    assert folder_bytes(base) == before
    assert list(load_file(adapter / "adapter_model.safetensors")) == ["prompt_embeddings"]


@each_kind
def test_another_base_an_edit_and_a_cut_are_refused(project: Path, kind: str) -> None:
    base, adapter = parts(project, kind)
    make(project, ["pretrain", "expand_vocab"], [*BRIEF, "pretrain.seed=1"])
    with pytest.raises(UserError, match="was trained on another base"):
        load(base, adapter)
    config = adapter / "adapter_config.json"
    text = config.read_text(encoding="utf-8")
    config.write_text(
        text.replace('"num_virtual_tokens": 8', '"num_virtual_tokens": 9'), encoding="utf-8"
    )
    with pytest.raises(
        UserError,
        match="num_virtual_tokens was edited: it is 9, but the adapter was trained with 8",
    ):
        load(base, adapter)
    config.write_text(text, encoding="utf-8")
    weights = adapter / "adapter_model.safetensors"
    cut_off(weights, 8)
    with pytest.raises(UserError, match=r"adapter_model.safetensors was changed after"):
        load(base, adapter)


@each_kind
def test_sentences_must_leave_the_virtual_tokens_their_places(project: Path, kind: str) -> None:
    said = (
        "more than the model's 32 positions less 30 virtual tokens. Shorten it, cut it with "
        "max_length, lower virtual"
    )
    with pytest.raises(UserError, match=said):
        make(project, [f"finetune_{kind}"], [f"finetune_{kind}.virtual_tokens=30"])
    with pytest.raises(
        UserError,
        match=f"finetune_{kind}.virtual_tokens must be below 32, the model's positions, got",
    ):
        make(project, [f"finetune_{kind}"], [f"finetune_{kind}.virtual_tokens=32"])


@each_kind
def test_a_prompt_gets_the_positions_that_are_left(cli: Lora, brief: Path, kind: str) -> None:
    asked = ("prompt", "der hund " * 12, "--adapter", f"artifacts/{kind}", "--json")
    assert cli(*asked, cwd=brief)[0] == 0
    asked = ("prompt", "der hund " * 13, "--adapter", f"artifacts/{kind}", "--json")
    assert f"The prompt has 26 tokens; {kind} takes 24." in refusal(cli(*asked, cwd=brief))


@pytest.mark.parametrize(
    "command",
    [
        ("merge", "--adapter", "artifacts/{kind}", "--out", "{out}"),
        ("export", "artifacts/{kind}", "--format", "merged", "--out", "{out}"),
        ("export", "artifacts/{kind}", "--format", "vllm", "--out", "{out}"),
        ("adapters", "combine", "artifacts/lora_adapter", "artifacts/{kind}", "--out", "{out}"),
        ("adapters", "diff", "artifacts/lora_adapter", "artifacts/{kind}"),
    ],
)
@each_kind
def test_what_needs_changed_weights_is_refused_in_one_message(
    cli: Lora, brief: Path, tmp_path: Path, kind: str, command: tuple[str, ...]
) -> None:
    said = refusal(
        cli(*(word.format(kind=kind, out=tmp_path / "out") for word in command), cwd=brief)
    )
    assert (
        f"artifacts/{kind} is a {kind} of 8 virtual tokens: it changes no weights, so there is "
        "nothing" in said
    )
    assert not (tmp_path / "out").exists()


@each_kind
def test_exported_for_peft_it_is_what_peft_opens_with_a_card(
    cli: Lora, project: Path, kind: str
) -> None:
    code, _, err = cli(
        "export", f"artifacts/{kind}", "--format", "peft", "--out", "out", cwd=project
    )
    assert code == 0 and err.count("\n") == 1 and "base" in err, (
        "one note: others cannot find this base"
    )
    assert torch.equal(
        logits(ours(parts(project, kind)[0], project / "out"), IDS),
        logits(ours(*parts(project, kind)), IDS),
    )
    text = (project / "out/README.md").read_text(encoding="utf-8")
    assert f"- {kind} tuning, 8 virtual tokens\n" in text
    assert "forgetting: loss on the old data" in card(project / "artifacts" / kind)


@each_kind
def test_it_is_listed_by_its_virtual_tokens(cli: Lora, brief: Path, kind: str) -> None:
    model = describe(brief / "artifacts" / kind)
    assert (model.kind, model.method, model.rank) == ("adapter", f"{kind}_tuning", None)
    assert model.targets == ("8 virtual tokens",)
    assert not model.scales
    (listed,) = [one for one in adapters(brief / "artifacts") if one.path == model.path]
    assert listed.problem is None
    row = next(
        line for line in cli("adapters", cwd=brief)[1].splitlines() if line.strip().startswith(kind)
    )
    assert "None" not in row


@pytest.mark.filterwarnings("ignore")
def test_pefts_own_prefix_is_imported_and_bound(cli: Lora, project: Path) -> None:
    base = project / "artifacts/expanded"
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=6)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(
        project / "theirs"
    )
    code, said, err = cli(
        "adapters", "import", "theirs", "--base", "artifacts/expanded", "--out", "mine", cwd=project
    )
    assert (code, err) == (0, "")
    assert said.startswith("mine  fits artifacts/expanded")
    assert read_manifest(project / "mine")["params"]["virtual_tokens"] == 6
    assert torch.equal(
        logits(ours(base, project / "mine"), IDS), logits(ours(base, project / "theirs"), IDS)
    )
    other = project / "artifacts/base"
    with pytest.raises(UserError, match="was trained on another base"):
        load(other, project / "mine")


def test_adapters_of_every_kind_share_one_base_and_do_not_disturb_each_other(brief: Path) -> None:
    base = brief / "artifacts/expanded"
    names = {"lora_adapter": "lora_adapter", "prefix": "prefix", "prompt": "prompt"}
    alone = {
        name: logits(ours(base, brief / "artifacts" / folder), IDS)
        for name, folder in names.items()
    }
    models = ModelPool()
    plain = models.load("base", base, None)[0]
    residents = {
        name: models.load(name, base, brief / "artifacts" / folder)[0]
        for name, folder in names.items()
    }
    for name, resident in residents.items():
        assert torch.equal(logits(resident.at(1).model, IDS), alone[name])
        assert torch.equal(logits(resident.at(0).model, IDS), logits(plain.loaded.model, IDS))
    assert torch.equal(logits(plain.loaded.model, IDS), logits(ours(base), IDS))
    for name in ("prefix", "prompt"):
        with pytest.raises(
            UserError, match="consists of virtual tokens, whose strength cannot be scaled"
        ):
            residents[name].at(0.5)


@each_kind
def test_on_a_base_in_four_bits_they_train_and_load_on_the_same_bits(
    project: Path, kind: str
) -> None:
    pytest.importorskip("bitsandbytes")
    make(project, [f"finetune_{kind}"], [*BRIEF, f"finetune_{kind}.quantization=nf4"])
    base, adapter = parts(project, kind)
    assert read_manifest(adapter)["parameters"]["total"] == 112_768
    assert (
        logits(ours(base, adapter), IDS)
        - logits(load(base, adapter, quantization="none").model, IDS)
    ).abs().max() > 1e-3


def test_every_method_has_its_row_in_the_comparison(brief: Path) -> None:
    metrics: dict[str, Any] = read_json(brief / "artifacts/evaluation/metrics.json")
    assert {method for method in METHODS if f"finetune_{method}" in PIPELINE} <= set(metrics)
    report = (brief / "artifacts/evaluation/report.md").read_text(encoding="utf-8")
    for name in ("Prefix tuning", "Prompt tuning"):
        assert f"| {name} | " in report
    assert load_base(brief / "artifacts/expanded").model.virtual is None
