"""Which blocks and linears get LoRA, and which modules train in full beside it, as in PEFT."""

import copy
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from pipeline.adapters.attach import adapter_layers, attach, tensors
from pipeline.adapters.config import PREFIX, WEIGHTS
from pipeline.adapters.experts import expert_layers
from pipeline.adapters.peft import load_adapter, save_adapter
from pipeline.calc.families import architecture
from pipeline.calc.method import trainable
from pipeline.calc.target_modules import numbers_of
from pipeline.models.transformers_model import TransformersModel
from pipeline.stages.methods.lora import COUNTED, FinetuneLora, counted, lora_spec
from pipeline.training.batches import Batches
from tests.helpers.checkpoints import token_ids
from tests.helpers.errors import user_error
from tests.helpers.families import new_lines_project
from tests.helpers.projects import logged_memory, make, section_overrides
from tests.helpers.real import ROWS, listed, loss_alone, stock, toy, trained, windows_of

IDS = token_ids(ROWS, 3, 9)
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
BASE = toy("llama", std=0.1, num_hidden_layers=5)


@given(st.integers(1, 90), st.data())
def test_blocks_are_numbers_ranges_and_the_last(blocks: int, data: st.DataObject) -> None:
    first, stop = sorted(data.draw(st.integers(0, blocks - 1)) for _ in range(2))
    last = data.draw(st.integers(1, blocks))
    every = range(blocks)
    assert numbers_of([f"{first}-{stop}"], blocks) == {*every[first : stop + 1]}
    assert numbers_of([f"last {last}"], blocks) == {*every[-last:]}
    assert numbers_of([str(first), f"last {last}"], blocks) == {first, *every[-last:]}


def adapted_by(spec_of: Any, base: TransformersModel) -> tuple[TransformersModel, Any]:
    model = copy.deepcopy(base)
    spec = lora_spec(model, spec_of, ())
    attach(model, spec)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_(std=0.05)
    return model, spec


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.sampled_from(("0", "2", "1-3", "last 2")), max_size=2, unique=True),
    st.lists(st.sampled_from((*LINEARS, "2.mlp.up_proj")), max_size=2, unique=True),
    st.sampled_from((LINEARS, ("all-linear",), ("attention", "feed_forward"))),
)
def test_the_layers_are_those_of_peft_and_the_saved_adapter_has_its_logits_there(
    layers: list[str], excluded: list[str], targets: tuple[str, ...]
) -> None:
    given = FinetuneLora(
        target_modules=targets,
        train_embeddings="none",
        layers_to_transform=tuple(layers),
        exclude_modules=tuple(excluded),
    )
    model, spec = adapted_by(given, BASE)
    config = LoraConfig(
        target_modules=list(LINEARS),
        layers_to_transform=sorted(numbers_of(layers, 5)) or None,
        exclude_modules=excluded or None,
    )
    theirs = get_peft_model(stock(BASE), config)
    wanted = {
        name.removeprefix("base_model.model.").removesuffix(".lora_A.default")
        for name, _ in theirs.named_modules()
        if name.endswith(".lora_A.default")
    }
    assert {name for name, _ in adapter_layers(model)} == wanted
    shapes = architecture(BASE.describe(), "config.json")
    size = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trainable(shapes, COUNTED.with_params(given)) == size
    assert trainable(shapes, counted(spec)) == size
    with tempfile.TemporaryDirectory() as scratch:
        save_adapter(Path(scratch), model, spec, "base")
        loaded = PeftModel.from_pretrained(stock(BASE), scratch).eval()
        again = copy.deepcopy(BASE)
        assert load_adapter(again, Path("base"), Path(scratch)) is not None
        with torch.no_grad():
            ours = model.eval().logits(model.hidden_states(IDS))
            assert torch.equal(again.eval().logits(again.hidden_states(IDS)), ours)
            torch.testing.assert_close(loaded(input_ids=IDS).logits, ours, atol=1e-5, rtol=1e-4)


def test_blocks_are_those_of_stacked_experts_too() -> None:
    base = toy("mixtral", num_hidden_layers=3)
    given = FinetuneLora(
        target_modules=("attention",),
        target_parameters=("mlp.experts.down_proj",),
        layers_to_transform=("last 1",),
        train_embeddings="none",
    )
    model, spec = adapted_by(given, base)
    assert {name.split(".")[2] for name, _ in adapter_layers(model)} == {"2"}
    assert [name.split(".")[2] for name, _ in expert_layers(model)] == ["2"]
    size = sum(p.numel() for p in model.parameters() if p.requires_grad)
    shapes = architecture(base.describe(), "config.json")
    assert trainable(shapes, COUNTED.with_params(given)) == size
    assert trainable(shapes, counted(spec)) == size


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"layers_to_transform": ("5",)},
            "layers_to_transform: '5' is not among the model's 5 blocks, 0 to 4. Name others.",
        ),
        ({"layers_to_transform": ("3-9",)}, "'3-9' is not among the model's 5 blocks"),
        ({"layers_to_transform": ("3-2",)}, "'3-2' is not among the model's 5 blocks"),
        ({"layers_to_transform": ("last 6",)}, "'last 6' is not among the model's 5 blocks"),
        ({"layers_to_transform": ("last 0",)}, "'last 0' is not among the model's 5 blocks"),
        ({"exclude_modules": ("fc9",)}, "exclude_modules: 'fc9' matches no layer of target_mod"),
        (
            {"target_modules": ("q_proj",), "exclude_modules": ("q_proj",)},
            "layers_to_transform and exclude_modules leave no layer that gets LoRA. Name others.",
        ),
        ({"modules_to_save": ("fc9",)}, "modules_to_save: no module of the model is named fc9"),
        (
            {"target_modules": ("all-linear",), "modules_to_save": ("down_proj",)},
            "already trains in full or row by row (train_embeddings, modules_to_save). Remove",
        ),
        (
            {"train_embeddings": "new_rows", "modules_to_save": ("lm_head",)},
            "finetune_lora.modules_to_save trains lm_head in full, and train_embeddings new_rows",
        ),
    ],
)
def test_what_means_nothing_is_one_message(changes: dict[str, Any], message: str) -> None:
    def attached() -> None:
        model = copy.deepcopy(BASE)
        own = FinetuneLora(**{"train_embeddings": "none", **changes})
        attach(model, lora_spec(model, own, (1, 2)))

    assert message in user_error(attached)


