"""The real command merges a checkpoint of two gigabytes with a fraction of that memory."""

import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline.adapters.config import AdapterSpec, config_of
from pipeline.adapters.lora import LoRALinear, weight_of
from pipeline.files.artifact import write_json
from pipeline.files.base_model import INDEX
from pipeline.models.load import skeleton
from tests.helpers.projects import LORA
from tests.helpers.reference_merge import merged

BLOCKS, SHARDS, RANK, ALPHA = 20, 5, 8, 16
SHAPE = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": BLOCKS,
    "vocab_size": 32_000,
}
HEADS = {"num_attention_heads": 16, "num_key_value_heads": 4, "tie_word_embeddings": False}
SMALL = {
    **SHAPE,
    "hidden_size": 128,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "vocab_size": 64,
}
MORE = 100e6  # bytes of resident memory beside those of a small merge, which are imports
MEASURED = """
import resource, subprocess, sys
code = subprocess.run(sys.argv[1:]).returncode
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024))
sys.exit(code)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Deleted afterwards: pytest keeps the folders of its last runs."""
    yield tmp_path
    shutil.rmtree(tmp_path)


def write_base(folder: Path, shape: Mapping[str, int]) -> None:
    """Random weights in shards, never all in memory."""
    config = LlamaConfig(**shape, **HEADS, dtype="bfloat16")
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {
            name: parameter.shape for name, parameter in LlamaForCausalLM(config).named_parameters()
        }
    noise, starts = sixteen_bits(2**26), {name: 31 * number for number, name in enumerate(shapes)}
    names, places = list(shapes), dict[str, str]()
    for number in range(SHARDS):
        file, own = f"model-{number + 1:05}-of-{SHARDS:05}.safetensors", names[number::SHARDS]
        tensors = {
            n: noise[starts[n] : starts[n] + shapes[n].numel()].clone().view(shapes[n]) for n in own
        }
        save_file(tensors, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(own, file)
    write_json(folder / INDEX, {"metadata": {}, "weight_map": places})


def sixteen_bits(count: int) -> Tensor:
    """bf16 values with random sign and mantissa, of magnitude 1/128 to 1/64."""
    bits = torch.randint(
        -(2**15), 2**15, (count,), dtype=torch.int16, generator=torch.Generator().manual_seed(0)
    )
    return bits.bitwise_and_(-0x7F81).bitwise_or_(0x3C00).view(torch.bfloat16)


def write_adapter(folder: Path, base: Path) -> None:
    """An adapter for all linear layers, as PEFT writes it."""
    folder.mkdir()
    write_json(
        folder / "adapter_config.json",
        config_of(AdapterSpec(RANK, ALPHA, "all-linear"), str(base), False),
    )
    random, found = torch.Generator().manual_seed(1), {}
    for name, module in skeleton(base).named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            key, (outputs, inputs) = f"base_model.model.{name}", module.weight.shape
            found[f"{key}.lora_A.weight"] = torch.randn(RANK, inputs, generator=random) / 20
            found[f"{key}.lora_B.weight"] = torch.randn(outputs, RANK, generator=random) / 20
    save_file(found, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def measured_merge(folder: Path, shape: Mapping[str, int]) -> tuple[Path, Path, Path, str, int]:
    """Base, adapter, merged model, what the command said, and the bytes of resident memory at its
    peak.
    """
    base, adapter, out = (folder / name for name in ("base", "adapter", "out"))
    write_base(base, shape)
    write_adapter(adapter, base)
    command = [
        sys.executable,
        "-c",
        MEASURED,
        LORA,
        "merge",
        "--adapter",
        str(adapter),
        "--out",
        str(out),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said, peak = done.stdout.splitlines()
    return base, adapter, out, said, int(peak)


def in_memory(weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The merged weight of one linear."""
    linear = nn.Linear(a.shape[1], b.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    layer = LoRALinear(linear, RANK, ALPHA / RANK, torch.float32)
    layer.lora_A, layer.lora_B = nn.Parameter(a), nn.Parameter(b)
    return weight_of(merged(layer, turned=False))


@pytest.mark.slow
def test_a_model_far_larger_than_the_memory_it_takes_is_merged_to_the_same_bytes(
    folder: Path,
) -> None:
    *_, imports = measured_merge(folder / "small", SMALL)
    base, adapter, out, said, peak = measured_merge(folder / "large", SHAPE)
    assert f"{7 * BLOCKS} matrices hold their update" in said
    assert (
        peak - imports < MORE < sum(file.stat().st_size for file in out.glob("*.safetensors")) / 20
    )
    assert (out / INDEX).read_bytes() == (base / INDEX).read_bytes()
    updates = load_file(adapter / "adapter_model.safetensors")
    for file in base.glob("*.safetensors"):
        with safe_open(file, "pt") as before, safe_open(out / file.name, "pt") as after:
            assert before.keys() == after.keys()
            for name in before.keys():  # noqa: SIM118 (it is no mapping)
                key = f"base_model.model.{name.removesuffix('.weight')}"
                wanted = before.get_tensor(name)
                if f"{key}.lora_A.weight" in updates:
                    wanted = in_memory(
                        wanted, *(updates[f"{key}.lora_{part}.weight"] for part in "AB")
                    )
                assert torch.equal(
                    after.get_tensor(name).view(torch.int16), wanted.view(torch.int16)
                ), name
