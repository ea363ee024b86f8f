"""Merge file to file, a block of rows at a time; memory does not grow with the model (the
document's §4.4).

An edit changes rows of one tensor; a `Merge` applies its edits while it copies a base's files. Rows
are independent in every edit but DoRA's on a transposed weight, so a block of them can be read,
folded and written alone.
"""

import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import zip_longest
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from pipeline.adapters.lora import LEAST
from pipeline.adapters.low_rank import squared_norm
from pipeline.errors import UserError
from pipeline.files.artifact import MANIFEST, read_json, write_json
from pipeline.files.base_model import INDEX, TensorLocation, tensor_locations
from pipeline.files.safetensors_file import Bytes, NewTensor, in_file_order, rewrite
from pipeline.files.text import in_units

Item = TypeVar("Item")
Result = TypeVar("Result")
CONFIG = "config.json"
SAMPLES = 2
BLOCK = 2**18  # values of W in memory as fp32 at once: fits in a core's cache
Rows = tuple[slice, Tensor]
Read = Callable[[], Iterator[Rows]]  # each call reads a matrix once, first row to last
DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
# Not copied: weights in other formats, which would stay unmerged, and records of how the base was
# made.
WEIGHTS = (
    "*.safetensors",
    "*.bin",
    "*.pt",
    "*.pth",
    "*.ckpt",
    "*.gguf",
    "*.onnx",
    "*.msgpack",
    "*.h5",
)
RECORDS = (MANIFEST, "audit.json", "loss.csv", "certificate.json")