SAVED = {
    "the head": ("lm_head",),
    "embedding and norms": ("embed_tokens", "norm"),
    "linears of blocks": ("1.mlp.up_proj", "lm_head"),
}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("saved", SAVED.values(), ids=SAVED)
def test_training_modules_in_full_has_the_losses_of_peft(
    saved: tuple[str, ...], tied: bool, tmp_path: Path
) -> None:
    """From the same start, by torch's AdamW; afterwards PEFT reads what trained."""
    base = toy("llama", std=0.1, tie_word_embeddings=tied)
    given = FinetuneLora(
        epochs=4,
        learning_rate=1e-2,
        target_modules=("attention",),
        train_embeddings="none",
        modules_to_save=saved,
    )
    model, spec = adapted_by(given, base)
    save_adapter(tmp_path, model, spec, "base")
    theirs = PeftModel.from_pretrained(stock(base), tmp_path, is_trainable=True)
    parameters = [p for p in theirs.parameters() if p.requires_grad]
    assert sum(p.numel() for p in parameters) == sum(
        p.numel() for p in {id(p): p for p in tensors(model, spec).values()}.values()
    )
    adam = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)
    windows = windows_of((4, 4, 5, 6, 3))
    batches = Batches(listed(windows), 2, 0)
    expected = []
    for step in range(4 * len(batches)):
        read = [windows[number] for row in batches.rows(step) for number in row]
        count = sum(len(window.labels) for window in read)
        loss = torch.stack([loss_alone(theirs, window) for window in read]).sum() / count
        adam.zero_grad()
        torch.autograd.backward(loss)
        adam.step()
        expected.append(float(loss.detach()))
    records, _ = trained(model, batches, given)
    assert [record.loss for record in records] == pytest.approx(expected, abs=2e-4)
    assert expected[-1] < expected[0] - 0.1


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(
    "saved", [("lm_head",), ("embed_tokens",), ("lm_head", "embed_tokens"), ("up_proj",)]
)
def test_modules_in_full_are_counted(saved: tuple[str, ...], tied: bool) -> None:
    base = toy("llama", tie_word_embeddings=tied)
    given = FinetuneLora(
        target_modules=("attention",), train_embeddings="none", modules_to_save=saved
    )
    model, spec = adapted_by(given, base)
    size = sum(p.numel() for p in model.parameters() if p.requires_grad)
    shapes = architecture(base.describe(), "config.json")
    assert trainable(shapes, COUNTED.with_params(given)) == size
    assert trainable(shapes, counted(spec)) == size


@pytest.mark.parametrize(
    "changes",
    [
        {"layers_to_transform": "last 1"},
        {"modules_to_save": "[lm_head]"},
        {"modules_to_save": "[embed_tokens, lm_head]"},
        {"optimizer": "muon"},
    ],
    ids=str,
)
@pytest.mark.slow
def test_the_memory_that_is_measured_is_predicted(changes: dict[str, str], tmp_path: Path) -> None:
    root = new_lines_project(tmp_path / "p", torch.float32)
    given = {
        **{"data": "data/lines.jsonl", "epochs": 1, "precision": "fp32", "batch_size": 4},
        **{"train_embeddings": "none", "target_modules": "attention"},
    }
    make(root, ["finetune_lora"], section_overrides("finetune_lora", {**given, **changes}))
    predicted, measured = logged_memory(root / "runs/finetune_lora/telemetry.csv")
    assert measured == pytest.approx(predicted, rel=0.03)


def test_a_merged_model_has_the_modules_that_trained_in_full(tmp_path: Path) -> None:
    """The merge compares its logits with those of base and adapter."""
    root = new_lines_project(tmp_path / "p", torch.float32)
    given = {
        **{"data": "data/lines.jsonl", "epochs": 1, "precision": "fp32"},
        **{"train_embeddings": "none", "modules_to_save": "[lm_head, norm]"},
        **{"learning_rate": 0.01, "layers_to_transform": "last 1", "target_modules": "[q_proj]"},
    }
    make(root, ["finetune_lora", "merge"], section_overrides("finetune_lora", given))
    stored = load_file(root / "artifacts/lora_adapter" / WEIGHTS)
    before, merged = (
        load_file(root / f"artifacts/{name}/model.safetensors")
        for name in ("expanded", "lora_merged")
    )
    in_full = [key.removeprefix(PREFIX) for key in stored if "lora_" not in key]
    assert len(in_full) > 4
    for name in in_full:
        assert torch.equal(merged[name], stored[PREFIX + name])
    changed = {name for name in before if not torch.equal(before[name], merged[name])}
    assert changed == {"model.layers.1.self_attn.q_proj.weight", *in_full} & before.keys()
