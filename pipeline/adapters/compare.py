"""Two adapters side by side: what they say of themselves, how large each update is, and how far they share a space."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline.adapters.change import Change, LowRank
from pipeline.adapters.combine import Part, concatenated
from pipeline.errors import UserError


class Beside(NamedTuple):
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


def settings_that_differ(one: Change, other: Change) -> dict[str, tuple[Any, Any]]:
    """Of the two configs."""
    first, second = asdict(one.spec), asdict(other.spec)
    return {key: (first[key], second[key]) for key in first if first[key] != second[key]}


def modules(one: Mapping[str, LowRank], other: Mapping[str, LowRank]) -> Iterator[Beside]:
    """Every module that either changes. Raises UserError where they are of two models."""
    for name in dict.fromkeys((*one, *other)):
        first, second = one.get(name), other.get(name)
        if first is None or second is None:
            sizes = [0.0 if update is None else norm(update) for update in (first, second)]
            yield Beside(name, sizes[0], sizes[1], max(sizes), None, None)
            continue
        _refuse_unlike(name, first, second)
        difference = norm(concatenated([Part(first, 1.0), Part(second, -1.0)]))
        shared = overlap(first.b, second.b), overlap(first.a.T, second.a.T)
        yield Beside(name, norm(first), norm(second), difference, *shared)


class Values(NamedTuple):
    """What was trained itself, in full or row by row: ‖one − other‖; None where the two do not hold the same of it."""

    name: str
    difference: float | None


def values(one: Change, other: Change) -> Iterator[Values]:
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


def _refuse_unlike(name: str, *updates: LowRank) -> None:
    shapes = sorted({(update.b.shape[0], update.a.shape[1]) for update in updates})
    if len(shapes) > 1:
        raise UserError(f"{name} is {' and '.join(f'{o} × {i}' for o, i in shapes)}: the adapters are of two models.")


def overlap(one: Tensor, other: Tensor) -> float | None:
    """‖UᵀV‖² / min(rank) for orthonormal bases U, V of the two column spaces, (n, R₁) and (n, R₂)."""
    first, second = _basis(one), _basis(other)
    least = min(first.shape[1], second.shape[1])
    return float((first.T @ second).square().sum()) / least if least else None


def _basis(matrix: Tensor) -> Tensor:
    left, values, _ = torch.linalg.svd(matrix.double(), full_matrices=False)
    found: Tensor = left[:, values > 1e-9 * values.max()]
    return found
