"""LoRA's refinements as params of finetune_lora: trained, saved for PEFT, resumed, merged, refused,
counted.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline.adapters.folder import refuse_foreign
from pipeline.calc.families import architecture
from pipeline.calc.method import trainable
from pipeline.errors import UserError
from pipeline.models.load import load_base
from pipeline.stages.methods.lora import counted, lora_spec, new_rows
from pipeline.views import models
from tests.helpers.checkpoints import edit_adapter_config
from tests.helpers.json_files import read_json
from tests.helpers.projects import BRIEF, load, logged_memory, make
from tests.pipeline.adapters.test_peft import assert_same_logits

ADAPTER = "artifacts/lora_adapter"
CHOICES: dict[str, tuple[str, ...]] = {
    "patterns": (
        "rank_pattern={v_proj: 3, layers.0.self_attn.q_proj: 7}",
        "alpha_pattern={k_proj: 8}",
    ),
    "rslora and patterns": (
        "rslora=true",
        "rank_pattern={v_proj: 9}",
        "alpha_pattern={'.*1.*v_proj': 3.5}",
    ),
    "pissa": ("init_lora_weights=pissa", "rslora=true", "rank_pattern={v_proj: 3}"),
    "dora on all linears": (
        "dora=true",
        "target_modules=all-linear",
        "train_embeddings=new_rows",
        "rslora=true",
    ),
    "dora from pissa": ("dora=true", "init_lora_weights=pissa", "rank_pattern={v_proj: 2}"),
    "dora in four bits": ("dora=true", "quantization=nf4-dq"),
    "pissa in four bits": ("init_lora_weights=pissa", "quantization=nf4"),
}


def given(*settings: str) -> list[str]:
    return [*BRIEF, *(f"finetune_lora.{setting}" for setting in settings)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CHOICES)
def test_each_is_trained_merged_and_opened_in_peft_with_our_logits(
    project: Path, name: str
) -> None:
    overrides = given(*CHOICES[name], "alpha=8", "epochs=5")
    manifest = make(project, ["finetune_lora"], overrides)
    assert manifest["parameters"]["trainable"] == calculated(project, overrides)
    if "four bits" not in name:
        predicted, measured = logged_memory(project / "runs/finetune_lora/telemetry.csv")
        assert predicted == pytest.approx(measured, rel=0.015)
    make(project, ["merge"], overrides)
    certificate = read_json(project / "artifacts/lora_merged/certificate.json")
    assert certificate["max_logit_difference"] <= 1e-5
    assert all(abs(ratio - 1) < 1e-3 for ratio in certificate["delta_ratios"].values())
    if "four bits" not in name:  # PEFT knows nothing of the bits that the base had
        assert_same_logits(project / "artifacts/expanded", project / ADAPTER)


def calculated(project: Path, overrides: list[str]) -> int:
    """The calculator's count of what trains, from the model's config and what the run says of its
    method.
    """
    model = load_base(project / "artifacts/expanded").model
    settings = load(project / "params.yaml", overrides).finetune_lora
    spec = lora_spec(model, settings, new_rows(project / "artifacts/expanded"))
    return trainable(
        architecture(model.describe(), "MiniGPT"),
        counted(spec, settings.init_lora_weights == "pissa"),
    )


def test_pissa_says_what_trained_and_what_its_file_holds(project: Path) -> None:
    manifest = make(
        project, ["finetune_lora"], given("init_lora_weights=pissa", "rank=3", "alpha=6")
    )
    assert (manifest["params"]["rank"], manifest["stored"]) == (3, {"rank": 6, "alpha": 12})
    plain = make(project, ["finetune_lora"], given("rank=3"))["parameters"]
    assert {key: manifest["parameters"][key] for key in plain} == plain
    make(project, ["finetune_lora"], given("init_lora_weights=pissa", "rank=3", "alpha=6"))
    numbers = {
        key: tensor.numel()
        for key, tensor in load_file(project / ADAPTER / "adapter_model.safetensors").items()
    }
    assert manifest["parameters"]["stored"] == sum(numbers.values())
    low_rank = sum(count for key, count in numbers.items() if "lora_" in key)
    assert sum(numbers.values()) - low_rank // 2 == plain["trainable"]
    (found,) = (one for one in models.adapters(project) if one.path == project / ADAPTER)
    assert (found.rank, found.trained_rank) == (6, 3)


def test_an_edited_rank_of_pissa_is_refused(project: Path) -> None:
    make(project, ["finetune_lora"], given("init_lora_weights=pissa"))
    refuse_foreign(project / "artifacts/expanded", project / ADAPTER)
    edit_adapter_config(project / ADAPTER, r=4)  # what it trained with
    with pytest.raises(
        UserError, match="r was edited: it is 4, but the adapter was trained with 8"
    ):
        refuse_foreign(project / "artifacts/expanded", project / ADAPTER)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["rank_pattern={o_proj: 3}"], "rank_pattern: 'o_proj' matches no layer that gets LoRA"),
        (["alpha_pattern={fc1: 3}"], "alpha_pattern: 'fc1' matches no layer that gets LoRA"),
        (["rank_pattern={proj: 3}"], "'proj' matches no layer"),
        (
            ["rank_pattern={v_proj: 3, '.*0.*proj': 4}"],
            "'v_proj' and '.*0.*proj' both match model.decoder.layers.0",
        ),
        (
            ["rank_pattern={v_proj: 3}", "init_lora_weights=orthogonal"],
            "orthogonal needs an even rank, got 3",
        ),
        (
            ["rank=65", "init_lora_weights=pissa"],
            "pissa takes 65 singular values of a weight that has 64",
        ),
    ],
)
def test_what_would_count_for_nothing_or_cannot_be_is_refused(
    brief: Path, settings: list[str], message: str
) -> None:
    params = load(brief / "params.yaml", given(*settings)).finetune_lora
    model = load_base(brief / "artifacts/expanded").model
    with pytest.raises(UserError, match=message.replace("*", "[*]")):
        attached(model, params)


def attached(model: Any, params: Any) -> None:
    from pipeline.adapters.attach import attach

    attach(model, lora_spec(model, params, ()), torch.float32, params.init_lora_weights)
