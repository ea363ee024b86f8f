"""Training in 16 bits: fp16 loss scaling, fp32 master weights, and the saved precision."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.models.load import Base, load_base
from pipeline.models.quantized_linear import quantize
from pipeline.project.logs.run_log import Step, epoch_means, read_steps
from pipeline.project.params.sections import Quantization, Training
from pipeline.stages.methods.lora import FinetuneLora
from pipeline.training import optimizer as optimizers
from pipeline.training.batches import Batches
from pipeline.training.optimizer import LARGEST_SCALE, FlatOptimizer
from pipeline.training.task import build_optimizer
from tests.helpers.families import FAMILIES, new_project
from tests.helpers.projects import load, make, make_base
from tests.helpers.real import listed, steps_of, toy, trained, windows_of, with_lora

LENGTHS = (5, 9, 2, 14, 7, 3)
FP16 = Training(epochs=20, learning_rate=1e-2, precision="fp16")


def batches() -> Batches:
    return Batches(listed(windows_of(LENGTHS)), 2, 0)


def adapters(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


# fp16


def test_pitfall_18_fp16_an_fp16_base_trains_fp32_adapters_on_the_cpu() -> None:
    model = with_lora(toy("llama", torch.float16, std=0.1), torch.float32)
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    assert {p.dtype for p in frozen.values()} == {torch.float16}
    assert {p.dtype for p in adapters(model).values()} == {torch.float32}
    found, _ = trained(model, batches(), FP16)
    assert all(math.isfinite(record.loss) and math.isfinite(record.grad_norm) for record in found)
    means = epoch_means(found)
    assert means[-1] < 0.8 * means[0]
    assert all(
        torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen
    )
    exact, _ = trained(
        with_lora(toy("llama", std=0.1), torch.float32), batches(), Training(epochs=2)
    )
    again, _ = trained(
        with_lora(toy("llama", torch.float16, std=0.1), torch.float32),
        batches(),
        Training(epochs=2),
    )
    assert [r.loss for r in again] == pytest.approx([r.loss for r in exact], rel=0.01)
    assert [r.grad_norm for r in again] == pytest.approx([r.grad_norm for r in exact], rel=0.05)


def test_pitfall_18_fp16_a_base_in_nf4_trains_in_fp16_with_a_loss_scale() -> None:
    model = toy("llama", torch.bfloat16, std=0.1)
    quantize(model, "nf4-dq", torch.float16, torch.device("cpu"))
    with_lora(model, torch.float32)
    optimizer = build_optimizer(model.train(), FP16)
    assert optimizer.scale == LARGEST_SCALE and model.dtype == torch.float16
    means = epoch_means([*steps_of(model, batches(), FP16, optimizer)])
    assert means[-1] < 0.8 * means[0]


def run_from(scale: float) -> tuple[list[Step], dict[str, Tensor], list[float], int]:
    """Train from an initial loss scale: records, adapters, the scale after each step, number of
    forward passes.
    """
    model = with_lora(toy("llama", torch.float16), torch.float32)
    optimizer = FlatOptimizer(model.train(), scaled=True)
    optimizer.restore({**optimizer.state(), "loss_scale": torch.tensor([scale, 0.0])})
    reads: list[int] = []
    model.embeddings.register_forward_hook(lambda *_: reads.append(1))
    records, scales = [], []
    for record in steps_of(model, batches(), Training(epochs=2, precision="fp16"), optimizer):
        records.append(record)
        scales.append(optimizer.scale)
    return records, adapters(model), scales, len(reads)


def test_pitfall_18_fp16_an_overflow_halves_the_scale_and_repeats_the_step_so_that_no_data_is_lost() -> (
    None
):
    records, weights, scales, reads = run_from(LARGEST_SCALE)
    halvings = round(math.log2(LARGEST_SCALE / scales[-1]))
    assert halvings > 0 and scales == sorted(scales, reverse=True)
    assert len(records) == 2 * len(batches()) and records[-1].tokens == 2 * sum(LENGTHS)
    calm, others, constant, once = run_from(scales[-1])
    assert constant == [scales[-1]] * len(calm)
    assert reads == once + halvings
    assert calm == records, "no step is skipped, and none uses an overflowed gradient"
    assert all(torch.equal(weight, others[name]) for name, weight in weights.items())


def test_pitfall_18_fp16_small_gradients_survive_because_the_loss_is_scaled() -> None:
    """Multiplied by 2⁻¹⁶, as gradients of a large batch are; fp16's least number is 2⁻²⁴."""

    def norm(scaled: bool) -> float:
        parameter = nn.Linear(4, 1, bias=False).half()
        optimizer = FlatOptimizer(parameter, scaled=scaled)
        loss = (parameter(torch.ones(1, 4).half()).float() * 2.0**-26).sum()
        torch.autograd.backward(loss * optimizer.scale)
        return optimizer.collect_gradients().item()

    assert norm(scaled=False) == 0
    assert norm(scaled=True) == pytest.approx(2 * 2.0**-26, rel=1e-3)


def test_pitfall_18_fp16_the_scale_grows_again_after_many_steps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(optimizers, "GROWS_AFTER", 3)
    *_, scales, _ = run_from(4.0)
    assert scales == [4.0, 4.0, 8.0, 8.0, 8.0, 16.0]


