"""A model's modules without its weights: names, shapes and what is tied, in no memory worth the name."""

from pathlib import Path

import torch

from pipeline.models.base import read_config
from pipeline.models.causal import CausalLM
from pipeline.models.files import CONFIG
from pipeline.models.minigpt import MiniGPT, MiniGPTConfig


def skeleton(folder: Path, trust_remote_code: bool = False) -> CausalLM:
    """The model of the checkpoint in `folder`, all of it on the meta device. Raises UserError."""
    config = read_config(folder)
    with torch.device("meta"):
        if MiniGPTConfig.describes(config):
            return MiniGPT(MiniGPTConfig.from_opt(config, str(folder / CONFIG))).eval()
        from pipeline.models.opened import without_weights  # MiniGPT needs none of transformers

        return without_weights(folder, trust_remote_code)
