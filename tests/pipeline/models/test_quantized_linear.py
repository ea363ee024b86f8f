"""A base in few bits: what bitsandbytes itself makes of it, in the calculator's bytes, from
training to the merge.
"""

import copy
import sys
from collections.abc import Iterator
from importlib import metadata
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline.adapters.config import AdapterSpec
from pipeline.adapters.peft import save_adapter
from pipeline.calc.families import architecture
from pipeline.calc.settings import precision
from pipeline.files.artifact import seal
from pipeline.files.base_model import base_fingerprint
from pipeline.models import quantized_linear
from pipeline.models.base import compute_in_fp32
from pipeline.models.quantized_linear import Quantization, QuantizedLinear, quantizable, quantize
from pipeline.project import provenance
from tests.conftest import Lora
from tests.helpers.json_files import read_json
from tests.helpers.projects import BRIEF, folder_bytes, logged_memory, make, refusal
from tests.helpers.real import toy, with_lora
from tests.helpers.reference_merge import merged_model
from tests.helpers.stored_models import load_weights, merged_through_files

bnb = pytest.importorskip("bitsandbytes")
CPU = torch.device("cpu")
KINDS: tuple[Quantization, ...] = ("int8", "nf4", "nf4-dq")


@pytest.mark.parametrize("kind", KINDS)
def test_products_and_gradients_are_those_of_the_dequantized_weight(kind: Quantization) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(96, 160)
    layer, x = QuantizedLinear(linear, kind, CPU), torch.randn(5, 96, requires_grad=True)
    y = layer(x)
    weight = layer.weight
    torch.testing.assert_close(y, F.linear(x, weight, linear.bias))
    wanted = torch.randn_like(y)
    (gradient,) = torch.autograd.grad((y * wanted).sum(), x)
    torch.testing.assert_close(gradient, wanted @ weight)
    assert 0 < (weight - linear.weight).abs().max() < {"int8": 1e-3}.get(kind, 3e-2)


