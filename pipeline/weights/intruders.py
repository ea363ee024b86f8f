"""Intruder dimensions: strong directions of a fine-tuned matrix that its base lacks.

Shuttleworth et al. 2024 (arXiv 2410.21228): a left singular vector u of W + ΔW among the `top`
largest is an intruder if |cos(u, uᵢ)| < ε for every left singular vector uᵢ of W. They find that
LoRA's forgetting lies there, and that scaling their singular values down wins most of it back.
Matrices are read a block of rows at a time, and held in memory only if they have up to
`FULL_COLUMNS` rows.
"""

from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.adapters.config import CONFIG, AdapterConfig
from pipeline.adapters.low_rank import LowRank, load_update
from pipeline.errors import UserError
from pipeline.files.base_model import TensorLocation
from pipeline.models.base import is_conv1d
from pipeline.models.device import device_for_matrix
from pipeline.models.load import skeleton
from pipeline.project.runner import Event, Progress
from pipeline.weights.blocks import Read, Rows, read_blocks, read_matrix, stored_name
from pipeline.weights.diff import block_linears, diff_checkpoints, finite_norm, refuse_adapter
from pipeline.weights.import_adapter import refuse_other, write_changed
from pipeline.weights.merge_plan import MergePlan, plan_merge
from pipeline.weights.spectrum import FULL_COLUMNS, MAX_VALUES, in_blocks, singular

# of σ₁: the vectors of smaller values, square roots of eigenvalues in fp64, are noise
NEGLIGIBLE = 1e-7


class Left(NamedTuple):
    """Singular values (k,), largest first, and left vectors (O, k).

    `complete`: these are all whose value is not zero.
    """

    values: Tensor
    vectors: Tensor
    complete: bool


@torch.no_grad()
def left_vectors(read: Read, rows: int, columns: int) -> Left:
    """The left singular vectors of M (O, I) whose values are not negligible.

    All if one side is at most `FULL_COLUMNS`, else the `MAX_VALUES` largest. Those are found from
    the same random start for every matrix, so that what has not converged is alike in W and W + ΔW,
    and is not taken for an intruder.
    """
    if rows <= FULL_COLUMNS:
        device = device_for_matrix(rows**2)
        matrix = torch.cat([block.to(device, torch.float64) for _, block in read()])
        squares, vectors = torch.linalg.eigh(matrix @ matrix.T)  # ascending
        values, vectors, complete = squares.flip(0).clamp(min=0).sqrt(), vectors.flip(1), True
    else:
        strongest = singular(read, columns, MAX_VALUES)
        right = strongest.right
        vectors = torch.cat([block.to(right) @ right for _, block in read()])  # US
        values, complete = torch.linalg.vector_norm(vectors, dim=0), strongest.complete
        vectors = vectors / values.clamp(min=1e-150)
    count = int((values > NEGLIGIBLE * values[0]).sum())
    return Left(values[:count], vectors[:, :count], complete)


class Intruder(NamedTuple):
    """A direction of W + ΔW that W lacks."""

    position: int  # among the singular values of W + ΔW, from 1
    value: float  # σ
    similarity: float  # the largest |cos| with W's vectors


@dataclass(frozen=True)
class Pair:
    """A linear of a block: W and W + ΔW as (O, I)."""

    module: str
    shape: tuple[int, int]
    before: Read
    after: Read


@dataclass(frozen=True)
class Searched:
    """One matrix: its intruders, and their vectors (O, n).

    `complete`: all of W's singular vectors were compared. Otherwise a counterpart further down is
    not seen, and there may be fewer intruders.
    """

    pair: Pair
    intruders: tuple[Intruder, ...]
    vectors: Tensor
    complete: bool


def find_intruders(pair: Pair, top: int, epsilon: float) -> Searched:
    """The intruders among the first `top` left singular vectors of W + ΔW.

    Raises UserError if a value is not finite.
    """
    for read in (pair.before, pair.after):
        finite_norm(pair.module, read)
    before, after = (left_vectors(read, *pair.shape) for read in (pair.before, pair.after))
    strongest = after.vectors[:, :top]
    cosines = (before.vectors.T @ strongest).abs()  # (k, top)
    # W may be zero: k = 0
    similarity = torch.cat([cosines.new_zeros(1, cosines.shape[1]), cosines]).amax(0)
    positions = (similarity < epsilon).nonzero().flatten()
    rows = [
        Intruder(n + 1, float(after.values[n]), float(similarity[n])) for n in positions.tolist()
    ]
    return Searched(
        pair, tuple(rows), strongest[:, positions].cpu(), before.complete and after.complete
    )