def blocks(rows: int, columns: int, samples: int | None = None) -> Iterator[slice]:
    """Slices of rows that cover a matrix, or `samples` to 2·`samples` of them, evenly spread."""
    size = max(1, BLOCK // max(1, columns))
    step = max(1, -(-rows // size) // samples) if samples else 1
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size * step))


def merged_rows(weight: Tensor, b: Tensor, a: Tensor, scale: float) -> Tensor:
    """weight (n, I) + s·b·a for b (n, R) and a (R, I), summed in fp32 and rounded once to the
    weight's dtype.
    """
    return _add_low_rank(weight, b, a, scale).to(weight.dtype)


@torch.no_grad()
def _add_low_rank(weight: Tensor, b: Tensor, a: Tensor, scale: float) -> Tensor:
    wide = torch.promote_types(weight.dtype, torch.float32)
    result: Tensor = weight.to(wide, copy=True).addmm_(b.to(wide), a.to(wide), alpha=scale)
    return result


# rows of a tensor → the same rows of the merged tensor, in the same dtype
Edit = Callable[[Tensor, slice], Tensor]


@dataclass(frozen=True)
class AddLowRank:
    """W + s·left·right, for left (n, R) and right (R, m)."""

    left: Tensor
    right: Tensor
    scale: float

    def __call__(self, weight: Tensor, rows: slice) -> Tensor:
        return merged_rows(weight, self.left[rows], self.right, self.scale)

    def dot_products(self, old: Tensor, new: Tensor, rows: slice) -> tuple[float, float]:
        """⟨new − old, update⟩ and ⟨update, update⟩ over `rows`, for update = s·left·right, never
        materialized.
        """
        products = ((new - old) @ self.right.float().T) * self.left[rows].float()  # (rows, R)
        return self.scale * float(products.sum()), squared_norm(
            self.left[rows], self.right, self.scale
        )

    def with_norms(self, _blocks: Iterable[Rows]) -> "AddLowRank":
        return self


@dataclass(frozen=True)
class AddToExperts:
    """Wₑ + s·leftₑ·rightₑ for stacked W (E, n, m), left (E, n, R) and right (E, R, m).

    A row of the tensor is all of one expert, (n·m).
    """

    left: Tensor
    right: Tensor
    scale: float

    def of(self, expert: int, rows: slice = slice(None)) -> AddLowRank:
        """The edit of some rows of one expert's own matrix."""
        return AddLowRank(self.left[expert, rows], self.right[expert], self.scale)

    def _each(self, rows: slice, *stacked: Tensor) -> Iterator[tuple[AddLowRank, list[Tensor]]]:
        shape = self.left.shape[1], self.right.shape[2]
        for place, expert in enumerate(range(rows.start, rows.stop)):
            yield self.of(expert), [weight[place].view(shape) for weight in stacked]

    def __call__(self, weight: Tensor, rows: slice) -> Tensor:
        return torch.stack(
            [edit(w, slice(None)).flatten() for edit, (w,) in self._each(rows, weight)]
        )

    def dot_products(self, old: Tensor, new: Tensor, rows: slice) -> tuple[float, float]:
        """⟨new − old, update⟩ and ⟨update, update⟩ over the experts `rows`."""
        products = [
            edit.dot_products(o, n, slice(None)) for edit, (o, n) in self._each(rows, old, new)
        ]
        return sum(dot for dot, _ in products), sum(size for _, size in products)

    def with_norms(self, _blocks: Iterable[Rows]) -> "AddToExperts":
        return self


@dataclass(frozen=True)
class RescaleRows:
    """DoRA: m/‖V‖·V for V = W + s·left·right, with magnitude m (O,) per output.

    An output's weights are a row of W, or a column if `transposed` (Conv1D); column norms need all
    rows of W first.
    """

    left: Tensor
    right: Tensor
    scale: float
    magnitude: Tensor
    transposed: bool = False
    norms: Tensor | None = None

    def with_norms(self, blocks: Iterable[Rows]) -> "RescaleRows":
        """Itself, with ‖V‖ of every column if they are needed; `blocks` must cover W."""
        if not self.transposed:
            return self
        squares = torch.zeros_like(self.magnitude)
        for rows, block in blocks:
            squares += self._updated(block, rows).square().sum(0)
        return replace(self, norms=squares.sqrt().clamp_(min=LEAST))

    def __call__(self, weight: Tensor, rows: slice) -> Tensor:
        result = self._updated(weight, rows)
        if self.norms is not None:
            return (result * (self.magnitude / self.norms)).to(weight.dtype)
        ratio: Tensor = self.magnitude[rows] / torch.linalg.vector_norm(result, dim=1).clamp_(
            min=LEAST
        )
        return (result * ratio[:, None]).to(weight.dtype)

    def _updated(self, weight: Tensor, rows: slice) -> Tensor:
        return _add_low_rank(weight, self.left[rows], self.right, self.scale)

    def dot_products(self, old: Tensor, new: Tensor, rows: slice) -> tuple[float, float]:
        """⟨new − old, update⟩ and ⟨update, update⟩ over `rows`."""
        update = self(old, rows) - old
        return float(((new - old) * update).sum()), float(update.square().sum())


Update = AddLowRank | AddToExperts | RescaleRows


@dataclass(frozen=True)
class SetRows:
    """Sets the rows `ids` (n,) to `values` (n, m)."""

    ids: Tensor
    values: Tensor

    def __call__(self, weight: Tensor, rows: slice) -> Tensor:
        here = (self.ids >= rows.start) & (self.ids < rows.stop)
        return weight.index_copy(0, self.ids[here] - rows.start, self.values[here].to(weight.dtype))


@dataclass(frozen=True)
class Replace:
    """Replaces the tensor by another of the same shape."""

    values: Tensor

    def __call__(self, weight: Tensor, rows: slice) -> Tensor:
        return self.values[rows].reshape(weight.shape).to(weight.dtype)


def same_edit(one: Edit | None, other: Edit | None) -> bool:
    """Whether two edits have the same effect."""
    if one is None or type(one) is not type(other):
        return one is other
    pairs = zip(vars(one).values(), vars(other).values(), strict=True)
    return all(
        torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b
        for a, b in pairs
    )


@dataclass(frozen=True)
class Merge:
    """A base's tensors and the edits to apply to them, by stored name.

    `copies`: name → source, for tensors that start as a copy of another; the base need not store
    them. `unties`: whether tied embedding and head become different weights. `quantizers`: for
    tensors that were quantized while the adapter trained, a function that quantizes and dequantizes
    them, so that the edit applies to the same weights.
    """

    base: Path
    locations: Mapping[str, TensorLocation]
    edits: Mapping[str, Edit]
    copies: Mapping[str, str]
    unties: bool
    quantizers: Mapping[str, Callable[[Tensor], Tensor]]
    dtype: str | None = None  # of all written weights: F32, BF16 or F16; None: each tensor's own

    @property
    def size(self) -> int:
        """Size of the written weights in bytes."""
        return sum(self._new_tensor(name).size for name in (*self.locations, *self.added))

    @property
    def added(self) -> list[str]:
        """Written tensors that the base does not store."""
        return [name for name in self.copies if name not in self.locations]

    def source(self, name: str) -> TensorLocation:
        """The base's tensor that a tensor of the merged checkpoint starts from."""
        return self.locations[self.copies.get(name, name)]

    def write(self, out: Path) -> Iterator[str]:
        """Write the complete checkpoint to `out`; yields each weight file's name when it is done.

        Raises UserError if there is not enough disk space.
        """
        refuse_full_disk(out, self.size)
        fills = []
        for file in self.files:
            # its own tensors in their order, so that they are read and written sequentially, then
            # added ones
            added = [name for name in self.added if self.source(name).file == file]
            tensors = [self._new_tensor(name) for name in (*in_file_order(file), *added)]
            fills.append([(file.name, fill) for fill in rewrite(file, out / file.name, tensors)])
        # round robin over the files: a file takes one writer at a time
        jobs = [job for group in zip_longest(*fills) for job in group if job]
        remaining = Counter(name for name, _ in jobs)
        for (name, _), _none in zip(jobs, map_in_threads(lambda job: job[1](), jobs), strict=True):
            remaining[name] -= 1
            if not remaining[name]:
                yield name
        copy_other_files(self.base, out)

        # config.json and the index are left alone, byte for byte, if nothing in them changes
        config = read_json(out / CONFIG, "Copy the base again")
        changes: dict[str, Any] = {"tie_word_embeddings": False} if self.unties else {}
        if self.dtype:
            key = "torch_dtype" if "torch_dtype" in config else "dtype"  # the older name
            changes[key] = str(DTYPES[self.dtype]).removeprefix("torch.")
        if changes:
            write_json(out / CONFIG, {**config, **changes})
        if (out / INDEX).exists() and (self.added or self.dtype):
            index = read_json(out / INDEX, "Copy the base again")
            index["weight_map"] |= {name: self.source(name).file.name for name in self.added}
            if "total_size" in index.get("metadata", {}):
                index["metadata"]["total_size"] = self.size
            write_json(out / INDEX, index)

    @property
    def files(self) -> list[Path]:
        return sorted({location.file for location in self.locations.values()})

    def _new_tensor(self, name: str) -> NewTensor:
        info = self.source(name).info
        dtype = self.dtype if self.dtype and info.dtype in DTYPES else info.dtype
        changed = (
            name in self.edits
            or name in self.copies
            or name in self.quantizers
            or dtype != info.dtype
        )
        return NewTensor(
            name, dtype, info.shape, (lambda: self._content(name, dtype)) if changed else None
        )

    def _content(self, name: str, dtype: str) -> Iterator[Bytes]:
        """The new bytes of a tensor: edited in the wider of the two dtypes and rounded once.

        In the narrower one, part of the update would be lost before it is added.
        """
        target = DTYPES.get(dtype)
        for new in self.merged_blocks(name, target):
            written = new if target is None else new.to(target)
            if target == torch.float16 and not written.isfinite().all():
                raise UserError(
                    f"{name} has the value {float(new.abs().max()):.3g}, which overflows fp16. "
                    "Use --precision bf16."
                )
            yield written.contiguous().flatten().view(torch.uint8).numpy().data

    def merged_blocks(self, name: str, target: torch.dtype | None) -> Iterator[Tensor]:
        """A tensor after its edit, a block of rows at a time, in the wider of its dtype and
        `target`.
        """
        edit = self.edits.get(name)
        if isinstance(edit, RescaleRows):
            edit = edit.with_norms(self.blocks(name))
        for rows, block in self.blocks(name):
            wide = block if target is None else block.to(torch.promote_types(block.dtype, target))
            yield edit(wide, rows) if edit else wide

    def blocks(self, name: str, samples: int | None = None) -> Iterator[Rows]:
        """A tensor before its edit, a block of rows at a time; `samples` as in `edits.blocks`."""
        if name not in self.quantizers:
            return read_blocks(self.source(name), samples)
        weight = self.quantizers[name](
            torch.cat([block for _, block in read_blocks(self.source(name))]).float()
        )
        rows, columns = weight.shape
        return ((span, weight[span]) for span in blocks(rows, columns, samples))


def refuse_full_disk(out: Path, size: int) -> None:
    """Raises UserError unless the disk of the folder `out` has `size` bytes free."""
    free = shutil.disk_usage(out).free
    if free < size:
        raise UserError(
            f"{out.parent}: the merged model needs {in_units(size)}, but only {in_units(free)} "
            "are free. "
            "Free some space, or name a folder elsewhere with --out."
        )


def copy_other_files(base: Path, out: Path) -> None:
    """Copy tokenizer, templates, code, licence, index: all files but weights, hidden files and
    RECORDS; recursively.
    """
    for path in sorted(base.rglob("*")):
        name = path.relative_to(base)
        weights = any(path.match(pattern) for pattern in WEIGHTS)
        hidden = any(part.startswith(".") for part in name.parts)
        if path.is_file() and not weights and not hidden and str(name) not in RECORDS:
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, out / name)


