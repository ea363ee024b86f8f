"""LoRA's dropout against PEFT's under the same masks, NEFTune against transformers', and where
neither may be.
"""

import zlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers.integrations.neftune import neftune_post_forward_hook

from pipeline.adapters.attach import adapter_layers, attach, tensors
from pipeline.adapters.batched import lora_layers
from pipeline.adapters.config import AdapterSpec
from pipeline.adapters.lora import LoRALinear
from pipeline.models.transformers_model import TransformersModel
from pipeline.project.params.sections import Training
from pipeline.stages.methods.lora import FinetuneLora
from pipeline.training.batches import Batches, collate
from pipeline.training.loop import steps
from pipeline.training.noise import LearnerNoise, training_noise
from pipeline.training.step import Evaluation, loss_of
from pipeline.training.task import TrainingTask, build_optimizer
from tests.helpers.checkpoints import token_ids
from tests.helpers.real import listed, stock, toy, windows_of, with_lora

DROPOUT = 0.4
ALPHA = 5.0


def mask_of(name: str, x: Tensor) -> Tensor:
    """The same for a layer of either library."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.rand(x.shape, generator=generator) >= DROPOUT


class Masked(nn.Module):
    """In place of PEFT's dropout."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        return x * mask_of(self.name, x) / (1 - DROPOUT)


# without biases, and Conv1D with them
TARGETS = {"llama": ("q_proj", "down_proj"), "gpt2": ("c_attn", "mlp.c_proj")}


