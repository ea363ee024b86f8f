"""What differs between a base and what was made of it: ΔW = W' − W of every tensor, read some rows at a time."""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from pipeline.adapters.lora import MAGNITUDE
from pipeline.adapters.peft.tensors import COPY
from pipeline.adapters.peft.updates import LowRankUpdate, layer_sort_key
from pipeline.errors import UserError
from pipeline.files.shards import Place, places
from pipeline.models.load import skeleton
from pipeline.weights.merge_plan import stored_name
from pipeline.weights.streaming import DTYPES, read_blocks, read_rows
from pipeline.weights.svd import Read, Rows

Places = dict[str, Place]  # by name


@dataclass(frozen=True)
class Delta:
    """One tensor as a matrix of its first dimension by the others: W, and ΔW, whose rows of zeros may be missing."""

    name: str
    shape: tuple[int, ...]
    weight: Read
    change: Read

    @property
    def is_matrix(self) -> bool:
        return len(self.shape) == 2


@dataclass(frozen=True)
class Differences:
    """Of two checkpoints, ΔW of each tensor that both have; `unsaid`: of what there is none, and why.

    `tuned`: where the second has a tensor, by what the first calls it.
    """

    deltas: list[Delta]
    tuned: Mapping[str, Place]
    unsaid: list[str]


def diff_checkpoints(base: Path, tuned: Path, trust_remote_code: bool = False) -> Differences:
    """Of every tensor of two checkpoints, by its name in the base, layer 10 after layer 9.

    One may name the model's body and the other not, or store the head of a tied pair. Raises UserError if no matrix is
    in both, or their shapes differ.
    """
    old, new = stored(base), stored(tuned)
    if old.keys() != new.keys():
        old, new = _of_one_pair(old, new, _tied_if_known(base, trust_remote_code))
    others = _matched(old, new)
    names = sorted(others, key=layer_sort_key)
    pairs = {name: (old[name], new[others[name]]) for name in names}
    _refuse_other_model(base, tuned, pairs)
    plain = {name: pair for name, pair in pairs.items() if all(place.info.dtype in DTYPES for place in pair)}
    deltas = [
        Delta(name, before.info.shape, partial(read_blocks, before), partial(_difference, before, after))
        for name, (before, after) in plain.items()
    ]
    coded = [f"{name}, which holds no plain numbers" for name in names if name not in plain]
    alone = [*_alone(old.keys() - others.keys(), tuned), *_alone(new.keys() - {*others.values()}, base)]
    return Differences(deltas, {name: after for name, (_, after) in pairs.items()}, coded + alone)


def stored(folder: Path) -> Places:
    """`places` of a checkpoint folder that a user names. Raises UserError."""
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder. Name two checkpoints of one model, or a model and an adapter on it.")
    return places(folder)


def tied(base: Path, trust_remote_code: bool = False) -> tuple[str, ...]:
    """Full names of the weights of embedding and head, if they are one matrix. Raises UserError."""
    model = skeleton(base, trust_remote_code)
    return (f"{model.embedding_name}.weight", f"{model.head_name}.weight") if model.shape.tied else ()


def _tied_if_known(base: Path, trust_remote_code: bool) -> tuple[str, ...]:
    """Tensors can be compared of a model that cannot be opened too."""
    try:
        return tied(base, trust_remote_code)
    except UserError:
        return ()


def _of_one_pair(old: Places, new: Places, ends: Sequence[str]) -> tuple[Places, Places]:
    """The same, a tied embedding and head once in each; twice where training made two of them."""
    before, after = ([name for end in ends if (name := stored_name(end, places))] for places in (old, new))
    if not before or not after:
        return old, new
    apart = len(after) == len(ends) and not _equal(*(new[name] for name in after))
    names = ends if apart else before[:1]
    return (
        {name: place for name, place in old.items() if name not in before} | dict.fromkeys(names, old[before[0]]),
        {name: place for name, place in new.items() if name not in after}
        | {name: new[other] for name, other in zip(names, after, strict=False)},
    )


def _equal(one: Place, other: Place) -> bool:
    if one.info.shape != other.info.shape or not {one.info.dtype, other.info.dtype} <= {*DTYPES}:
        return False
    pairs = zip(read_blocks(one), read_blocks(other), strict=True)
    return all(torch.equal(mine.double(), theirs.double()) for (_, mine), (_, theirs) in pairs)


