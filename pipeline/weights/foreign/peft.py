"""PEFT's own format, as tools that wrap PEFT's model write it.

These are LLaMA-Factory, Axolotl, Unsloth, TRL under FSDP or DeepSpeed, and code that saves a state
dict itself. An adapter whose tensors only have other names is read. PEFT itself skips names that it
does not know and loads nothing. An adapter that would change nothing is rejected with the reason.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import UserError
from pipeline.weights.foreign import Converted, Format

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.models.base import CausalLM

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
# Modules that torch.compile, FSDP, activation checkpointing and DDP put around others
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "module"}
# The part of a key after the layer's name, which in a state dict of PEFT's model has the adapter's
# name in it
_PART = re.compile(
    r"(?P<layer>.+)\.(?:(?P<linear>lora_[AB])(?:\.(?P<name1>\w+))??\.weight"
    r"|(?P<other>lora_embedding_[AB]|lora_magnitude_vector|token_adapter\.trainable_tokens_delta)"
    r"(?:\.(?P<name2>(?!weight$)\w+))?(?:\.weight)?)"
)
DEPTH = 12  # parts of a name; no model has so many
_SAVED = re.compile(r"(?P<layer>.+)\.modules_to_save\.(?P<name>\w+)\.(?P<part>weight|bias)")
_ORIGINAL = ".original_module."  # the base's, which PEFT keeps beside a module that trains in full
_GATHER = "Set stage3_gather_16bit_weights_on_model_save, and save it again"
SHARDS = (  # what a folder has instead of an adapter, and how to make one
    ("*_fsdp_*", "FSDP saved it in shards. Merge them with `accelerate merge-weights`"),
    ("global_step*", f"DeepSpeed saved it in shards. {_GATHER}"),
    ("zero_to_fp32.py", f"DeepSpeed saved it in shards. {_GATHER}"),
)


def detect(folder: Path) -> bool:
    return (folder / CONFIG).is_file()


def read(folder: Path, model: "CausalLM", base: Path) -> Converted | None:
    """Raises UserError."""
    from pipeline.adapters.config import OTHER_KINDS, VIRTUAL, read_config
    from pipeline.files.artifact import MANIFEST
    from pipeline.models.save import load_tensors
    from pipeline.weights.torch_file import load

    if (folder / MANIFEST).exists():
        return None  # ours: anything unusual in it is an edit, which its digests tell
    config = read_config(folder)
    source = folder / WEIGHTS
    if not source.exists() and (folder / PICKLE).is_file():
        source = folder / PICKLE
    if not source.exists():
        reasons = [why for pattern, why in SHARDS if any(folder.glob(pattern))]
        reason = next(iter(reasons), "it holds no adapter. Copy it again")
        raise UserError(f"{folder} has no {WEIGHTS}: {reason}.")
    stored = load(source) if source.name == PICKLE else load_tensors(source)
    if not stored or any(tensor.numel() == 0 for tensor in stored.values()):
        raise UserError(
            f"{source} is empty: DeepSpeed ZeRO-3 saved it without its parts on other GPUs, and it "
            f"would change nothing. {_GATHER}."
        )
    if str(config.get("peft_type")) in {*VIRTUAL, *OTHER_KINDS}:
        stays = source.name == WEIGHTS
        return None if stays else Converted(config, stored, (source, folder / CONFIG))
    names = _Names([name for name, _ in model.named_modules()])
    tensors = _renamed(stored, names, source)
    settings = dict(config)
    if isinstance(targets := config.get("target_modules"), list):
        # tools list those of many architectures, and PEFT asks for one of them to be there
        settings["target_modules"] = [name for name in targets if name in names] or targets
    _take_embeddings(settings, tensors, model, base, source)
    if config.get("target_parameters"):
        tensors = _in_todays_layout(settings, tensors, model, folder)
    has_magnitudes = any(key.endswith(".lora_magnitude_vector") for key in tensors)
    if has_magnitudes and not config.get("use_dora"):
        raise UserError(
            f"{source} has DoRA's magnitudes, but use_dora is not set in {CONFIG}: PEFT would "
            "leave them out. Set use_dora to true there if it was trained with DoRA."
        )
    if source.name == WEIGHTS and tensors.keys() == stored.keys() and settings == config:
        return None
    return Converted(settings, tensors, (source, folder / CONFIG))


def _in_todays_layout(
    settings: dict[str, Any], tensors: dict[str, "Tensor"], model: "CausalLM", folder: Path
) -> dict[str, "Tensor"]:
    """A and B of experts in PEFT's present layout; the settings then name its version.

    Raises UserError.
    """
    from pipeline.adapters.config import LAYOUT, read_spec
    from pipeline.adapters.experts import in_this_layout

    changed = in_this_layout(
        model, read_spec(folder), tensors, settings.get("peft_version"), folder
    )
    if any(changed[key] is not tensors[key] for key in tensors):
        settings["peft_version"] = LAYOUT
    return changed


def _renamed(stored: Mapping[str, "Tensor"], names: "_Names", source: Path) -> dict[str, "Tensor"]:
    """The tensors by PEFT's keys. Raises UserError for those of several adapters."""
    tensors, adapters = dict[str, "Tensor"](), set[str]()
    for key, tensor in stored.items():
        name = ".".join(part for part in key.split(".") if part not in names.wrappers)
        while name.startswith(PREFIX):
            name = name.removeprefix(PREFIX)
        if _ORIGINAL in name:
            continue
        if match := _PART.fullmatch(name):
            adapters |= {match["name1"] or match["name2"] or ""}
            part = f"{match['linear']}.weight" if match["linear"] else match["other"]
            name = f"{names.full(match['layer'])}.{part}"
        elif match := _SAVED.fullmatch(name):
            adapters |= {match["name"]}
            name = f"{names.full(match['layer'])}.{match['part']}"
        if len(adapters - {""}) > 1:
            several = ", ".join(sorted(name[:80] for name in adapters if name))
            raise UserError(
                f"{source} holds several adapters: {several}. Save the one you mean with "
                "save_pretrained."
            )
        if PREFIX + name in tensors:
            raise UserError(
                f"{source}: {key[:200]} is there twice, under two names. Save the adapter again."
            )
        tensors[PREFIX + name] = tensor
    return tensors