@pytest.mark.parametrize("folds", [True, False], ids=["small matrices", "as large ones"])
@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("family", TARGETS)
def test_a_step_with_dropout_is_pefts_under_the_same_masks(
    family: str, dora: bool, folds: bool
) -> None:
    names, ids = (
        TARGETS[family],
        token_ids(90, 2, 7, seed=0),
    )
    ours = with_lora(toy(family), names=names, dora=dora, dropout=DROPOUT)
    config = LoraConfig(
        r=3, lora_alpha=6, target_modules=list(names), use_dora=dora, lora_dropout=DROPOUT
    )
    theirs = get_peft_model(stock(toy(family)), config).train()
    by_key = tensors(ours, AdapterSpec(3, 6.0, names))
    peft = {
        name.replace(".default", ""): p for name, p in theirs.named_parameters() if p.requires_grad
    }
    with torch.no_grad():
        for name, p in by_key.items():
            if "magnitude" not in name:
                peft[name].copy_(p)
    for name, module in theirs.named_modules():
        if hasattr(module, "lora_dropout"):
            module.lora_dropout["default"] = Masked(name.removeprefix("base_model.model."))
    for name, layer in adapter_layers(ours):
        assert isinstance(layer, LoRALinear)
        layer.folds = folds and layer.folds
        layer.keep = lambda x, name=name: mask_of(name, x)
    losses = []
    for logits in (ours(ids), theirs(input_ids=ids).logits):
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        torch.autograd.backward(loss)
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    plain = with_lora(toy(family), names=names, dora=dora)
    assert (
        abs(
            F.cross_entropy(plain(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()
            - losses[0]
        )
        > 1e-3
    )
    peft_by_key = {name.replace("_vector.weight", "_vector"): p for name, p in peft.items()}
    for name, p in by_key.items():
        torch.testing.assert_close(p.grad, peft_by_key[name].grad, rtol=1e-3, atol=1e-5)


def test_pissas_subtracted_product_sees_no_dropout() -> None:
    """As in PEFT, where it is taken from the base's weight."""
    torch.manual_seed(0)
    base, x = nn.Linear(6, 5).requires_grad_(False), torch.randn(3, 6)
    layer = LoRALinear(base, 2, 0.5, init="pissa", dropout=DROPOUT)
    layer.keep = lambda x: mask_of("layer", x)
    residual = base.weight - 0.5 * layer.lora_B @ layer.lora_A
    expected = (
        F.linear(x, residual, base.bias)
        + 0.5 * Masked("layer")(x) @ layer.lora_A.T @ layer.lora_B.T
    )
    torch.testing.assert_close(layer(x), expected)
    layer.folds = False
    torch.testing.assert_close(layer(x), expected)


def test_masks_drop_their_share_and_keep_the_mean() -> None:
    noise, x = LearnerNoise(FinetuneLora(lora_dropout=DROPOUT)), torch.ones(1000, 100)
    layer = LoRALinear(nn.Linear(100, 2), 2, 1.0, dropout=DROPOUT)
    layer.keep = lambda x: noise.keep("layer", DROPOUT, x)
    assert layer.dropped(x) is x, "outside a training batch"
    seen = []
    for step in (0, 1, 0):
        noise.begin(step)
        for _ in range(2):
            with noise.during([1000]):
                seen.append(layer.dropped(x))
    assert all(
        sorted({*kept.flatten().tolist()}) == pytest.approx([0, 1 / (1 - DROPOUT)]) for kept in seen
    )
    assert all(kept.mean().item() == pytest.approx(1, abs=0.01) for kept in seen)
    first, second, third, *again = seen[:4] + seen[4:]
    assert not torch.equal(first, second) and not torch.equal(first, third)
    assert torch.equal(again[1], first) and torch.equal(again[2], second), "of step 0 once more"


# NEFTune


def test_noise_on_a_sequence_is_that_of_transformers() -> None:
    """Drawn from the same generator's state."""
    noise, x = LearnerNoise(Training(neftune_alpha=ALPHA)), torch.randn(11, 24)
    with noise.during([11]):
        ours = noise.perturb(x)
        seed = noise._generator("embeddings", x.device).initial_seed()
    module: Any = nn.Embedding(3, 24).train()
    module.neftune_noise_alpha = ALPHA
    torch.manual_seed(seed)
    theirs = neftune_post_forward_hook(module, (), x[None].clone())[0]
    assert (ours - x).abs().max() > 0.5 * ALPHA / (11 * 24) ** 0.5
    torch.testing.assert_close(ours, theirs)


def test_each_sequence_of_a_packed_row_has_noise_of_its_own_length() -> None:
    noise, lengths, x = (
        LearnerNoise(Training(neftune_alpha=ALPHA)),
        [3, 50, 9],
        torch.zeros(62, 400),
    )
    with noise.during(lengths):
        parts = noise.perturb(x).split(lengths)  # type: ignore[no-untyped-call]
    for length, part in zip(lengths, parts, strict=True):
        bound = ALPHA / (length * 400) ** 0.5
        assert 0.99 * bound < part.abs().max() <= bound
        assert abs(part.mean()) < 0.1 * bound and part.std().item() == pytest.approx(
            bound / 3**0.5, rel=0.05
        )


# Where there is noise


def noisy(checkpointing: Any = "none", **changes: Any) -> tuple[TransformersModel, TrainingTask]:
    settings = FinetuneLora(
        **{
            "epochs": 2,
            "lora_dropout": DROPOUT,
            "neftune_alpha": ALPHA,
            "precision": "fp32",
            **changes,
        }
    )
    model = toy("llama")
    torch.manual_seed(0)
    attach(
        model,
        AdapterSpec(3, 6.0, ("q_proj", "v_proj"), dropout=settings.lora_dropout),
        init="kaiming",
    )
    model.checkpoint_blocks(checkpointing)
    data = listed(windows_of((4, 6, 5, 3, 8)))
    batches = Batches(data, 2, settings.seed, settings.gradient_accumulation_steps)
    evaluation = Evaluation(Batches(data, 2, seed=None), every=1, patience=0)
    return model, TrainingTask.of_one(model.train(), batches, settings, None, evaluation)


def test_both_change_every_step_and_neither_its_evaluation() -> None:
    data = collate(windows_of((4, 6, 5, 3, 8)))
    losses = []
    for changes in (
        {"lora_dropout": 0.0, "neftune_alpha": 0.0},
        {"lora_dropout": 0.0},
        {"neftune_alpha": 0.0},
        {},
    ):
        model, task = noisy(**changes)
        for record in steps(task, build_optimizer(model, task.settings)):
            with torch.no_grad():
                assert record[0].eval_loss == pytest.approx(loss_of(model, data).item(), rel=1e-5)
        losses.append([record[0].loss])
        assert all(
            layer.keep is None
            for _, layer in adapter_layers(model)
            if isinstance(layer, LoRALinear)
        )
    assert len({loss for (loss,) in losses}) == 4


@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_block_computed_again_in_backward_has_the_same_masks(accumulated: int) -> None:
    found = []
    for how in ("none", "selective", "full"):
        model, task = noisy(how, gradient_accumulation_steps=accumulated)
        found.append([record[0] for record in steps(task, build_optimizer(model, task.settings))])
    assert found[0] == found[1] == found[2]


def test_a_run_without_either_hooks_nothing() -> None:
    model, task = noisy(lora_dropout=0.0, neftune_alpha=0.0)
    with training_noise(model, [task.settings]):
        assert not model.embeddings._forward_hooks
        assert all(layer.keep is None for _, _, layer in lora_layers(model))
    next(steps(task, build_optimizer(model, task.settings)))
    assert [learner.noise for learner in task.learners] == [None]
    model, task = noisy()
    with training_noise(model, [task.settings]):
        assert model.embeddings._forward_hooks
    assert not model.embeddings._forward_hooks