def read_blocks(location: TensorLocation, samples: int | None = None) -> Iterator[Rows]:
    """A stored tensor as a matrix (first dimension, all others), a block of rows at a time.

    `samples` as in `edits.blocks`. Raises UserError.
    """
    info = location.info
    if info.dtype not in DTYPES:
        raise UserError(
            f"{location.file}: merging does not support dtype {info.dtype}. Use the 16-bit model."
        )
    rows = info.shape[0] if info.shape else 1
    columns = prod(info.shape[1:])
    width = (info.stop - info.start) // max(1, rows)  # bytes
    with location.file.open("rb", buffering=0) as file:
        for span in blocks(rows, columns, samples):
            block = torch.empty((span.stop - span.start) * width, dtype=torch.uint8)
            _read_into(
                file.fileno(), block.numpy().data, info.start + span.start * width, location.file
            )
            yield span, block.view(DTYPES[info.dtype]).view(-1, columns)


def read_rows(location: TensorLocation, ids: Iterable[int]) -> Tensor:
    """Some rows (n, m) of a stored matrix."""
    info, (_, columns) = location.info, location.info.shape
    rows = torch.empty(len(ids := list(ids)), columns, dtype=DTYPES[info.dtype])
    width = columns * rows.itemsize
    with location.file.open("rb", buffering=0) as file:
        for row, number in zip(rows.view(torch.uint8), ids, strict=True):
            _read_into(file.fileno(), row.numpy().data, info.start + number * width, location.file)
    return rows