def _matched(old: Places, new: Places) -> dict[str, str]:
    """Name in the base → name in the other, which may be without that of the body, or have it besides."""
    found = {name: name for name in old.keys() & new.keys()}
    mine, theirs = ({name: at for name, at in one.items() if name not in found} for one in (old, new))
    for name in mine:
        other = stored_name(name, theirs)
        if other is not None and stored_name(other, mine) == name:
            found[name] = other
    return found


def _alone(names: Collection[str], other: Path) -> list[str]:
    """What one folder has and the `other` has not, in a line."""
    if not names:
        return []
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return [f"{min(names, key=layer_sort_key)}{more}, which {other} has not"]


def _refuse_other_model(base: Path, tuned: Path, pairs: Mapping[str, tuple[Place, Place]]) -> None:
    if not any(len(before.info.shape) > 1 for before, _ in pairs.values()):
        raise UserError(
            f"{tuned} has no matrix that {base} has: they are two models. Name the checkpoint that training began from."
        )
    for name, pair in pairs.items():
        before, after = (list(place.info.shape) for place in pair)
        if before != after:
            raise UserError(
                f"{name} is {before} in {base} and {after} in {tuned}: there is no difference of the two. Name the "
                "checkpoint that training began from: with a vocabulary that grew, the expanded one."
            )


def _difference(old: Place, new: Place) -> Iterator[Rows]:
    """In fp64: of two 16- or 32-bit numbers it is exact."""
    for (rows, before), (_, after) in zip(read_blocks(old), read_blocks(new), strict=True):
        yield rows, after.double() - before.double()


def of_adapter(base: Path, change: LowRankUpdate, trust_remote_code: bool = False) -> list[Delta]:
    """Of all that an adapter trained itself, in full or by rows: its low-rank updates are in `change`.

    DoRA's lengths are none of the base's tensors. Raises UserError for a tensor that `base` has not.
    """
    old = stored(base)
    found = []
    for name, place in _places_of_whole(change, old, base, trust_remote_code).items():
        value = change.whole[name]
        _refuse_shape(name, place, tuple(value.shape), base)
        found.append(Delta(name, tuple(value.shape), partial(read_blocks, place), partial(_against, value, place)))
    for module, (ids, rows) in change.rows.items():
        place = place_of(f"{module}.weight", old, base, trust_remote_code)
        _refuse_shape(module, place, (place.info.shape[0], rows.shape[1]), base)
        if max(ids) >= place.info.shape[0]:
            raise UserError(f"{base}: {module} has {place.info.shape[0]} rows, the adapter trains row {max(ids)}.")
        changed = partial(_of_rows, ids, rows, place)
        found.append(Delta(f"{module}.weight", place.info.shape, partial(read_blocks, place), changed))
    return found


def _places_of_whole(change: LowRankUpdate, old: Places, base: Path, trust_remote_code: bool) -> Places:
    """Of what was trained in full. Of a tied pair, which is written twice, one has no place of its own, and counts only
    where it differs."""
    names = [name for name in change.whole if not name.endswith((MAGNITUDE, COPY))]
    found: Places = {}
    for name in sorted(names, key=lambda name: stored_name(name, old) is None):
        place = place_of(name, old, base, trust_remote_code)
        twin = next((other for other, at in found.items() if at == place), None)
        if twin is None or not torch.equal(change.whole[name], change.whole[twin]):
            found[name] = place
    return found


def place_of(name: str, old: Places, base: Path, trust_remote_code: bool = False) -> Place:
    """Where the base has a parameter, whatever its files call it; one of a tied pair where the other is. Raises
    UserError."""
    found = stored_name(name, old)
    if found is None and name in (ends := tied(base, trust_remote_code)):
        found = next((stored_name(end, old) for end in ends if end != name), None)
    if found is None:
        raise UserError(f"{base} has no {name}, which the adapter changes. Name the model that it was trained on.")
    return old[found]


def _refuse_shape(name: str, place: Place, shape: tuple[int, ...], base: Path) -> None:
    if place.info.shape != shape:
        raise UserError(
            f"{name} is {list(place.info.shape)} in {base}, the adapter's is {list(shape)}. Name the model that it was "
            "trained on."
        )


def _against(value: Tensor, place: Place) -> Iterator[Rows]:
    flat = value.reshape(len(value), -1)
    return ((rows, flat[rows].double() - block.double()) for rows, block in read_blocks(place))


def _of_rows(ids: tuple[int, ...], rows: Tensor, place: Place) -> Iterator[Rows]:
    yield slice(0, len(ids)), rows.double() - read_rows(place, ids).double()


@torch.no_grad()
def norm(read: Read) -> float:
    """‖·‖, in fp64."""
    return math.sqrt(sum(float(block.double().square().sum()) for _, block in read()))
