"""What full fine-tuning changed, matrix by matrix, and what the adapter would have trained in its place."""

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from pipeline.adapters.attach import targeted
from pipeline.adapters.config import AdapterSpec, lies_in
from pipeline.adapters.peft.config import read_spec
from pipeline.inference import engine
from pipeline.models.base import CausalLM
from pipeline.project.runner import Job


@dataclass(frozen=True)
class Changed:
    """A parameter before training and its change, in double precision; a neuron is a row of a matrix (O, I)."""

    name: str
    before: Tensor
    change: Tensor

    @property
    def module(self) -> str:
        """The full name of the module that it is the weight of."""
        return self.name.rsplit(".", 1)[0]

    @property
    def relative(self) -> Tensor:
        """‖Δw‖/‖w‖ of each neuron, (O,)."""
        relative: Tensor = self.change.norm(dim=1) / self.before.norm(dim=1)
        return relative


@torch.no_grad()
def changes(job: Job) -> list[Changed]:
    """Every parameter of the expanded base, and what full fine-tuning added to it."""
    before, after = (engine.load(job.project.artifact(stage)).model for stage in ("expand_vocab", "finetune_full"))
    pairs = ((name, p.double(), after.get_parameter(name).double()) for name, p in before.named_parameters())
    return [Changed(name, old, new - old) for name, old, new in pairs]


def matrices(changed: list[Changed]) -> list[Changed]:
    """Those whose rows are neurons."""
    return [one for one in changed if one.change.ndim == 2]


@dataclass(frozen=True)
class Trained:
    """What the adapter's own config trains of a model."""

    spec: AdapterSpec
    adapted: tuple[str, ...]  # modules that get A and B, by full name

    def rank(self, module: str) -> int:
        """R of its A and B, 0 where it has none."""
        return self.spec.rank_of(module) if module in self.adapted else 0

    def rows(self, module: str, rows: int) -> tuple[int, ...]:
        """The rows of the module's own weight that train."""
        if lies_in(module, self.spec.saved):
            return tuple(range(rows))
        return self.spec.rows.get(module.rsplit(".", 1)[-1], ())


def trained_by(job: Job, model: CausalLM) -> Trained:
    """Raises UserError where the adapter's config means nothing in this model."""
    spec = read_spec(job.project.artifact("finetune_lora"), model.embedding_and_head[0])
    return Trained(spec, tuple(targeted(model, spec)))


def largest_first(squares: Tensor) -> Tensor:
    """Cumulative shares of Σ squares, the largest first, (n,)."""
    ordered = squares.sort(descending=True).values.cumsum(0)
    return ordered / ordered[-1]


def held_by(squares: Tensor, part: float) -> float:
    """The share of Σ squares that the largest `part` of them holds."""
    return float(largest_first(squares)[max(1, round(part * len(squares))) - 1])


def needed_for(squares: Tensor, share: float) -> float:
    """The least part of the squares, the largest first, that holds a `share` of their sum."""
    return int((largest_first(squares) < share).sum() + 1) / len(squares)


def held_if_normal(part: float) -> float:
    """What the largest `part` would hold if all changes were of one normal distribution: 2(qφ(q) + 1 − Φ(q)).

    q is the size that `part` of all changes exceeds. 44% for a tenth: so much is no sign of concentration.
    """
    normal = NormalDist()
    q = normal.inv_cdf(1 - part / 2)
    return 2 * (q * normal.pdf(q) + 1 - normal.cdf(q))


def needed_if_normal(share: float) -> float:
    """The least part that would hold a `share`, by halving."""
    low, high = 1e-12, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if held_if_normal(middle) < share else (low, middle)
    return high


def last_names(module: str, model: CausalLM) -> tuple[int | None, str]:
    """The number of the block that a module is in, None outside, and its own last name."""
    for number, block in enumerate(model.blocks):
        if any(model.get_submodule(module) is one for one in block.modules()):
            return number, module.rsplit(".", 1)[-1]
    return None, module.rsplit(".", 1)[-1]


def neurons(changed: list[Changed]) -> Iterator[tuple[Changed, int, float, float]]:
    """Each row of each matrix: (matrix, number, ‖Δw‖, ‖Δw‖/‖w‖)."""
    for one in matrices(changed):
        sizes, relative = one.change.norm(dim=1), one.relative
        yield from ((one, row, float(sizes[row]), float(relative[row])) for row in range(len(sizes)))
