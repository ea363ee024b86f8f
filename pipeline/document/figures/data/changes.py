"""The change of each parameter by full fine-tuning, and the parameters that the adapter trains."""

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
    """A parameter before training and its change, in fp64. A neuron is a row of a matrix (O, I)."""

    name: str
    before: Tensor
    change: Tensor

    @property
    def module(self) -> str:
        """The full name of its module."""
        return self.name.rsplit(".", 1)[0]

    @property
    def relative(self) -> Tensor:
        """‖Δw‖/‖w‖ of each neuron, (O,)."""
        relative: Tensor = self.change.norm(dim=1) / self.before.norm(dim=1)
        return relative


@torch.no_grad()
def changes(job: Job) -> list[Changed]:
    """Every parameter of the expanded base with its change by full fine-tuning."""
    before, after = (engine.load(job.project.artifact(stage)).model for stage in ("expand_vocab", "finetune_full"))
    pairs = ((name, p.double(), after.get_parameter(name).double()) for name, p in before.named_parameters())
    return [Changed(name, old, new - old) for name, old, new in pairs]


def matrices(changed: list[Changed]) -> list[Changed]:
    """Only the matrices, without biases and norms."""
    return [parameter for parameter in changed if parameter.change.ndim == 2]


@dataclass(frozen=True)
class Trained:
    """The parameters that an adapter's config trains."""

    spec: AdapterSpec
    adapted: tuple[str, ...]  # full names of the modules with A and B

    def rank(self, module: str) -> int:
        """The rank of its A and B; 0 if it is not adapted."""
        return self.spec.rank_of(module) if module in self.adapted else 0

    def rows(self, module: str, rows: int) -> tuple[int, ...]:
        """The rows of the module's weight that train in full."""
        if lies_in(module, self.spec.saved):
            return tuple(range(rows))
        return self.spec.rows.get(module.rsplit(".", 1)[-1], ())


def trained_by(job: Job, model: CausalLM) -> Trained:
    """Read the adapter's config. Raises UserError if it does not fit the model."""
    spec = read_spec(job.project.artifact("finetune_lora"), model.embedding_and_head[0])
    return Trained(spec, tuple(targeted(model, spec)))


def cumulative_shares(squares: Tensor) -> Tensor:
    """Cumulative shares of Σ squares, the largest first: (n,) → (n,)."""
    sums = squares.sort(descending=True).values.cumsum(0)
    return sums / sums[-1]


def held_by(squares: Tensor, part: float) -> float:
    """The share of Σ squares in the largest `part` of them."""
    return float(cumulative_shares(squares)[max(1, round(part * len(squares))) - 1])


def needed_for(squares: Tensor, share: float) -> float:
    """The smallest part of the squares whose sum is at least `share` of the total."""
    return int((cumulative_shares(squares) < share).sum() + 1) / len(squares)


def held_if_normal(part: float) -> float:
    """`held_by` for normally distributed changes: 2(qφ(q) + 1 − Φ(q)), where a `part` of all changes exceeds ±q.

    It is 44% for a tenth, so a share of 44% is no sign of concentration.
    """
    normal = NormalDist()
    q = normal.inv_cdf(1 - part / 2)
    return 2 * (q * normal.pdf(q) + 1 - normal.cdf(q))


def needed_if_normal(share: float) -> float:
    """`needed_for` for normally distributed changes, by bisection."""
    low, high = 1e-12, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if held_if_normal(middle) < share else (low, middle)
    return high


def block_and_name(module: str, model: CausalLM) -> tuple[int | None, str]:
    """The index of the module's block (None outside the blocks) and the last part of its name."""
    for number, block in enumerate(model.blocks):
        if any(model.get_submodule(module) is other for other in block.modules()):
            return number, module.rsplit(".", 1)[-1]
    return None, module.rsplit(".", 1)[-1]


def neurons(changed: list[Changed]) -> Iterator[tuple[Changed, int, float, float]]:
    """Each row of each matrix: (matrix, row, ‖Δw‖, ‖Δw‖/‖w‖)."""
    for matrix in matrices(changed):
        sizes, relative = matrix.change.norm(dim=1), matrix.relative  # (O,) each
        yield from ((matrix, row, float(sizes[row]), float(relative[row])) for row in range(len(sizes)))
