"""Compare adapters: settings, norms and cosines of updates, overlap of subspaces."""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import combinations
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline.adapters.config import lies_in
from pipeline.adapters.low_rank import LowRank, LowRankUpdate, inner_product
from pipeline.calc.target_modules import ALL_LINEAR, matches_target
from pipeline.errors import UserError
from pipeline.files.patterns import full_match, one_budget
from pipeline.models.device import device_for_matrix
from pipeline.weights.combine import Part, concatenate


class MatrixComparison(NamedTuple):
    """One module: ‖s·BA‖ of each adapter, ‖difference‖, cosine, overlap of their subspaces.

    The overlaps are φ of Hu et al. 2021, section 7.2: 0 if the two spaces are orthogonal, 1 if the
    smaller lies in the larger. Cosine and overlaps are None if one has no update.
    """

    module: str
    first: float  # 0 without an update
    second: float
    difference: float
    cosine: float | None  # ⟨Δ₁, Δ₂⟩ / ‖Δ₁‖‖Δ₂‖
    outputs: float | None  # overlap of the column spaces
    inputs: float | None  # of the row spaces


@one_budget()
def refuse_other_model(one: LowRankUpdate, other: LowRankUpdate) -> None:
    """Raises UserError for adapters that cannot belong to the same model.

    They cannot if their manifests name different bases, if a module or tensor differs in shape, if
    their block names have nothing in common, or if only one has a module that the target_modules of
    both match. Different targets, layers, ranks or embeddings prove nothing.
    """
    if one.base and other.base and one.base != other.base:
        raise _different_models(f"their bases have sha256 {one.base[:12]} and {other.base[:12]}")
    first, second = _shapes(one), _shapes(other)
    for name in sorted(first.keys() & second.keys()):
        if first[name] != second[name]:
            shapes = sorted(" × ".join(map(str, shape)) for shape in (first[name], second[name]))
            raise _different_models(f"{name} is {' and '.join(shapes)}")
    blocks, other_blocks = _block_names(first), _block_names(second)
    if blocks and other_blocks and not blocks & other_blocks:
        raise _different_models(f"the blocks are called {min(blocks)} and {min(other_blocks)}")
    for with_module, without_module in ((one, other), (other, one)):
        for name in sorted(with_module.low_rank.keys() - without_module.low_rank.keys()):
            spec = without_module.spec
            if isinstance(spec.targets, str) and spec.targets != ALL_LINEAR:
                targeted = full_match(spec.targets, name, "target_modules")
            else:
                targets = (spec.targets,) if isinstance(spec.targets, str) else spec.targets
                targeted = any(matches_target(target, name) for target in targets)
            left_out = spec.excludes(name) or lies_in(name, spec.saved)
            if _BLOCK.search(name) and targeted and not left_out:
                raise _different_models(
                    f"{name} is in only one of them, but the target_modules of both match it"
                )


_BLOCK = re.compile(r"\.\d+\.")


def _block_names(names: Iterable[str]) -> set[str]:
    """What stands before a block's number, such as model.layers."""
    return {_BLOCK.split(name)[0] for name in names if _BLOCK.search(name)}


def _different_models(why: str) -> UserError:
    return UserError(
        f"{why}: the adapters belong to different models. Name two adapters of the same model."
    )


def _shapes(change: LowRankUpdate) -> dict[str, tuple[int, ...]]:
    """Name → shape of each module with LoRA (O, I), trained row (D,), and tensor in full."""
    low_rank = {
        name: (update.b.shape[0], update.a.shape[1]) for name, update in change.low_rank.items()
    }
    rows = {f"a row of {name}": tuple(rows.shape[1:]) for name, (_, rows) in change.rows.items()}
    return {
        **low_rank,
        **rows,
        **{name: tuple(tensor.shape) for name, tensor in change.whole.items()},
    }


def settings_that_differ(one: LowRankUpdate, other: LowRankUpdate) -> dict[str, tuple[Any, Any]]:
    """Setting → (value of the first, value of the second), for the settings that differ."""
    first, second = asdict(one.spec), asdict(other.spec)
    return {key: (first[key], second[key]) for key in first if first[key] != second[key]}