class _Names:
    """The base's modules by the ends of their names. `wrappers`: those that the base lacks."""

    def __init__(self, modules: Sequence[str]) -> None:
        self.modules = {*modules}
        self.wrappers = _WRAPPERS.difference(*(name.split(".") for name in modules))
        self._by_end: dict[str, list[str]] = {}
        for name in modules:
            for end in _ends(name):
                self._by_end.setdefault(end, []).append(name)

    def __contains__(self, end: object) -> bool:
        """Whether it is the name of a module, or the end of one."""
        return isinstance(end, str) and (end in self.modules or end in self._by_end)

    def full(self, name: str) -> str:
        """The only module whose name is this one with more or fewer parts before it.

        Parts are missing after training the body alone. The name itself if there is no such module.
        """
        if name in self.modules:
            return name
        longer = self._by_end.get(name, [])
        if len(longer) == 1:
            return longer[0]
        return next((end for end in _ends(name) if end in self.modules), name)


def _ends(name: str) -> list[str]:
    """A name without its first part, without its first two, …"""
    parts = name.split(".")[-DEPTH:]
    return [".".join(parts[start:]) for start in range(1, len(parts))]


def _take_embeddings(
    config: dict[str, Any],
    tensors: dict[str, "Tensor"],
    model: "CausalLM",
    base: Path,
    source: Path,
) -> None:
    """Take an embedding or head that is saved whole without modules_to_save.

    PEFT does that where a tokenizer grew. If it equals the base's it is taken out of `tensors`,
    otherwise it becomes one of modules_to_save in `config`. Raises UserError for another number of
    rows.
    """
    import torch

    from pipeline.files.base_model import tensor_locations
    from pipeline.weights.blocks import find_location, read_blocks, tied_names

    saved = config.get("modules_to_save") or []
    saved = [saved] if isinstance(saved, str) else saved
    for name in (model.embedding_name, model.head_name):
        weight = tensors.get(f"{PREFIX}{name}.weight")
        if weight is None or weight.ndim != 2:
            continue
        rows = model.shape.rows
        if len(weight) != rows:
            raise UserError(
                f"{source}: {name} has {len(weight):,} rows, and the base {rows:,}: tokens were "
                "added before training. Add the same tokens to the base in the same order, or pass "
                "the base that has them with --base."
            )
        if isinstance(saved, list) and not any(
            isinstance(end, str) and name.endswith(end) for end in saved
        ):
            location = find_location(f"{name}.weight", tensor_locations(base), tied_names(model))
            blocks = read_blocks(location) if location else ()
            if location and all(
                torch.equal(weight[part].float(), old.float()) for part, old in blocks
            ):
                del tensors[f"{PREFIX}{name}.weight"]
            else:
                config["modules_to_save"] = saved = [*saved, name]


FORMAT = Format(
    9,
    "PEFT",
    "also as LLaMA-Factory, Axolotl and Unsloth write it, and adapter_model.bin",
    detect,
    read,
)
