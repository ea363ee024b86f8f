"""ΔW = W' − W of every tensor of two checkpoints, read a block of rows at a time."""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from pipeline.adapters.attach import adaptable
from pipeline.adapters.config import CONFIG
from pipeline.adapters.lora import MAGNITUDE
from pipeline.adapters.low_rank import LowRankUpdate, layer_sort_key
from pipeline.adapters.peft import COPY
from pipeline.errors import UserError
from pipeline.files.base_model import TensorLocation, tensor_locations
from pipeline.models.base import CausalLM
from pipeline.models.load import skeleton
from pipeline.weights.blocks import (
    DTYPES,
    Read,
    Rows,
    find_location,
    read_blocks,
    read_rows,
    stored_name,
    tied_names,
)

Locations = dict[str, TensorLocation]  # by name


@dataclass(frozen=True)
class Delta:
    """One tensor as a matrix (first dimension, all others): W, and ΔW.

    ΔW may leave out rows of zeros.
    """

    name: str
    shape: tuple[int, ...]
    weight: Read
    change: Read

    @property
    def is_matrix(self) -> bool:
        return len(self.shape) == 2


@dataclass(frozen=True)
class Differences:
    """ΔW of each tensor that both checkpoints have; `skipped`: the tensors without one, and why.

    `tuned`: name in the first checkpoint → location in the second.
    """

    deltas: list[Delta]
    tuned: Mapping[str, TensorLocation]
    skipped: list[str]


def diff_checkpoints(base: Path, tuned: Path, trust_remote_code: bool = False) -> Differences:
    """The differences of two checkpoints, in natural order of the base's names.

    Layer 10 is after layer 9. One of them may have the prefix of the model's body and the other
    not, or store the head of a tied pair. Raises UserError if they have no matrix in common, or if
    shapes differ.
    """
    old, new = stored_tensors(base), stored_tensors(tuned)
    if old.keys() != new.keys():
        # a model that cannot be opened has no known ties; its tensors can be compared all the same
        tied: tuple[str, ...] = ()
        with suppress(UserError):
            tied = tied_names(skeleton(base, trust_remote_code))
        old, new = _align_tied(old, new, tied)
    # name in the base → name in the other, which may lack the prefix of the model's body, or add it
    others = {name: name for name in old.keys() & new.keys()}
    old_rest = {name: location for name, location in old.items() if name not in others}
    new_rest = {name: location for name, location in new.items() if name not in others}
    for name in old_rest:  # both must find each other, so that no tensor is compared with two
        other = stored_name(name, new_rest)
        if other is not None and stored_name(other, old_rest) == name:
            others[name] = other
    tuned_as = {name: new[others[name]] for name in sorted(others, key=layer_sort_key)}
    pairs = {name: (old[name], after) for name, after in tuned_as.items()}
    _refuse_other_model(base, tuned, pairs)

    deltas, skipped = list[Delta](), list[str]()
    for name, (before, after) in pairs.items():
        if {before.info.dtype, after.info.dtype} <= DTYPES.keys():
            weight, change = partial(read_blocks, before), partial(_difference, before, after)
            deltas.append(Delta(name, before.info.shape, weight, change))
        else:
            skipped.append(f"{name}, whose dtype is not a float")
    skipped += _describe_missing(old.keys() - others.keys(), tuned)
    skipped += _describe_missing(new.keys() - {*others.values()}, base)
    return Differences(deltas, tuned_as, skipped)


def block_linears(model: CausalLM) -> dict[str, nn.Module]:
    """Name → linear, of all but the head."""
    linears = {name: module for name, module in model.named_modules() if adaptable(module)}
    linears.pop(model.head_name, None)
    return linears


def refuse_adapter(base: Path) -> None:
    """Raises UserError if `base` is an adapter."""
    if (base / CONFIG).is_file():
        raise UserError(
            f"{base} is an adapter. Name the base model first, then the fine-tuned model or "
            "adapter."
        )


def stored_tensors(folder: Path) -> Locations:
    """The tensors of a checkpoint folder that a user names. Raises UserError."""
    if not folder.is_dir():
        raise UserError(
            f"{folder} is not a folder. Name two checkpoints of one model, or a model and an "
            "adapter for it."
        )
    return tensor_locations(folder)


def _align_tied(old: Locations, new: Locations, tied: Sequence[str]) -> tuple[Locations, Locations]:
    """Make both name a tied embedding and head alike: once, or twice if training untied them."""
    before = [*filter(None, (stored_name(name, old) for name in tied))]
    after = [*filter(None, (stored_name(name, new) for name in tied))]
    if not before or not after:
        return old, new
    untied = False  # whether the other stores the pair as two different tensors
    if len(after) == len(tied):
        first, second = (new[name] for name in after)
        untied = (
            first.info.shape != second.info.shape
            or not {first.info.dtype, second.info.dtype} <= DTYPES.keys()
            or any(bool(change.any()) for _, change in _difference(first, second))
        )
    names = tied if untied else before[:1]
    return (
        {name: location for name, location in old.items() if name not in before}
        | dict.fromkeys(names, old[before[0]]),
        {name: location for name, location in new.items() if name not in after}
        | {name: new[other] for name, other in zip(names, after, strict=False)},
    )


