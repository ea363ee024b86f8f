"""Adapters that are broken as users of other tools report, each from a whole one."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from pipeline.adapters.config import CONFIG
from tests.helpers.checkpoints import edit_adapter_config, edit_tensors

Tensors = dict[str, Tensor]
Break = Callable[[Path], None]


def _tensors(change: Callable[[Tensors], Tensors]) -> Break:
    return lambda folder: edit_tensors(folder, change)


def _config(**values: object) -> Break:
    return lambda folder: edit_adapter_config(folder, **values)


def _without(key: str) -> Break:
    def remove(folder: Path) -> None:
        path = folder / CONFIG
        config = json.loads(path.read_text())
        del config[key]
        path.write_text(json.dumps(config))

    return remove


def _renamed(old: str, new: str) -> Break:
    return _tensors(lambda t: {name.replace(old, new): value for name, value in t.items()})


def _dropped(part: str) -> Break:
    return _tensors(lambda t: {name: value for name, value in t.items() if part not in name})


def _mapped(part: str, change: Callable[[Tensor], Tensor]) -> Break:
    return _tensors(lambda t: {k: change(v).contiguous() if part in k else v for k, v in t.items()})


# what is broken → how, and what the certificate must say of it
BROKEN: dict[str, tuple[Break, str]] = {
    "another prefix of all keys": (
        _renamed("base_model.model.model", "base_model.model.language"),
        "not expected base_model.model.language",
    ),
    "no prefix": (_renamed("base_model.model.", ""), "not expected model.layers"),
    "keys with the adapter's name": (
        _renamed(".weight", ".default.weight"),
        "lora_A.default.weight",
    ),
    "a layer too far": (
        _renamed("layers.1.", "layers.7."),
        "not expected base_model.model.model.layers.7",
    ),
    "A is transposed": (
        _mapped("lora_A", lambda value: value.T),
        "has shape [48, 4], expected [4, 48]",
    ),
    "A and B are swapped": (
        _tensors(
            lambda t: {
                k.replace("lora_A", "lora_X")
                .replace("lora_B", "lora_A")
                .replace("lora_X", "lora_B"): v
                for k, v in t.items()
            }
        ),
        "has shape [32, 4], expected [4, 48]",
    ),
    "a block is missing": (_dropped("layers.1."), "missing base_model.model.model.layers.1"),
    "B of one matrix is missing": (
        _dropped("layers.0.self_attn.q_proj.lora_B"),
        "missing base_model.model.model.layers.0.self_attn.q_proj.lora_B",
    ),
    "alpha is lost": (_without("lora_alpha"), "no lora_alpha: PEFT takes 8"),
    "rank is lost": (_without("r"), "r must be a whole number"),
    "another rank in the config": (_config(r=2), "expected [2, 48]"),
    "the rank is cut": (_mapped("lora_A", lambda value: value[:2]), "expected [4, 32]"),
    "B is all zeros": (_mapped("lora_B", torch.zeros_like), "it changes nothing"),
    "B of a module is all zeros": (
        _mapped("q_proj.lora_B", torch.zeros_like),
        "no effect of self_attn.q_proj.lora_A",
    ),
    "values that are no numbers": (
        _mapped("layers.0.self_attn.q_proj.lora_A", lambda v: v / 0),
        "q_proj.lora_A.weight is not finite",
    ),
    "targets that match nothing": (
        _config(target_modules=["c_attn"]),
        "'c_attn' matches no linear layer",
    ),
    "a target without tensors": (
        _config(target_modules=["q_proj", "v_proj", "down_proj", "o_proj"]),
        "o_proj.lora_A.weight and 3 more",
    ),
}


def broken(whole: Path, folder: Path, name: str) -> Path:
    """A copy of the adapter `whole`, broken."""
    shutil.copytree(whole, folder)
    break_it, _ = BROKEN[name]
    break_it(folder)
    return folder
