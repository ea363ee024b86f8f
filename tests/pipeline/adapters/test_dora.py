"""DoRA (Liu et al. 2024): its gradients against autograd and §4.3, its start, PEFT's numbers, and
its merge.
"""

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pipeline.adapters.attach import AdapterScale, adapter_layers, attach, disable_adapter
from pipeline.adapters.config import AdapterSpec
from pipeline.adapters.lora import DoRALinear, weight_out_in
from pipeline.adapters.low_rank import load_update
from pipeline.adapters.peft import load_adapter, save_adapter
from pipeline.errors import UserError
from pipeline.export.model_card import card
from pipeline.models.base import compute_in_fp32
from pipeline.models.quantized_linear import QuantizedLinear, quantize
from pipeline.project.params.sections import Quantization
from pipeline.views import models
from pipeline.weights.combine import low_rank_updates
from pipeline.weights.compare import values
from tests.helpers.checkpoints import adapter, checkpoint
from tests.helpers.json_files import read_json
from tests.helpers.real import ROWS, stock, toy
from tests.helpers.reference_merge import merged_model
from tests.helpers.side_by_side import randomized
from tests.helpers.stored_models import load_weights, merged_through_files
from tests.pipeline.adapters.test_peft_interop import IDS, NAMES, assert_same

SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 5), st.floats(0.1, 4))
CPU = torch.device("cpu")


def layer_of(base: nn.Module, rank: int, scale: float, folds: bool) -> DoRALinear:
    """In float64, away from where it begins."""
    torch.manual_seed(0)
    layer = DoRALinear(base.double().requires_grad_(False), rank, scale)
    assert layer.folds == isinstance(base, nn.Linear)
    layer.folds = folds and layer.folds
    with torch.no_grad():
        for parameter in (layer.lora_A, layer.lora_B, layer.magnitude):
            parameter.add_(torch.randn_like(parameter) / 3)
    return layer


def base_of(kind: str, outputs: int, inputs: int, bias: bool = True) -> nn.Module:
    torch.manual_seed(1)
    if kind == "conv1d":
        base: nn.Module = Conv1D(outputs, inputs)
        nn.init.normal_(base.bias)  # type: ignore[arg-type]
        return base
    return nn.Linear(inputs, outputs, bias=bias)


KINDS = pytest.mark.parametrize("kind", ["folded", "apart", "conv1d"])


@KINDS
@given(SHAPES, st.booleans())
def test_forward_and_gradients_are_autograds_on_the_papers_formula_with_its_norm_held_fixed(
    kind: str, shape: tuple[int, int, int, float], bias: bool
) -> None:
    outputs, inputs, rank, s = shape
    layer = layer_of(base_of(kind, outputs, inputs, bias), rank, s, kind == "folded")
    x = torch.randn(2, 3, inputs, dtype=torch.float64, requires_grad=True)
    A, B, m = (
        p.detach().clone().requires_grad_() for p in (layer.lora_A, layer.lora_B, layer.magnitude)
    )
    plain = x.detach().clone().requires_grad_()
    V = weight_out_in(layer.base) + s * B @ A
    y = F.linear(plain, m[:, None] / V.norm(dim=1, keepdim=True).detach() * V, layer.base.bias)  # type: ignore[arg-type]
    torch.testing.assert_close(layer(x), y)
    upstream = torch.randn_like(y)
    torch.autograd.backward(layer(x), upstream)
    torch.autograd.backward(y, upstream)
    for found, wanted in ((layer.lora_A, A), (layer.lora_B, B), (layer.magnitude, m), (x, plain)):
        torch.testing.assert_close(found.grad, wanted.grad)


