"""Quantized merges: what bitsandbytes, gguf and llama.cpp make of the files, and what is measured."""

import json
from pathlib import Path
from typing import Any

import bitsandbytes.functional
import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from pipeline.adapters.config import AdapterSpec
from pipeline.export.into import describe
from pipeline.export.into.codes import CODINGS, codes_of, rounded_for_inputs, values_of, with_codes
from pipeline.export.into.gptq import input_grams, linear_widths
from pipeline.export.into.update import Stored, survival
from pipeline.export.llama_cpp import LlamaCpp
from pipeline.inference.engine import load
from tests.conftest import Lora
from tests.helpers.checkpoints import adapter
from tests.helpers.families import FAMILIES, WIDE, Family, new_project
from tests.helpers.json_files import read_json
from tests.helpers.side_by_side import logits, ours, theirs

pytestmark = pytest.mark.filterwarnings("ignore")
# rows that blocks of 256 divide
IN_Q4_K = {**WIDE, "hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
IDS = (5, 9, 20, 17, 3, 64)
LEARNED = ("The red cat sat on the mat.", "A small dog ran home.", "The bird sang.")


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def in_blocks(weight: Tensor, kind: Type) -> Tensor:
    """What the gguf package makes of a matrix; of a type that it cannot write, random blocks."""
    if kind in (Type.Q8_0, Type.Q5_0):
        return torch.from_numpy(gguf.quants.quantize(weight.numpy(), kind).view(np.uint8))
    count, size = gguf.GGML_QUANT_SIZES[kind]
    random = torch.Generator().manual_seed(1)
    shape = len(weight), weight.shape[1] // count, size
    blocks = torch.randint(0, 256, shape, dtype=torch.uint8, generator=random)
    scale = torch.tensor([0.01], dtype=torch.float16).view(torch.uint8)
    places = {Type.Q4_K: (0, 2), Type.Q6_K: (208,)}[kind]
    for place in places:
        blocks[..., place : place + 2] = scale
    return blocks.flatten(1)


@pytest.mark.parametrize("kind", CODINGS)
def test_other_codes_change_nothing_else_and_a_step_is_the_same_everywhere(kind: Type) -> None:
    data = in_blocks(drawn(6, 512), kind)
    codes = codes_of(data, kind)
    assert torch.equal(with_codes(data, kind, codes), data)
    zero, one, most = (values_of(with_codes(data, kind, codes * 0 + n), kind) for n in (1, 2, 15))
    torch.testing.assert_close(zero + 14 * (one - zero), most, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(zero + (one - zero) * (codes.float() - 1), values_of(data, kind))


@pytest.mark.parametrize("kind", CODINGS)
def test_gptq_loses_less_of_the_outputs_than_llama_cpps_codes(kind: Type) -> None:
    weight, x = drawn(24, 256), drawn(400, 40) @ drawn(40, 256, seed=1) + 0.1 * drawn(400, 256)
    data = in_blocks(weight, kind)
    rounded = rounded_for_inputs(data, kind, weight, x.T @ x)
    nearest = rounded_for_inputs(data, kind, weight, torch.eye(256))
    errors = [((values_of(d, kind) - weight) @ x.T).norm() for d in (rounded, nearest)]
    assert errors[0] < 0.7 * errors[1]


@pytest.mark.parametrize(("name", "moved"), [("all", 0.5), ("none", 0.0), ("half", 0.25)])
def test_survival_is_the_share_of_codes_rows_and_update(name: str, moved: float) -> None:
    """A grid of whole numbers; half of the numbers of the rows that move get half a step or more."""
    weight = torch.zeros(4, 8)
    update = torch.zeros(4, 8)
    rows = {"all": 4, "none": 0, "half": 2}[name]
    update[:rows, ::2], update[:rows, 1::2] = 0.75, 0.25
    update[rows:] = 0.25
    stored = [Stored(w.round().to(torch.uint8), w.round()) for w in (weight, weight + update)]
    found = survival(weight + 0.125, weight + 0.125 + update, *stored)
    assert found["codes_changed"] == moved and found["rows_changed"] == rows / 4
    size = update.norm()
    after = stored[1].values - weight - 0.125
    assert found["contained"] == pytest.approx(float((after * update).sum() / size**2))
    assert found["lost"] == pytest.approx(float((stored[1].values - update).norm() / size))
    assert found["share_of_step"] == pytest.approx(float(size / (0.125 * 32**0.5)))


def project(
    root: Path, sizes: dict[str, Any] = WIDE, tied: bool = True, dora: bool = False
) -> Path:
    """An adapter of random numbers on a toy, whose weights are small enough for fp16's rounding."""
    base = new_project(root / "project", Family("llama", sizes, tied=tied, rows=128)) / "base"
    file = base / "model.safetensors"
    small = {name: tensor * 0.4 for name, tensor in load_file(file).items()}
    save_file(small, file, metadata={"format": "pt"})
    rows = [json.dumps({"text": text}) for text in LEARNED]
    (root / "data.jsonl").write_text("\n".join(rows))
    return adapter(root / "adapter", base, AdapterSpec(4, 1, "all-linear", dora=dora))


def merged(cli: Lora, source: Path, kind: str, *more: str) -> tuple[Path, dict[str, Any], str]:
    """The folder of a merge, what its certificate says of rounding, and the output."""
    out = source.parent / "out"
    command = ("merge", "--adapter", str(source), "--into", kind, "--out", str(out), *more)
    code, said, errors = cli(*command, cwd=source.parent)
    assert code == 0, errors
    return out, read_json(out / "certificate.json")["into"], said


@pytest.mark.parametrize("name", ["llama", "qwen3", "opt"])
def test_the_grams_are_of_what_the_linears_get(name: str, tmp_path: Path) -> None:
    """transformers' hooks see the same inputs; several passes give what one gives."""
    base = new_project(tmp_path, FAMILIES[name]) / "base"
    widths = linear_widths(base)
    inputs = dict[str, Tensor]()
    model = theirs(base)
    for full, module in model.named_modules():
        found = [key for key in widths if key == full or full.endswith(f".{key}")]
        for key in found:
            module.register_forward_pre_hook(lambda _, x, key=key: inputs.update({key: x[0]}))
    logits(model, IDS)
    grams = dict(input_grams(ours(base), widths, [IDS], room=1))
    assert grams.keys() == widths.keys() == inputs.keys()
    for key, gram in grams.items():
        x = inputs[key].flatten(0, -2)
        torch.testing.assert_close(gram, x.T @ x, atol=1e-3, rtol=1e-3)


@pytest.mark.slow
def test_nf4_is_what_bitsandbytes_makes_of_the_merge_and_transformers_opens_it(
    cli: Lora, tmp_path: Path
) -> None:
    source = project(tmp_path, IN_Q4_K, tied=False)
    cli("merge", "--adapter", str(source), "--out", str(tmp_path / "plain"), cwd=tmp_path)
    out, entry, said = merged(cli, source, "nf4", "--data", "data.jsonl")
    plain, written = (
        load_file(folder / "model.safetensors") for folder in (tmp_path / "plain", out)
    )
    functional = bitsandbytes.functional
    name = "model.layers.0.mlp.down_proj.weight"
    codes, state = functional.quantize_4bit(plain[name], blocksize=64, quant_type="nf4")
    assert torch.equal(written[name], codes)
    assert torch.equal(written[f"{name}.absmax"], state.absmax)
    assert torch.equal(written["model.embed_tokens.weight"], plain["model.embed_tokens.weight"])

    opened: Any = AutoModelForCausalLM.from_pretrained(out)
    module = opened.get_submodule("model.layers.0.mlp.down_proj")
    assert type(module).__name__ == "Linear4bit"
    expected = functional.dequantize_4bit(codes, state)
    assert torch.equal(
        functional.dequantize_4bit(module.weight, module.weight.quant_state), expected
    )
    assert (
        logits(opened, IDS) - logits(ours(source.parent / "project/base", source), IDS)
    ).abs().max() < 5
    assert [model["model"] for model in entry["models"]] == ["base", "nearest", "apart"]
    assert "nf4 of the merge, nearest" in said
    assert max(map(len, describe(entry)[:10])) <= 80


@pytest.mark.slow
def test_gptq_in_nf4_changes_codes_alone_and_loses_less(cli: Lora, tmp_path: Path) -> None:
    source = project(tmp_path, IN_Q4_K)
    out, entry, _ = merged(cli, source, "nf4", "--rounding", "gptq")
    nearest, gptq = (
        next(model for model in entry["models"] if model["model"] == name)["divergence"]
        for name in ("nearest", "gptq")
    )
    assert gptq < 0.7 * nearest
    merged(cli, source, "nf4", "--out", str(tmp_path / "nearest"))
    before = load_file(tmp_path / "nearest/model.safetensors")
    after = load_file(out / "model.safetensors")
    differ = {name for name in before if not torch.equal(before[name], after[name])}
    assert differ and all(name.endswith("_proj.weight") for name in differ)
    # the numbers of the certificate are those of the file, as transformers reads it
    tuned = logits(ours(tmp_path / "project/base", source), IDS)
    errors = [
        (logits(AutoModelForCausalLM.from_pretrained(folder), IDS) - tuned).norm()
        for folder in (out, tmp_path / "nearest")
    ]
    assert errors[0] < errors[1]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["q4_k_m", "q8_0"])
def test_gptq_in_llama_cpps_grid_loses_less(cli: Lora, kind: str, tmp_path: Path) -> None:
    source = project(tmp_path, IN_Q4_K)
    out, entry, said = merged(cli, source, kind, "--rounding", "gptq", "--data", "data.jsonl")
    found = {model["model"]: model for model in entry["models"]}
    assert [*found] == ["base", "nearest", "gptq", "apart"]
    assert found["gptq"]["divergence"] < 0.8 * found["nearest"]["divergence"]
    assert found["apart"]["divergence"] < 2 * found["base"]["divergence"]
    for matrix in entry["update"]["nearest"].values():
        assert 0.9 < matrix["contained"] < 1.1 and 0 < matrix["codes_changed"] < 1
    assert entry["examples_checked"] == 1 and entry["tokens_calibrated_on"] > 100
    assert f"{kind} of the merge, gptq" in said
    # llama.cpp opens the file, and computes what gguf dequantizes
    file = out / f"model-{kind}.gguf"
    with LlamaCpp(file) as runner:
        theirs = runner.logits([3, 5, 9])
    tuned = logits(load(tmp_path / "project/base", source).model, [3, 5, 9])
    assert (theirs - tuned).abs().max() < 1
    assert not [path for path in out.iterdir() if path.is_dir()]


@pytest.mark.slow
def test_an_adapter_that_llama_cpp_cannot_hold_is_not_measured_apart(
    cli: Lora, tmp_path: Path
) -> None:
    source = project(tmp_path, dora=True)
    _, entry, _ = merged(cli, source, "q8_0")
    assert [model["model"] for model in entry["models"]] == ["base", "nearest"]
    assert all(model["kept"] is None for model in entry["models"])


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--rounding", "gptq"], "Add --into"),
        (["--data", "data.jsonl"], "Add --into"),
        (["--into", "nf4", "--precision", "bf16"], "leave it out with --into nf4"),
        (["--into", "nf5"], "'nf5' is not one of"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    cli: Lora, options: list[str], reason: str, tmp_path: Path
) -> None:
    source = project(tmp_path, IN_Q4_K)
    command = ("merge", "--adapter", str(source), "--out", "out", *options)
    code, _, errors = cli(*command, cwd=tmp_path)
    assert code in (1, 2) and reason in errors
    assert not (tmp_path / "out").exists()
