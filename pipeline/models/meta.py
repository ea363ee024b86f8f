"""A checkpoint's model without its weights: on the meta device, or newly initialized."""

from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from pipeline.files.base_model import weight_files
from pipeline.models.base import CausalLM
from pipeline.models.importing.checks import refuse_implausible
from pipeline.models.load import read_config
from pipeline.models.minigpt.model import MiniGPT, MiniGPTConfig
from pipeline.models.save import CONFIG


def skeleton(folder: Path, trust_remote_code: bool = False) -> CausalLM:
    """The model of the checkpoint in `folder` on the meta device: names, shapes and ties, with almost no memory.
    Raises UserError."""
    with torch.device("meta"), _SkipInit():
        return untrained(folder, trust_remote_code)


class _SkipInit(TorchFunctionMode):
    """Skips `torch.nn.init`, which would import torch's compiler on the meta device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"]
        return func(*args, **kwargs)


def untrained(folder: Path, trust_remote_code: bool = False) -> CausalLM:
    """The model of the checkpoint in `folder` in fp32, initialized as its family is, by torch's default generator.
    Raises UserError."""
    config = read_config(folder)
    refuse_implausible(folder, weight_files(folder))
    if MiniGPTConfig.describes(config):
        return MiniGPT(MiniGPTConfig.from_opt(config, str(folder / CONFIG))).eval()
    from pipeline.models.transformers_model import without_weights  # MiniGPT does not need transformers

    return without_weights(folder, trust_remote_code)
