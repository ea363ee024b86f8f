"""Small checkpoints and adapters of random numbers, for tests that need no training."""

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.adapters.attach import attach, tensors
from pipeline.adapters.config import CONFIG, WEIGHTS, AdapterSpec
from pipeline.adapters.peft import save_adapter
from pipeline.data.tokenizers.word import WordTokenizer
from pipeline.files import artifact
from pipeline.files.base_model import base_fingerprint
from pipeline.models.base import CausalLM
from pipeline.models.load import Base, load_base, save_base
from pipeline.models.minigpt import MiniGPT, MiniGPTConfig
from tests.helpers.json_files import edit_json

WORDS = [f"w{i}" for i in range(71)]
ONE, OTHER = AdapterSpec(2, 3.0, ("q_proj", "fc1")), AdapterSpec(3, 2.0, ("q_proj",), rslora=True)


def token_ids(below: int, *shape: int, seed: int = 3) -> Tensor:
    """Random tokens of that shape, none of them special."""
    return torch.randint(3, below, shape, generator=torch.Generator().manual_seed(seed))


def checkpoint(folder: Path, seed: int = 0, **shape: int | bool) -> Path:
    """A MiniGPT that knows WORDS and never ends a sentence."""
    folder.mkdir(exist_ok=True)
    torch.manual_seed(seed)
    tokenizer = WordTokenizer.of_words(WORDS)
    model = MiniGPT(MiniGPTConfig(len(tokenizer), tokenizer.pad_id, tokenizer.end_id, **shape))  # type: ignore[arg-type]
    with torch.no_grad():
        model.lm_head.weight[tokenizer.end_id] = 0
    save_base(folder, Base(model, tokenizer))
    return folder


def small_minigpt(tied: bool = False, seed: int = 0, **shape: int) -> MiniGPT:
    """A MiniGPT of 20 tokens and width 16."""
    torch.manual_seed(seed)
    sizes = {"d_model": 16, "feed_forward": 32, **shape}
    return MiniGPT(MiniGPTConfig(20, 0, 2, tie_embeddings=tied, **sizes))


def minigpt(model: CausalLM) -> MiniGPT:
    """`model`, which is one."""
    assert isinstance(model, MiniGPT)
    return model


def adapter(folder: Path, base: Path, spec: AdapterSpec, seed: int = 1) -> Path:
    """An adapter on `base` that changes all that `spec` names; without a manifest, as from
    elsewhere.
    """
    folder.mkdir(exist_ok=True)
    model = load_base(base).model
    attach(model, spec)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in tensors(model, spec).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) / 10)
    save_adapter(folder, model, spec, str(base))
    return folder


def edit_adapter_config(folder: Path, **values: object) -> None:
    """Set values of adapter_config.json."""
    edit_json(folder / CONFIG, **values)


def edit_tensors(
    folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], file: str = WEIGHTS
) -> None:
    """Change what a safetensors file holds, by default adapter_model.safetensors."""
    save_file(change(load_file(folder / file)), folder / file, metadata={"format": "pt"})


def sealed_copies(root: Path, count: int) -> list[Path]:
    """A base and `count` equal adapters on it in the artifacts of a project, each with a manifest
    that binds it.
    """
    artifacts = root / "artifacts"
    artifacts.mkdir(exist_ok=True)
    base = checkpoint(artifacts / "base", d_model=16)
    first = adapter(artifacts / "a-0", base, AdapterSpec(1, 1.0, ("q_proj",)))
    artifact.seal(first, {"base": base_fingerprint(base)})
    return [first, *(shutil.copytree(first, artifacts / f"a-{n}") for n in range(1, count))]
