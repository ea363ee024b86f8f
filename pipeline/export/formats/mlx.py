"""The adapter as mlx-lm loads it: adapters.safetensors, and its own kind of adapter_config.json.

mlx-lm has A (I, R) and B (R, O), y = Wx + s·xAB, and one rank and one scale for all layers.
"""

import re
from collections.abc import Generator, Iterable
from contextlib import nullcontext
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from pipeline.errors import UserError, install_command, missing_libraries
from pipeline.export.formats import (
    Export,
    Format,
    adapter_folder,
    note_on_base,
    note_on_quantization,
)
from pipeline.project.runner import Event, Note

if TYPE_CHECKING:
    from pipeline.adapters.low_rank import LowRank
    from pipeline.adapters.peft import Reading
    from pipeline.models.base import CausalLM
    from pipeline.weights.combine import Updates

WEIGHTS = "adapters.safetensors"
# Families whose layers have the same names in mlx-lm: the tests compare each. Not GPT-2, of which
# mlx-lm opens only the original file, with other names than transformers writes.
FAMILIES = (
    "cohere",
    "ernie4_5",
    "gemma",
    "gemma2",
    "gemma3_text",
    "glm4",
    "granite",
    "helium",
    "llama",
    "mistral",
    "mixtral",
    "olmo2",
    "phi3",
    "qwen2",
    "qwen3",
    "seed_oss",
    "smollm3",
    "starcoder2",
)
FITS = 3  # times the base's size: it may be stored in 16 bits, and is compared in fp32
WIDER = 4  # padding to this many times a rank, or more, is worth a note


def write(export: Export, out: Path) -> Generator[Event, None, list[str]]:
    """Write the updates with one rank and scale, and compare with mlx-lm. Raises UserError."""
    from pipeline.adapters.peft import Reading

    yield from note_on_quantization(export)
    base = export.find_base()
    named = export.base_name or str(base)
    command = f"mlx_lm.generate --model {quote(named)} --adapter-path"
    with adapter_folder(export._replace(base=base), out, "mlx", [f"{command} ."]) as folder:
        reading = Reading.once()
        trust = export.trust_remote_code
        yield from map(Note, write_files(folder, base, export.adapter, named, trust, reading))
        compared = yield from _compared(export, base, folder, reading)
    yield from note_on_base(export)
    return [f"{out}  for MLX. Use it with:", f"{command} {quote(str(out))}", *compared]


def write_files(
    folder: Path,
    base: Path,
    adapter: Path,
    named: str,
    trust_remote_code: bool = False,
    reading: "Reading | None" = None,
) -> list[str]:
    """Write the updates and their config, which calls the base `named`; returns notes.

    Raises UserError for what mlx-lm cannot hold.
    """
    from pipeline.adapters.config import CONFIG
    from pipeline.files.artifact import write_json
    from pipeline.models.load import read_config, skeleton
    from pipeline.models.save import save_tensors
    from pipeline.weights.combine import low_rank_updates

    if (family := str(read_config(base).get("model_type"))) not in FAMILIES:
        raise UserError(
            f"{base} is a model of type {family}, whose layers in mlx-lm are not known here. "
            f"Known: {', '.join(sorted(FAMILIES))}. Export it with --format merged."
        )
    model = skeleton(base, trust_remote_code)
    updates = low_rank_updates(base, adapter, trust_remote_code, dora=True, reading=reading)
    updates = _with_tied_head(model, updates, adapter)
    ranks = [update.rank for update in updates.values()]
    rank, least = max(ranks), min(ranks)
    dora = [update.magnitude is not None for update in updates.values()]
    if any(dora) and not all(dora):
        raise UserError(
            f"{adapter}: in mlx-lm either all layers use DoRA or none, but token rows are trained "
            "beside DoRA here. Export it with --format merged."
        )
    scale = _common_scale(updates)
    tensors: dict[str, Any] = {}
    for name, update in updates.items():
        tensors |= {name + key: part for key, part in _tensors(update, rank, scale).items()}
    save_tensors(folder / WEIGHTS, tensors, "mlx")
    blocks = next(name for name, module in model.named_modules() if module is model.blocks)
    keys, count = _keys(updates, blocks, len(model.blocks))
    parameters = {"rank": rank, "scale": 1.0 if scale is None else scale}
    config: dict[str, Any] = {
        "fine_tune_type": "dora" if any(dora) else "lora",
        "num_layers": count,
        "lora_parameters": {**parameters, "dropout": 0.0, "keys": keys},
        "model": named,
    }
    write_json(folder / CONFIG, config)
    if rank < WIDER * least:
        return []
    return [
        f"mlx-lm has one rank for all layers: those of rank {least} are padded with zeros to "
        f"{rank}, which makes the adapter larger. A merged model (--format merged) is not."
    ]


