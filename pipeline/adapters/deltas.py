"""What differs between a base and what was made of it: ΔW = W' − W of every tensor, read some rows at a time."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from pipeline.adapters.attach import MAGNITUDE
from pipeline.adapters.change import COPY, Change, in_order
from pipeline.adapters.plan import stored_name
from pipeline.adapters.singular import Read, Rows
from pipeline.adapters.stream import DTYPES, read_blocks, read_rows
from pipeline.errors import UserError
from pipeline.shards import Place, places


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


def between(base: Path, tuned: Path) -> list[Delta]:
    """Of every tensor of two checkpoints, by name, layer 10 after layer 9. Raises UserError if their shapes differ."""
    old, new = stored(base), stored(tuned)
    _refuse_other_model(base, old, tuned, new)
    return [
        Delta(name, old[name].info.shape, partial(read_blocks, old[name]), partial(_difference, old[name], new[name]))
        for name in sorted(old, key=in_order)
        if old[name].info.dtype in DTYPES and new[name].info.dtype in DTYPES
    ]


def stored(folder: Path) -> dict[str, Place]:
    """`places` of a checkpoint folder that a user names. Raises UserError."""
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder. Name two checkpoints of one model, or a model and an adapter on it.")
    return places(folder)


def _refuse_other_model(base: Path, old: dict[str, Place], tuned: Path, new: dict[str, Place]) -> None:
    for here, there, missing in ((base, tuned, old.keys() - new.keys()), (tuned, base, new.keys() - old.keys())):
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise UserError(
                f"{there} has no {min(missing, key=in_order)}{more}, which {here} has: they are two models. "
                "Name the checkpoint that training began from."
            )
    for name in sorted(old, key=in_order):
        before, after = (list(place.info.shape) for place in (old[name], new[name]))
        if before != after:
            raise UserError(
                f"{name} is {before} in {base} and {after} in {tuned}: there is no difference of the two. Name the "
                "checkpoint that training began from: with a vocabulary that grew, the expanded one."
            )


def _difference(old: Place, new: Place) -> Iterator[Rows]:
    """In fp64: of two 16- or 32-bit numbers it is exact."""
    for (rows, before), (_, after) in zip(read_blocks(old), read_blocks(new), strict=True):
        yield rows, after.double() - before.double()


def in_other_form(base: Path, tuned: Path) -> list[str]:
    """Tensors that hold no plain numbers of 16 bits or more, of which nothing is said: codes, masks, positions."""
    new = stored(tuned)
    found = {name for name, place in stored(base).items() if not {place.info.dtype, new[name].info.dtype} <= {*DTYPES}}
    return sorted(found, key=in_order)


def of_adapter(base: Path, change: Change) -> list[Delta]:
    """Of all that an adapter trained itself, in full or by rows: its low-rank updates are in `change`.

    DoRA's lengths are none of the base's tensors. Raises UserError for a tensor that `base` has not.
    """
    old = stored(base)
    found = []
    for name, value in change.whole.items():
        if name.endswith((MAGNITUDE, COPY)):
            continue
        place = place_of(name, old, base)
        _refuse_shape(name, place, tuple(value.shape), base)
        found.append(Delta(name, tuple(value.shape), partial(read_blocks, place), partial(_against, value, place)))
    for module, (ids, rows) in change.rows.items():
        place = place_of(f"{module}.weight", old, base)
        _refuse_shape(module, place, (place.info.shape[0], rows.shape[1]), base)
        if max(ids) >= place.info.shape[0]:
            raise UserError(f"{base}: {module} has {place.info.shape[0]} rows, the adapter trains row {max(ids)}.")
        changed = partial(_of_rows, ids, rows, place)
        found.append(Delta(f"{module}.weight", place.info.shape, partial(read_blocks, place), changed))
    return found


def place_of(name: str, old: dict[str, Place], base: Path) -> Place:
    """Where the base has a parameter, whatever its files call it. Raises UserError."""
    found = stored_name(name, old)
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
