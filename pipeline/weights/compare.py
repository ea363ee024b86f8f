"""Two adapters side by side: what they say of themselves, how large each update is, and how far they share a space."""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline.adapters.config import lies_in
from pipeline.adapters.low_rank import LowRank
from pipeline.adapters.peft.updates import LowRankUpdate
from pipeline.calc.target_modules import ALL_LINEAR, means
from pipeline.errors import UserError
from pipeline.files.patterns import full_match, one_budget
from pipeline.weights.combine import Part, concatenated


class MatrixComparison(NamedTuple):
    """One module: ‖s·BA‖ of each (0 where it has none), ‖difference‖, and how far their spaces overlap.

    `outputs` and `inputs` are φ of Hu et al. 2021, §7.2, for the column and row spaces of the two updates: 0 if they
    have no direction in common, 1 if the smaller lies in the larger; None where one has no update.
    """

    module: str
    first: float
    second: float
    difference: float
    outputs: float | None
    inputs: float | None


@one_budget()
def refuse_other_model(one: LowRankUpdate, other: LowRankUpdate) -> None:
    """Raises UserError for adapters that cannot be of one model.

    That is so where their manifests name two bases; where a module or tensor has two shapes; where none of their
    blocks have a name in common; and where only one has a module that the other's settings mean as well. Other
    targets, layers, ranks or embeddings are no such proof.
    """
    if one.base and other.base and one.base != other.base:
        raise _two_models(f"their bases have sha256 {one.base[:12]} and {other.base[:12]}")
    first, second = _shapes(one), _shapes(other)
    for name in sorted(first.keys() & second.keys()):
        if first[name] != second[name]:
            shapes = sorted(" × ".join(map(str, shape)) for shape in (first[name], second[name]))
            raise _two_models(f"{name} is {' and '.join(shapes)}")
    lists = [{name[: found.start()] for name in shapes if (found := _BLOCK.search(name))} for shapes in (first, second)]
    if all(lists) and not lists[0] & lists[1]:
        raise _two_models(f"the blocks are called {min(lists[0])} and {min(lists[1])}")
    for mine, theirs in ((one, other), (other, one)):
        for name in sorted(mine.low_rank.keys() - theirs.low_rank.keys()):
            if _BLOCK.search(name) and _targets(theirs, name):
                raise _two_models(f"{name} is in one alone, and the target_modules of both mean it")


_BLOCK = re.compile(r"\.\d+\.")


def _two_models(why: str) -> UserError:
    return UserError(f"{why}: the adapters are of two models. Name two adapters of one.")


def _shapes(change: LowRankUpdate) -> dict[str, tuple[int, ...]]:
    """Of each linear or embedding that gets LoRA (O, I), of each row (D,), and of each tensor in full; by its name."""
    low_rank = {name: (update.b.shape[0], update.a.shape[1]) for name, update in change.low_rank.items()}
    rows = {f"a row of {name}": tuple(rows.shape[1:]) for name, (_, rows) in change.rows.items()}
    return {**low_rank, **rows, **{name: tuple(tensor.shape) for name, tensor in change.whole.items()}}


def _targets(change: LowRankUpdate, module: str) -> bool:
    """Whether the adapter's settings give LoRA to a block's linear of this name, if its model has one."""
    wanted = change.spec.targets
    if isinstance(wanted, str) and wanted != ALL_LINEAR:
        meant = full_match(wanted, module, "target_modules")
    else:
        meant = any(means(want, module) for want in ((wanted,) if isinstance(wanted, str) else wanted))
    return meant and not change.spec.excludes(module) and not lies_in(module, change.spec.saved)


def settings_that_differ(one: LowRankUpdate, other: LowRankUpdate) -> dict[str, tuple[Any, Any]]:
    """Of the two configs."""
    first, second = asdict(one.spec), asdict(other.spec)
    return {key: (first[key], second[key]) for key in first if first[key] != second[key]}


def modules(one: Mapping[str, LowRank], other: Mapping[str, LowRank]) -> Iterator[MatrixComparison]:
    """Every module that either changes; of one model, see `refuse_other_model`."""
    for name in dict.fromkeys((*one, *other)):
        first, second = one.get(name), other.get(name)
        if first is None or second is None:
            sizes = [0.0 if update is None else norm(update) for update in (first, second)]
            yield MatrixComparison(name, sizes[0], sizes[1], max(sizes), None, None)
            continue
        difference = norm(concatenated([Part(first, 1.0), Part(second, -1.0)]))
        shared = overlap(first.b, second.b), overlap(first.a.T, second.a.T)
        yield MatrixComparison(name, norm(first), norm(second), difference, *shared)


class Values(NamedTuple):
    """What was trained itself, in full or row by row: ‖one − other‖; None where the two do not hold the same of it."""

    name: str
    difference: float | None


def values(one: LowRankUpdate, other: LowRankUpdate) -> Iterator[Values]:
    """Every parameter that either holds whole, and every module of which it holds rows."""
    for name in dict.fromkeys((*one.rows, *other.rows)):
        first, second = one.rows.get(name), other.rows.get(name)
        alike = first and second and first[0] == second[0]
        yield Values(name, _distance(first[1], second[1]) if first and second and alike else None)
    for name in dict.fromkeys((*one.whole, *other.whole)):
        yield Values(name, _distance(one.whole.get(name), other.whole.get(name)))


def _distance(one: Tensor | None, other: Tensor | None) -> float | None:
    if one is None or other is None or one.shape != other.shape:
        return None
    return float(torch.linalg.vector_norm(one.double() - other.double()))


def norm(update: LowRank) -> float:
    """‖s·BA‖."""
    return math.sqrt(max(update.squared_norm(), 0.0))


def overlap(one: Tensor, other: Tensor) -> float | None:
    """‖UᵀV‖² / min(rank) for orthonormal bases U, V of the two column spaces, (n, R₁) and (n, R₂)."""
    first, second = _basis(one), _basis(other)
    least = min(first.shape[1], second.shape[1])
    return float((first.T @ second).square().sum()) / least if least else None


def _basis(matrix: Tensor) -> Tensor:
    left, values, _ = torch.linalg.svd(matrix.double(), full_matrices=False)
    found: Tensor = left[:, values > 1e-9 * values.max()]
    return found