def linears(base: Path, tuned: Path, trust_remote_code: bool = False) -> Iterator[Pair]:
    """The linears of blocks that an adapter changes, or that two checkpoints share.

    W + ΔW is as a merge would write it. Raises UserError.
    """
    model = skeleton(base, trust_remote_code)
    modules = block_linears(model)
    stored: Mapping[str, TensorLocation]
    if (tuned / CONFIG).is_file():
        merge = plan_merge(base, tuned, trust_remote_code)
        stored = merge.locations
        reads: dict[str, tuple[Read, Read]] = {
            key: (partial(merge.blocks, key), partial(_merged, merge, key)) for key in merge.edits
        }
    else:
        differences = diff_checkpoints(base, tuned, trust_remote_code)
        stored = differences.tuned
        reads = {
            delta.name: (delta.weight, partial(read_blocks, stored[delta.name]))
            for delta in differences.deltas
        }
    for name, module in modules.items():
        key = stored_name(f"{name}.weight", stored)
        if key not in reads or len(stored[key].info.shape) != 2:
            continue
        (rows, columns), (before, after) = stored[key].info.shape, reads[key]
        if is_conv1d(module):  # stored as (I, O)
            yield Pair(
                name, (columns, rows), partial(_transposed, before), partial(_transposed, after)
            )
        else:
            yield Pair(name, (rows, columns), before, after)


def _merged(merge: MergePlan, name: str) -> Iterator[Rows]:
    start = 0
    for block in merge.merged_blocks(name, torch.float32):
        yield slice(start, start + len(block)), block
        start += len(block)


def _transposed(read: Read) -> Iterator[Rows]:
    """In memory: GPT-2 and its like, which store linears this way, are small."""
    return in_blocks(read_matrix(read()).T)()


def intruders_of(
    base: Path, tuned: Path, top: int, epsilon: float, trust_remote_code: bool = False
) -> Generator[Event, None, list[Searched]]:
    """The intruders of each linear of a block, in a fine-tuned model or an adapter of `base`.

    Raises UserError.
    """
    refuse_adapter(base)
    pairs = list(linears(base, tuned, trust_remote_code))
    searched = []
    if not pairs:
        raise UserError(
            f"{tuned} changes no linear layer of a block: there are no intruders to look for."
        )
    for number, pair in enumerate(pairs, start=1):
        searched.append(find_intruders(pair, top, epsilon))
        yield Progress(number, len(pairs), pair.module)
    return searched


def damped(update: LowRank, vectors: Tensor, after: Read, factor: float) -> LowRank:
    """ΔW − (1 − factor)·U(Uᵀ(W + ΔW)) for intruders U (O, n), of rank R + n.

    Uᵀ(W + ΔW) is SVᵀ, as U is orthonormal.
    """
    strength = torch.zeros(vectors.shape[1], update.a.shape[1], dtype=torch.float64)  # (n, I)
    for rows, block in after():
        strength += vectors[rows].T @ block.double()
    a = torch.cat([update.a.float(), strength.float()])
    b = torch.cat([update.scale * update.b.float(), (factor - 1) * vectors.float()], dim=1)
    return LowRank(a, b, 1.0)


def refuse_undampable(source: Path, out: Path) -> None:
    """Raises UserError unless `source` is LoRA, and `out` is new or an earlier result."""
    if not (source / CONFIG).is_file():
        raise UserError(
            f"--damp writes an adapter, and {source} is none. Of a full model, extract one first: "
            f"`lora spectrum BASE {source} --rank 64 --out DIR`."
        )
    config = AdapterConfig.read(source)
    config.refuse_other_kinds()
    if config.spec().dora:
        raise UserError(
            f"{source} was trained with DoRA, which rescales rows: damping it is not low-rank. "
            "Train it again with finetune_lora.dora=false."
        )
    refuse_other(out, "damp", [source])


def damp(
    base: Path,
    source: Path,
    out: Path,
    searched: list[Searched],
    factor: float,
    params: Mapping[str, float],
) -> None:
    """Write the adapter `source` to `out` with the singular values of its intruders times `factor`.

    W + ΔW becomes W + ΔW + (factor − 1)·Σ uσvᵀ over the intruders, so W's share of them is scaled
    too, as in the paper. Raises UserError if there is no intruder, and as `refuse_undampable`.
    """
    refuse_undampable(source, out)
    change = load_update(source)
    low_rank = dict(change.low_rank)
    to_damp = [matrix for matrix in searched if matrix.intruders and matrix.pair.module in low_rank]
    if not to_damp:
        raise UserError(
            f"{source} has no intruder to damp. Raise --epsilon or --top, or use the adapter as "
            "it is."
        )
    for matrix in to_damp:
        module = matrix.pair.module
        low_rank[module] = damped(low_rank[module], matrix.vectors, matrix.pair.after, factor)
    changed = replace(change, low_rank=low_rank)
    write_changed(source, changed, base, out, "damp", __name__, {**params, "factor": factor})