def modules(one: Mapping[str, LowRank], other: Mapping[str, LowRank]) -> Iterator[MatrixComparison]:
    """Compares every module that at least one changes, of one model: `refuse_other_model`."""
    for name in dict.fromkeys((*one, *other)):
        first, second = one.get(name), other.get(name)
        sizes = [0.0 if update is None else norm(update) for update in (first, second)]
        if first is None or second is None:
            yield MatrixComparison(name, sizes[0], sizes[1], max(sizes), None, None, None)
            continue
        difference = norm(concatenate([Part(first, 1.0), Part(second, -1.0)]))
        shared = overlap(first.b, second.b), overlap(first.a.T, second.a.T)
        cosine = inner_product(first, second) / math.prod(sizes) if all(sizes) else None
        yield MatrixComparison(name, sizes[0], sizes[1], difference, cosine, *shared)


class Interference(NamedTuple):
    """How much two adapters, by their numbers from 1, meet in the modules that both change.

    `cosine` is that of all modules together: 1 if they are the same up to a factor, 0 if they are
    independent, −1 if they are opposed; modules of only one adapter count in its norm. `outputs`
    and `inputs` are means over the modules.
    """

    first: int
    second: int
    cosine: float | None
    outputs: float | None
    inputs: float | None
    modules: list[MatrixComparison]


def interference(
    adapters: Sequence[Mapping[str, LowRank]], weights: Sequence[float]
) -> Iterator[Interference]:
    """How much each pair of weighted adapters of one model meets, computed from their factors."""
    weighted = [
        {name: replace(update, scale=weight * update.scale) for name, update in adapter.items()}
        for adapter, weight in zip(adapters, weights, strict=True)
    ]
    for (first, left), (second, right) in combinations(enumerate(weighted, start=1), 2):
        rows = [row for row in modules(left, right) if row.cosine is not None]
        sizes = [_norm_of_all(adapter.values()) for adapter in (left, right)]
        products = math.fsum(inner_product(left[row.module], right[row.module]) for row in rows)
        cosine = products / math.prod(sizes) if all(sizes) else None
        shares = zip(*((row.outputs, row.inputs) for row in rows), strict=True)
        outputs, inputs = (fmean(share) for share in shares) if rows else (None, None)
        yield Interference(first, second, cosine, outputs, inputs, rows)


class ParameterDifference(NamedTuple):
    """A parameter trained in full or by rows: ‖one − other‖; None if rows or shapes differ."""

    name: str
    difference: float | None


def values(one: LowRankUpdate, other: LowRankUpdate) -> Iterator[ParameterDifference]:
    """Compares every parameter that at least one of them trained in full or by rows."""
    for name in dict.fromkeys((*one.rows, *other.rows)):
        first, second = one.rows.get(name), other.rows.get(name)
        difference = None
        if first and second and first[0] == second[0]:
            difference = _distance(first[1], second[1])
        yield ParameterDifference(name, difference)
    for name in dict.fromkeys((*one.whole, *other.whole)):
        yield ParameterDifference(name, _distance(one.whole.get(name), other.whole.get(name)))


def _distance(one: Tensor | None, other: Tensor | None) -> float | None:
    if one is None or other is None or one.shape != other.shape:
        return None
    return float(torch.linalg.vector_norm(one.double() - other.double()))


def norm(update: LowRank) -> float:
    """‖s·BA‖."""
    return math.sqrt(max(update.squared_norm(), 0.0))


def _norm_of_all(updates: Iterable[LowRank]) -> float:
    return math.sqrt(math.fsum(norm(update) ** 2 for update in updates))


def overlap(one: Tensor, other: Tensor) -> float | None:
    """‖UᵀV‖² / min(rank) for orthonormal bases U (n, R₁), V (n, R₂) of the column spaces."""
    first, second = _basis(one), _basis(other)
    smaller = min(first.shape[1], second.shape[1])
    return float((first.T @ second).square().sum()) / smaller if smaller else None


def _basis(matrix: Tensor) -> Tensor:
    wide = matrix.to(device_for_matrix(matrix.numel()), torch.float64)
    left, values, _ = torch.linalg.svd(wide, full_matrices=False)
    basis: Tensor = left[:, values > 1e-9 * values.max()].cpu()
    return basis