def _describe_missing(names: Collection[str], other: Path) -> list[str]:
    """A line on tensors that are missing in `other`; none if there are none."""
    if not names:
        return []
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return [f"{min(names, key=layer_sort_key)}{more}, missing in {other}"]


def _refuse_other_model(
    base: Path, tuned: Path, pairs: Mapping[str, tuple[TensorLocation, TensorLocation]]
) -> None:
    if not any(len(before.info.shape) > 1 for before, _ in pairs.values()):
        raise UserError(
            f"{tuned} and {base} have no matrix in common: they are different models. Name the "
            "checkpoint that training started from."
        )
    for name, pair in pairs.items():
        before, after = (list(location.info.shape) for location in pair)
        if before != after:
            raise UserError(
                f"{name} has shape {before} in {base} and {after} in {tuned}. Name the checkpoint "
                "that training started from; if the vocabulary was expanded, the expanded one."
            )


def _difference(old: TensorLocation, new: TensorLocation) -> Iterator[Rows]:
    """In fp64, which is exact for the difference of two 16- or 32-bit numbers of similar size."""
    for (rows, before), (_, after) in zip(read_blocks(old), read_blocks(new), strict=True):
        yield rows, after.double() - before.double()


def diff_adapter(base: Path, change: LowRankUpdate, trust_remote_code: bool = False) -> list[Delta]:
    """ΔW of the parameters that an adapter trained in full or by rows.

    Its low-rank updates are in `change`. DoRA's magnitudes are not included: the base has no such
    tensors. Raises UserError for a tensor missing in `base`.
    """
    base_tensors = stored_tensors(base)
    # Both of a tied pair are saved, but the base may store only one: the other counts only if its
    # values differ.
    names = [name for name in change.whole if not name.endswith((MAGNITUDE, COPY))]
    locations: Locations = {}
    for name in sorted(names, key=lambda name: stored_name(name, base_tensors) is None):
        location = require_location(name, base_tensors, base, trust_remote_code)
        twins = [other for other in locations if locations[other] == location]
        if not twins or not torch.equal(change.whole[name], change.whole[twins[0]]):
            locations[name] = location
    deltas = []
    for name, location in locations.items():
        value = change.whole[name]
        _refuse_shape(name, location, tuple(value.shape), base)
        changed = partial(_full_difference, value, location)
        deltas.append(Delta(name, tuple(value.shape), partial(read_blocks, location), changed))
    for module, (ids, rows) in change.rows.items():
        location = require_location(f"{module}.weight", base_tensors, base, trust_remote_code)
        _refuse_shape(module, location, (location.info.shape[0], rows.shape[1]), base)
        if max(ids) >= location.info.shape[0]:
            raise UserError(
                f"{base}: {module} has {location.info.shape[0]} rows, but the adapter trains row "
                f"{max(ids)}. Name the model that it was trained on."
            )
        changed = partial(_row_difference, ids, rows, location)
        deltas.append(
            Delta(f"{module}.weight", location.info.shape, partial(read_blocks, location), changed)
        )
    return deltas


def require_location(
    name: str, old: Locations, base: Path, trust_remote_code: bool = False
) -> TensorLocation:
    """Where the base stores a parameter, also under a name without prefix.

    A tied head is found at its embedding. Raises UserError.
    """
    # the model is opened only for a name that is not stored: spectra need its tensors alone
    location = find_location(name, old) or find_location(
        name, old, tied_names(skeleton(base, trust_remote_code))
    )
    if location is None:
        raise UserError(
            f"{base} has no tensor {name}, which the adapter changes. Name the model that it was "
            "trained on."
        )
    return location


def _refuse_shape(name: str, location: TensorLocation, shape: tuple[int, ...], base: Path) -> None:
    if location.info.shape != shape:
        raise UserError(
            f"{name} has shape {list(location.info.shape)} in {base} and {list(shape)} in the "
            "adapter. Name the model that it was trained on."
        )


def _full_difference(value: Tensor, location: TensorLocation) -> Iterator[Rows]:
    flat = value.reshape(len(value), -1)
    return ((rows, flat[rows].double() - block.double()) for rows, block in read_blocks(location))


def _row_difference(ids: tuple[int, ...], rows: Tensor, location: TensorLocation) -> Iterator[Rows]:
    yield slice(0, len(ids)), rows.double() - read_rows(location, ids).double()


def finite_norm(name: str, read: Read) -> float:
    """The norm of a tensor's values. Raises UserError if one is not finite."""
    size = norm(read)
    if not math.isfinite(size):
        raise UserError(
            f"{name} has values that are not finite. Copy the checkpoint again, or train it again."
        )
    return size


@torch.no_grad()
def norm(read: Read) -> float:
    """The Frobenius norm, in fp64."""
    return math.sqrt(sum(float(block.double().square().sum()) for _, block in read()))