@given(SHAPES, st.booleans())
def test_gradients_are_section_4_3s_closed_forms(
    shape: tuple[int, int, int, float], folds: bool
) -> None:
    """∂L/∂V' = m/‖V'‖·∂L/∂W' and ∂L/∂m = ⟨∂L/∂W', V'⟩/‖V'‖, each row by itself; then the product's
    rule.
    """
    outputs, inputs, rank, s = shape
    layer = layer_of(base_of("linear", outputs, inputs), rank, s, folds)
    x, upstream = (torch.randn(4, size, dtype=torch.float64) for size in (inputs, outputs))
    torch.autograd.backward(layer(x), upstream)
    A, B, m = (p.detach() for p in (layer.lora_A, layer.lora_B, layer.magnitude))
    V = weight_out_in(layer.base) + s * B @ A
    of_weight, norm = upstream.T @ x, V.norm(dim=1)
    of_direction = (m / norm)[:, None] * of_weight
    torch.testing.assert_close(layer.magnitude.grad, (of_weight * V).sum(1) / norm)
    torch.testing.assert_close(layer.lora_B.grad, s * of_direction @ A.T)
    torch.testing.assert_close(layer.lora_A.grad, s * B.T @ of_direction)
    assert layer.base.weight.grad is None


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["linear", "conv1d", "nf4"])
@pytest.mark.parametrize("size", [(40, 24), (300, 260)], ids=["small", "large"])
def test_a_new_layer_answers_exactly_like_its_base(
    size: tuple[int, int], kind: str, dtype: torch.dtype, adapter_dtype: torch.dtype
) -> None:
    base = base_of(kind, *size).to(dtype)
    if kind == "nf4":
        pytest.importorskip("bitsandbytes")
        base = QuantizedLinear(base, "nf4", CPU)
    x, layer = torch.randn(5, size[1], dtype=dtype), DoRALinear(base, 4, 0.5, adapter_dtype)
    assert torch.equal(layer(x), base(x))
    torch.testing.assert_close(
        layer.magnitude.detach(), weight_out_in(base).float().norm(dim=1), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("dtype, within", [(torch.float32, 1e-6), (torch.bfloat16, 1e-3)], ids=str)
@pytest.mark.parametrize("size", [0.001, 0.03, 1.0])
def test_norms_of_a_large_weight_are_found_without_the_product(
    dtype: torch.dtype, within: float, size: float
) -> None:
    base = base_of("linear", 500, 700).to(dtype)
    layer = DoRALinear(base, 8, 2.0, torch.float32)
    with torch.no_grad():
        layer.lora_A.normal_()
        layer.lora_B.normal_(std=size)
    A, B = layer.lora_A.to(dtype), layer.lora_B.to(dtype)  # what forward multiplies by
    direct = (weight_out_in(base).double() + 2 * B.double() @ A.double()).norm(dim=1)
    torch.testing.assert_close(layer._norms(A, B).double(), direct, rtol=within, atol=0)


def test_pissa_begins_at_the_base_with_dora_too() -> None:
    for size in ((40, 24), (300, 260)):
        base, x = base_of("linear", *size), torch.randn(5, size[1])
        layer = DoRALinear(base, 4, 0.5, init="pissa")
        torch.testing.assert_close(layer(x), base(x), atol=2e-6, rtol=1e-5)


# Whole models


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", NAMES)
def test_an_adapter_goes_from_peft_to_here_and_back_and_into_the_weights(
    family: str, tmp_path: Path
) -> None:
    base, names = toy(family, std=0.1), NAMES[family]
    options = {"use_dora": True, "use_rslora": family == "llama", "rank_pattern": {names[0]: 2}}
    config = LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=6, target_modules=list(names), **options
    )
    theirs = randomized(get_peft_model(stock(base), config))
    first, second = tmp_path / "first", tmp_path / "second"
    theirs.save_pretrained(first)
    ours = copy.deepcopy(base)
    spec = load_adapter(ours, Path("base"), first)
    assert isinstance(spec, AdapterSpec) and spec.dora
    assert_same(ours, theirs)
    assert len([name for name, _ in adapter_layers(ours)]) == len(spec.targets) * len(ours.blocks)
    second.mkdir()
    save_adapter(second, ours, spec, "base")
    assert_same(ours, PeftModel.from_pretrained(stock(base), second))
    base.save(tmp_path / "base")
    merged = merged_through_files(tmp_path / "base", first, tmp_path / "out")
    plain = theirs.merge_and_unload().state_dict()
    changed = [name for name in merged if any(f".{one}.weight" in name for one in names)]
    assert len(changed) == len(names) * len(ours.blocks)
    for name in changed:
        torch.testing.assert_close(merged[name], plain[name], atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_steps_of_training_are_pefts(family: str) -> None:
    base, names = toy(family, std=0.1), NAMES[family]
    config = LoraConfig(
        r=4, lora_alpha=6, target_modules=list(names), use_dora=True, init_lora_weights="orthogonal"
    )
    theirs, ours = get_peft_model(stock(base), config), copy.deepcopy(base)
    attach(ours, AdapterSpec(4, 6.0, names, dora=True))
    values = {
        name.replace(".default", ""): p for name, p in theirs.named_parameters() if p.requires_grad
    }
    with torch.no_grad():
        for name, layer in adapter_layers(ours):
            layer.lora_A.copy_(values[f"base_model.model.{name}.lora_A.weight"])
            layer.lora_B.copy_(values[f"base_model.model.{name}.lora_B.weight"])
    for model in (theirs, ours):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.2)
        for _ in range(4):
            optimizer.zero_grad()
            out = model(input_ids=IDS).logits if model is theirs else model(IDS)
            torch.autograd.backward(
                F.cross_entropy(out[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
            )
            optimizer.step()
    assert_same(ours, theirs)
    for name, layer in adapter_layers(ours):
        assert isinstance(layer, DoRALinear)
        other = values[f"base_model.model.{name}.lora_magnitude_vector.weight"]
        torch.testing.assert_close(layer.magnitude, other, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_switched_off_it_is_the_base_and_at_half_strength_half_the_change_of_each_weight() -> None:
    base = toy("llama", std=0.1)
    tuned, spec = copy.deepcopy(base), AdapterSpec(4, 6.0, ("q_proj",), dora=True)
    attach(tuned, spec)
    for _, layer in adapter_layers(tuned):
        layer.lora_B.normal_(std=0.3)
    whole = tuned(IDS)
    with disable_adapter(tuned):
        assert torch.equal(tuned(IDS), base(IDS))
    strength = AdapterScale(tuned, base, spec)
    half = copy.deepcopy(base)
    for name, layer in adapter_layers(tuned):
        assert isinstance(layer, DoRALinear)
        V = weight_out_in(layer.base) + layer.scale * layer.lora_B @ layer.lora_A
        new = layer.magnitude[:, None] * V / V.norm(dim=1, keepdim=True)
        half.get_parameter(f"{name}.weight").copy_((weight_out_in(layer.base) + new) / 2)
    strength.set(0.5)
    torch.testing.assert_close(tuned(IDS), half(IDS), atol=1e-4, rtol=1e-4)
    strength.set(1)
    assert torch.equal(tuned(IDS), whole)


def test_dora_on_an_embedding_is_refused() -> None:
    with pytest.raises(UserError, match=r"DoRA is for linears; model.embed_tokens is an embedding"):
        attach(toy("llama"), AdapterSpec(4, 6.0, ("q_proj", "embed_tokens"), dora=True))


DORA = AdapterSpec(3, 6.0, ("q_proj", "fc1"), dora=True)


def test_it_is_no_update_of_low_rank_and_what_takes_one_says_what_to_do(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base")
    one = adapter(tmp_path / "adapter", base, DORA)
    with pytest.raises(
        UserError,
        match=r"was trained with DoRA, which rescales .* Merge the adapter instead: lora merge",
    ):
        low_rank_updates(base, one)


def test_it_is_listed_described_and_compared_as_what_it_is(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base")
    one, other = (
        adapter(tmp_path / name, base, DORA, seed) for name, seed in (("one", 1), ("other", 2))
    )
    assert [found.method for found in models.adapters(tmp_path)] == ["dora", "dora"]
    assert "DoRA, rank 3" in card(one)
    lengths = {
        name: size
        for name, size in values(load_update(one), load_update(other))
        if "magnitude" in name
    }
    assert len(lengths) == 4 and all(size and size > 0 for size in lengths.values())


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", ["none", "nf4-dq"])
def test_a_sixteen_bit_model_is_compared_with_its_merge_in_fp32(
    family: str, kind: Quantization
) -> None:
    """As a merge's certificate does: what remains is the rounding of the merged weights."""
    model = toy(family, torch.bfloat16, std=0.1)
    if kind != "none":
        pytest.importorskip("bitsandbytes")
        quantize(model, kind, None, CPU)
    attach(model, AdapterSpec(4, 6.0, NAMES[family], dora=True), torch.float32)
    for _, layer in adapter_layers(model):
        layer.folds = False
        layer.lora_B.normal_(std=0.1)
    merged = merged_model(model)
    with compute_in_fp32(model), compute_in_fp32(merged):
        there, here = model(IDS), merged(IDS)
    assert there.dtype == torch.float32
    assert (there - here).abs().max() < 0.05 * there.abs().max()


def test_a_merge_into_sixteen_bits_sums_and_scales_in_fp32(tmp_path: Path) -> None:
    base = toy("gpt2", torch.bfloat16, std=0.1)
    base.save(tmp_path / "base")
    spec = AdapterSpec(4, 6.0, ("c_attn",), dora=True)
    tuned = copy.deepcopy(base)
    attach(tuned, spec, torch.float32)
    with torch.no_grad():
        for _, layer in adapter_layers(tuned):
            layer.lora_B.normal_(std=0.1)
    (tmp_path / "adapter").mkdir()
    save_adapter(tmp_path / "adapter", tuned, spec, "base")
    merged = merged_through_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    for name, layer in adapter_layers(tuned):
        assert isinstance(layer, DoRALinear)
        V = (
            weight_out_in(layer.base).double()
            + layer.scale * (layer.lora_B @ layer.lora_A).detach().double()
        )
        exact: Tensor = layer.magnitude.detach().double()[:, None] * V / V.norm(dim=1, keepdim=True)
        (found,) = (value for key, value in merged.items() if key.endswith(f"{name}.weight"))
        torch.testing.assert_close(found.double().T, exact, rtol=2**-8, atol=1e-6)
    assert read_json(tmp_path / "out/config.json")["vocab_size"] == ROWS
    assert load_weights(tmp_path / "out").keys() == load_weights(tmp_path / "base").keys()


def test_a_row_of_zeros_stays_one_and_nothing_turns_into_nan() -> None:
    base = nn.Linear(8, 4)
    with torch.no_grad():
        base.weight[1] = 0
    for folds in (True, False):
        layer = DoRALinear(base.requires_grad_(False), 2, 1.0)
        layer.folds = folds
        x = torch.randn(3, 8)
        torch.testing.assert_close(layer(x), base(x))
        torch.autograd.backward(layer(x).square().sum())
        assert all(
            p.grad is not None and p.grad.isfinite().all()
            for p in layer.parameters()
            if p.requires_grad
        )
