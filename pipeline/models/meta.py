"""A checkpoint's model as it is before anything is learned: its modules alone, or with weights of its own kind."""

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
    """The model of the checkpoint in `folder`, all of it on the meta device: names, shapes and what is tied, in no
    memory worth the name. Raises UserError."""
    with torch.device("meta"), _Undrawn():
        return untrained(folder, trust_remote_code)


class _Undrawn(TorchFunctionMode):
    """Modules begin without their weights being drawn: on the meta device torch would import its compiler for it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"]
        return func(*args, **kwargs)


def untrained(folder: Path, trust_remote_code: bool = False) -> CausalLM:
    """The same in fp32, with the weights that its family begins with, drawn by torch's generator. Raises UserError."""
    config = read_config(folder)
    refuse_implausible(folder, weight_files(folder))
    if MiniGPTConfig.describes(config):
        return MiniGPT(MiniGPTConfig.from_opt(config, str(folder / CONFIG))).eval()
    from pipeline.models.transformers_model import without_weights  # MiniGPT needs none of transformers

    return without_weights(folder, trust_remote_code)