def _with_tied_head(model: "CausalLM", updates: "Updates", adapter: Path) -> "Updates":
    """The updates without a tied head's: mlx-lm adds the embedding's update to the head too.

    Raises UserError if only one of the two has an update, or if they differ.
    """
    import torch

    if not model.shape.tied or not {model.embedding_name, model.head_name} & updates.keys():
        return updates
    embedding, head = updates.get(model.embedding_name), updates.get(model.head_name)
    if not (
        embedding
        and head
        and embedding.scale == head.scale
        and torch.equal(embedding.a, head.b.T)
        and torch.equal(embedding.b, head.a.T)
    ):
        raise UserError(
            f"{adapter} changes one of embedding and head, or each differently. They are tied in "
            "the base, and mlx-lm adds the same update to both. Export it with --format merged."
        )
    return {name: update for name, update in updates.items() if name != model.head_name}


def _common_scale(updates: "Updates") -> float | None:
    """The scale of all updates; None if they differ, as with alpha_pattern: B then holds them."""
    scales = {update.scale for update in updates.values()}
    return scales.pop() if len(scales) == 1 else None


def _tensors(update: "LowRank", rank: int, scale: float | None) -> dict[str, Any]:
    """A (I, R) and B (R, O), padded with zeros to `rank`, and DoRA's magnitude.

    B holds the update's scale if there is no common `scale`.
    """
    import torch.nn.functional as F

    a, b = update.a.T, update.b.T  # (I, R), (R, O); of an embedding the inputs are its rows
    missing = rank - update.rank
    b = b if scale is not None else (update.scale * b.float()).to(b.dtype)
    padded = {".lora_a": F.pad(a, (0, missing)), ".lora_b": F.pad(b, (0, 0, 0, missing))}
    return padded if update.magnitude is None else padded | {".m": update.magnitude}


def _keys(names: Iterable[str], stem: str, blocks: int) -> tuple[list[str], int]:
    """The layers to adapt as mlx-lm's `keys` and `num_layers`; `stem`: full name of the blocks.

    A key is a name inside a block, which means this layer of each of the last `num_layers` blocks,
    or a full name. Full names are always exact; short names are used if they mean the same, as
    other programs know only these.
    """
    inside: dict[str, set[int]] = {}
    outside = []
    for name in names:
        match = re.fullmatch(rf"{re.escape(stem)}\.(\d+)\.(.+)", name)
        if match:
            inside.setdefault(match[2], set()).add(int(match[1]))
        else:
            outside.append(name)
    first = min((min(numbers) for numbers in inside.values()), default=0)
    if all(numbers == {*range(first, blocks)} for numbers in inside.values()):
        return sorted(inside) + outside, blocks - first
    return [*names], blocks


def _compared(
    export: Export, base: Path, folder: Path, reading: "Reading"
) -> Generator[Event, None, list[str]]:
    """The result of a comparison with mlx-lm, if it is installed and the model fits in memory.

    Raises UserError if the logits differ by more than rounding does.
    """
    from pipeline.models.load import read_config
    from pipeline.models.save import rope_settings

    config, lines = read_config(base), list[str]()
    rope = rope_settings(config)
    settings = ", ".join(f'"{key}": {rope[key]}' for key in rope if key not in config)
    if settings:
        lines = [
            f"{base / 'config.json'} has its rotary settings in rope_parameters alone, where "
            "mlx-lm does not look for most models. Import the base again, or add to a copy: "
            f"{settings}"
        ]
    if missing_libraries("lora export --format mlx, compared"):
        return [
            *lines,
            f"Nothing was compared with mlx-lm, which is not installed: {install_command('mlx')}",
        ]
    from torch import device

    from pipeline.data.answers.prompts import prompt_texts
    from pipeline.data.tokenizers.word import load_tokenizer
    from pipeline.export.certificate import Candidate, compare, describe
    from pipeline.files.base_model import weight_files
    from pipeline.inference.engine import load
    from pipeline.models.device import available_memory

    size = sum(path.stat().st_size for path in weight_files(base))
    if FITS * size > available_memory(device("cpu")):
        return [
            *lines,
            f"Nothing was compared with mlx-lm: a model of {size / 1e9:.1f} GB in fp32 does not "
            "fit here.",
        ]
    from pipeline.export.mlx import MLX

    size = (folder / WEIGHTS).stat().st_size
    adapter = Candidate("adapter", "f32", size, lambda: nullcontext(MLX(base, folder)))
    certificate = yield from compare(
        lambda: load(
            base,
            export.adapter,
            # mlx-lm reads the base as it is stored, whatever the adapter was trained on
            quantization="none",
            trust_remote_code=export.trust_remote_code,
            reading=reading,
        ),
        load_tokenizer(base),
        [adapter],
        prompt_texts(export.prompts),
    )
    return [*lines, *describe(certificate)]


OPTIONS = ("base", "base_name", "prompts", "trust_remote_code")
FORMAT = Format(5, "the adapter for MLX (mlx-lm)", OPTIONS, write, "adapter")