@pytest.mark.parametrize("double", [False, True])
def test_nf4_is_the_weight_of_bitsandbytes_own_layer(double: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(192, 64, dtype=torch.bfloat16)
    theirs = bnb.nn.Linear4bit(
        192, 64, quant_type="nf4", compress_statistics=double, compute_dtype=torch.bfloat16
    )
    theirs.load_state_dict(linear.state_dict())
    theirs = theirs.to("cpu")
    x = torch.randn(7, 192, dtype=torch.bfloat16)
    there = theirs(x)
    ours = QuantizedLinear(linear, "nf4-dq" if double else "nf4", CPU)
    torch.testing.assert_close(ours(x), there, atol=2e-2, rtol=2e-2)
    weight = bnb.functional.dequantize_4bit(theirs.weight.data, theirs.weight.quant_state)
    assert torch.equal(weight.reshape(64, 192).to(torch.bfloat16), ours.weight)


@pytest.mark.parametrize("kind", ["nf4", "nf4-dq"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_product_of_bitsandbytes_which_gpus_use_is_ours(
    kind: Quantization, dtype: torch.dtype
) -> None:
    """Inputs in whole blocks: its kernel for CPUs is wrong for others."""
    torch.manual_seed(0)
    layer = QuantizedLinear(nn.Linear(192, 160, dtype=dtype), kind, CPU)
    results = []
    for product in (layer, layer.product_4bit):
        x = (
            torch.randn(3, 5, 192, generator=torch.Generator().manual_seed(1))
            .to(dtype)
            .requires_grad_()
        )
        y = product(x)
        results.append((y, *torch.autograd.grad(y.float().square().sum(), x)))
    tolerance = 1e-4 if dtype == torch.float32 else 0.03
    for ours, theirs in zip(*results, strict=True):
        assert theirs.dtype == dtype
        torch.testing.assert_close(
            theirs / ours.abs().max(), ours / ours.abs().max(), rtol=0, atol=tolerance
        )


class Copies(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the copies from one device to another."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        devices = {
            leaf.device for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)
        }
        self.count += len(devices) > 1
        return out


@pytest.mark.usefixtures("without")
@pytest.mark.parametrize("kind", ["nf4", "nf4-dq"])
def test_without_bitsandbytes_its_tables_stay_on_the_device(kind: Quantization) -> None:
    layer = QuantizedLinear(nn.Linear(96, 160), kind, CPU).to("meta")
    x = torch.randn(5, 96, device="meta", requires_grad=True)
    layer(x)
    with Copies() as copies:  # type: ignore[no-untyped-call]
        torch.autograd.backward(layer(x).sum())
    assert copies.count == 0 and x.grad is not None


@pytest.mark.parametrize("kind", KINDS)
def test_its_bytes_are_the_calculators(kind: Quantization) -> None:
    model = toy("llama", torch.bfloat16, hidden_size=256, intermediate_size=512)
    shapes = architecture(model.describe(), "the toy")
    quantize(model, kind, None, CPU)
    held = sum(
        t.nbytes for t in {id(t): t for t in (*model.parameters(), *model.buffers())}.values()
    )
    assert held == pytest.approx(
        precision(kind).weights(shapes.quantizable, shapes.total), rel=0.02
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_a_merge_through_files_is_onto_the_weights_that_were_trained_on(
    family: str, kind: Quantization, tmp_path: Path
) -> None:
    """Written so that the adapter's manifest names the few bits, as after training."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    model = toy(family, torch.bfloat16)
    model.save(base)
    stored, linears = copy.deepcopy(model), quantizable(model)
    quantize(model, kind, None, CPU)
    names = ("c_attn",) if family == "gpt2" else ("q_proj", "v_proj")
    tuned = with_lora(model, names=names)
    adapter.mkdir()
    save_adapter(adapter, tuned, AdapterSpec(3, 6.0, names), "base")
    (base / "tokenizer.json").write_text("{}", encoding="utf-8")
    params = {"rank": 3, "alpha": 6.0, "quantization": kind}
    seal(adapter, {"kind": "adapter", "params": params, "base": base_fingerprint(base)})
    written = merged_through_files(base, adapter, tmp_path / "out")
    merged_model(tuned).save(tmp_path / "memory")
    kept = load_weights(tmp_path / "memory")
    assert written.keys() == kept.keys()
    assert all(torch.equal(written[name], weight) for name, weight in kept.items())
    assert all(
        not torch.equal(kept[f"{name}.weight"], stored.get_parameter(f"{name}.weight"))
        for name in linears
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_on_few_bits_is_merged_to_the_last_bit_and_says_what_a_merge_changes(
    kind: Quantization, project: Path
) -> None:
    few = [*BRIEF, f"finetune_lora.quantization={kind}"]
    make(project, ["finetune_lora", "merge"], few)
    certificate = read_json(project / "artifacts/lora_merged/certificate.json")
    assert certificate["trained_on"] == kind
    assert certificate["max_logit_difference"] == 0, (
        "small linears are folded before their product, in few bits too"
    )
    assert certificate["merged_on_stored_weights"]["max_logit_difference"] > 0.01
    assert certificate["quantization_alone"]["max_logit_difference"] > 0.01
    assert certificate["same_first_choices"] == certificate["prompts_checked"]


@pytest.mark.parametrize("kind", KINDS)
def test_minigpt_in_sixteen_bits_trains_on_few_bits_with_the_memory_that_is_predicted(
    kind: Quantization, project: Path
) -> None:
    """Its table of positions is a buffer, which follows the weights; embeddings and head train in
    full.
    """
    settings = ("precision=bf16", f"quantization={kind}", "train_embeddings=all")
    make(project, ["finetune_lora"], [*BRIEF, *(f"finetune_lora.{one}" for one in settings)])
    predicted, measured = logged_memory(project / "runs/finetune_lora/telemetry.csv")
    assert 0.8 < predicted / measured < 1, (
        "beside it, the weights of one linear are made anew at a time"
    )


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """bitsandbytes is not installed."""
    real = metadata.version

    def version(name: str) -> str:
        if name == "bitsandbytes":
            raise PackageNotFoundError(name)
        return real(name)

    caches = (quantized_linear._bitsandbytes, provenance.versions)
    for each in caches:
        each.cache_clear()
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setattr("importlib.metadata.version", version)
    yield
    for each in caches:
        each.cache_clear()


@pytest.mark.parametrize("kind", ["nf4", "nf4-dq"])
def test_without_bitsandbytes_a_run_on_four_bits_writes_the_same_but_its_version(
    kind: str, project: Path, request: pytest.FixtureRequest
) -> None:
    few = [*BRIEF, f"finetune_lora.quantization={kind}"]
    folder, merged = (
        project / "artifacts/lora_adapter",
        project / "artifacts/lora_merged/model.safetensors",
    )
    there = make(project, ["finetune_lora"], few)
    make(project, ["merge"], few)
    written, wide = folder_bytes(folder), merged.read_bytes()
    request.getfixturevalue("without")
    here = make(project, ["finetune_lora"], few)
    make(project, ["merge"], few)
    assert "bitsandbytes" not in here["versions"] and there["versions"].pop("bitsandbytes")
    assert here == there
    again = folder_bytes(folder)
    assert again.pop("manifest.json") != written.pop("manifest.json")
    assert again == written
    assert merged.read_bytes() == wide


@pytest.mark.usefixtures("without")
def test_without_bitsandbytes_eight_bits_are_refused_with_what_goes_without(
    cli: Lora, project: Path
) -> None:
    said = refusal(cli("finetune", "lora", "--set", "finetune_lora.quantization=int8", cwd=project))
    assert (
        "quantization int8 needs bitsandbytes" in said and "nf4-dq, which does not need it" in said
    )


def test_a_table_of_integers_stays_as_it_is() -> None:
    """DeepSeek V4 has one: a token's experts."""
    model = toy("llama", torch.float32)
    model.blocks[0].register_buffer("table", torch.tensor([1, 257]))
    quantize(model, "nf4", torch.bfloat16, CPU)
    assert model.state_dict()["model.layers.0.table"].tolist() == [1, 257]


@torch.no_grad()
def test_a_small_16_bit_linear_in_few_bits_is_compared_in_fp32() -> None:
    """As a merge's certificate does, on any prompts."""
    model = toy("llama", torch.bfloat16)
    quantize(model, "nf4-dq", None, CPU)
    tuned, ids = with_lora(model, torch.float32), torch.arange(3, 12)[None]
    merged = merged_model(tuned)
    with compute_in_fp32(tuned), compute_in_fp32(merged):
        there, here = tuned(ids), merged(ids)
    assert there.dtype == torch.float32
    assert (there - here).abs().max() < 0.05 * there.abs().max(), "what writing it in bf16 rounds"