def test_pitfall_18_fp16_adapters_are_refused_with_the_reason(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    for section in ("finetune_lora", "finetune_prefix", "finetune_prompt"):
        path.write_text(f"{section}:\n  adapter_precision: fp16\n", encoding="utf-8")
        problem = rf"{section}.adapter_precision must be one of fp32, bf16, got 'fp16': gradients of fp16 weights .* Edit"
        with pytest.raises(UserError, match=problem):
            load(path)
    assert FinetuneLora().adapter_precision == "fp32"


def test_pitfall_18_fp16_goes_through_the_stage_and_full_fine_tuning_too(tmp_path: Path) -> None:
    root = new_project(tmp_path / "p", FAMILIES["llama"], torch.float16)
    half = [
        "finetune_lora.precision=fp16",
        "finetune_full.precision=fp16",
        "finetune_full.epochs=8",
    ]
    make(
        root,
        ["pretrain", "expand_vocab", "finetune_lora", "finetune_full"],
        [*half, "finetune_lora.epochs=8"],
    )
    for name in ("lora_adapter", "full_finetuned"):
        means = epoch_means(read_steps(root / "artifacts" / name / "loss.csv"))
        assert means[-1] < 0.7 * means[0]
    stored = load_file(root / "artifacts/lora_adapter/adapter_model.safetensors")
    assert {t.dtype for name, t in stored.items() if ".lora_" in name} == {torch.float32}


# 16-bit weights


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_updates_too_small_for_16_bits_add_up_behind_them(dtype: torch.dtype) -> None:
    """Steps of 1e-4 from 1.0, where the next smaller bf16 number is 0.996: Adam on bf16 weights
    never moves.
    """
    model, plain = (nn.Linear(3, 2, bias=False).to(dtype) for _ in range(2))
    for module in (model, plain):
        nn.init.ones_(module.weight)
    flat, adam = FlatOptimizer(model), torch.optim.Adam(plain.parameters(), lr=1e-4)
    for _ in range(100):
        for module in (model, plain):
            torch.autograd.backward(module(torch.ones(1, 3, dtype=dtype)).sum())
        flat.collect_gradients()
        flat.step(1e-4)
        adam.step()
        adam.zero_grad()
    ((parameter, weights),) = flat.trained()
    torch.testing.assert_close(weights, torch.full((2, 3), 0.99), rtol=0, atol=1e-5)
    assert parameter is model.weight and torch.equal(model.weight, weights.to(dtype))
    if dtype == torch.bfloat16:
        assert (plain.weight == 1).all()


def weights_of(root: Path, name: str) -> dict[str, Tensor]:
    return load_file(root / "artifacts" / name / "model.safetensors")


@pytest.fixture(scope="module")
def expanded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An fp32 base, ready to train. Each test runs another stage on it."""
    # a model that is not tied
    return make_base(new_project(tmp_path_factory.mktemp("precision") / "p", FAMILIES["qwen3"]))


def test_bf16_training_of_an_fp32_checkpoint_adds_to_it_and_rounds_none_of_it(
    expanded: Path,
) -> None:
    tiny = ["finetune_full.learning_rate=1e-6", "finetune_full.epochs=3"]
    base = weights_of(expanded, "expanded")
    changes = {}
    for precision in ("fp32", "bf16"):
        make(expanded, ["finetune_full"], [*tiny, f"finetune_full.precision={precision}"])
        after = weights_of(expanded, "full_finetuned")
        assert {t.dtype for t in after.values()} == {torch.float32}
        changes[precision] = {name: after[name] - base[name] for name in base}
    steps = len(read_steps(expanded / "artifacts/full_finetuned/loss.csv"))
    for name, exact in changes["fp32"].items():
        rounded = changes["bf16"][name]
        assert 0 < rounded.abs().max() <= steps * 1.2e-6, name
        alike = torch.cosine_similarity(exact.flatten(), rounded.flatten(), dim=0)
        assert alike > 0.8, name
    unread = [
        (changes[precision]["model.embed_tokens.weight"] == 0).all(dim=1)
        for precision in ("fp32", "bf16")
    ]
    assert unread[0].any() and torch.equal(*unread)


def test_layers_frozen_in_bf16_stay_those_of_the_fp32_checkpoint_bit_for_bit(
    expanded: Path,
) -> None:
    half = ["finetune_freeze.precision=bf16", "finetune_freeze.train_embeddings=false"]
    make(expanded, ["finetune_freeze"], half)
    before, after = weights_of(expanded, "expanded"), weights_of(expanded, "layer_frozen")
    assert any((t != t.bfloat16().float()).any() for t in before.values()), (
        "the weights are not bf16 values"
    )
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if ".layers.1." in name}
    assert {t.dtype for t in after.values()} == {torch.float32}


def test_a_base_whose_own_code_is_trusted_is_trusted_where_its_weights_are_written(
    expanded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []

    def spy(
        folder: Path,
        precision: str | None,
        trust_remote_code: bool,
        quantization: Quantization = "none",
    ) -> Base:
        asked.append(trust_remote_code)
        return load_base(folder, precision, trust_remote_code, quantization)

    monkeypatch.setattr("pipeline.stages.finetune.load_base", spy)
    trusted = [
        "import.trust_remote_code=true",
        "finetune_freeze.precision=bf16",
        "finetune_freeze.epochs=1",
    ]
    make(expanded, ["finetune_freeze"], trusted)
    assert asked == [True, True]
