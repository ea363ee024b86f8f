"""The change of each parameter by full fine-tuning, which Figures 1 and 4 show."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.inference import engine
from pipeline.project.runner import Job


@dataclass(frozen=True)
class Changed:
    """A parameter before training and its change, in fp64. A neuron is a row of a matrix (O, I).

    `module`: the full name of its module; `block`: the index of its block, or None outside the blocks; `last`: the last
    part of the module's name.
    """

    name: str
    block: int | None
    before: Tensor
    change: Tensor

    @property
    def module(self) -> str:
        return self.name.rsplit(".", 1)[0]

    @property
    def last(self) -> str:
        return self.module.rsplit(".", 1)[-1]

    @property
    def relative(self) -> Tensor:
        """‖Δw‖/‖w‖ of each neuron, (O,)."""
        relative: Tensor = self.change.norm(dim=1) / self.before.norm(dim=1)
        return relative


@torch.no_grad()
def changes(job: Job) -> list[Changed]:
    """Every parameter of the expanded base with its change by full fine-tuning."""
    before, after = (engine.load(job.project.artifact(stage)).model for stage in ("expand_vocab", "finetune_full"))
    blocks = {id(module): number for number, block in enumerate(before.blocks) for module in block.modules()}
    changed = []
    for name, parameter in before.named_parameters():
        module, old = before.get_submodule(name.rsplit(".", 1)[0]), parameter.double()
        new = after.get_parameter(name).double()
        changed.append(Changed(name, blocks.get(id(module)), old, new - old))
    return changed


def matrices(changed: list[Changed]) -> list[Changed]:
    """Only the matrices, without biases and norms."""
    return [parameter for parameter in changed if parameter.change.ndim == 2]


def module_name(block: int | None, last: str) -> str:
    """Such as "v_proj of block 1"."""
    return last if block is None else f"{last} of block {block}"