def _read_into(descriptor: int, view: memoryview, start: int, file: Path) -> None:
    while view:
        count = os.preadv(descriptor, [view], start)
        if not count:
            raise UserError(f"{file} was truncated while it was read. Create or copy it again.")
        view, start = view[count:], start + count


class Written(NamedTuple):
    """A written matrix: the relative rounding of its values, and its blocks of rows as
    `read_blocks` samples them.
    """

    eps: float
    blocks: Iterator[Rows]


class UpdateRatio(NamedTuple):
    """⟨W' − W, Δ⟩ / ⟨Δ, Δ⟩ for the update Δ, LoRA's s·BA: 1 if merged once, 0 if lost, 2 if twice;
    None if Δ is 0.

    `rounding`: the deviation from 1 that rounding W' to its dtype can cause.
    """

    value: float | None
    rounding: float


def written_matrices(out: Path) -> Callable[[str], Written]:
    """Reads the matrices of the checkpoint `out` by stored name."""
    locations = tensor_locations(out)

    def read(name: str) -> Written:
        location = locations[name]
        return Written(torch.finfo(DTYPES[location.info.dtype]).eps, read_blocks(location, SAMPLES))

    return read


@torch.no_grad()
def update_ratios(merge: Merge, written: Callable[[str], Written]) -> dict[str, UpdateRatio]:
    """The ratio of every matrix that LoRA or DoRA changed, by stored module name, measured on what
    was `written`.

    A faulty merge affects a whole matrix, not single rows, so only `SAMPLES` or more evenly spread
    blocks of a large matrix are read again. Reading all of them would take as long as the merge
    itself.
    """
    edits = {name: edit for name, edit in merge.edits.items() if isinstance(edit, Update)}

    def ratio_of(name: str) -> UpdateRatio:
        update, after = edits[name].with_norms(merge.blocks(name)), written(name)
        dot = weight = size = 0.0
        for (rows, old), (_, new) in zip(merge.blocks(name, SAMPLES), after.blocks, strict=True):
            block_dot, block_size = update.dot_products(old.float(), new.float(), rows)
            dot, size = dot + block_dot, size + block_size
            weight += float(torch.linalg.vector_norm(old, dtype=torch.float32)) ** 2
        # rounding moves each weight by up to eps·|W|, which counts against an update of norm √size
        return UpdateRatio(
            dot / size if size else None, after.eps * (weight / max(size, 1e-60)) ** 0.5
        )

    values = map_in_threads(ratio_of, edits)
    return {name.removesuffix(".weight"): ratio for name, ratio in zip(edits, values, strict=True)}


def map_in_threads(work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Results in order, computed in a pool of as many threads as torch has."""
    with single_torch_thread() as threads, ThreadPoolExecutor(threads) as pool:
        yield from pool.map(work, items)


@contextmanager
def single_torch_thread() -> Iterator[int]:
    """Limits torch to one thread, as its tensors here are too small to split; yields the previous
    number.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield before
    finally:
        torch.set_num_threads(before)
