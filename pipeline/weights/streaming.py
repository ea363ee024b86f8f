"""Merge through files: tensor by tensor, in memory that does not grow with the model (the document's §4.4)."""

import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from pipeline.errors import UserError
from pipeline.files.artifact import MANIFEST, read_json, write_json
from pipeline.files.base_model import INDEX
from pipeline.files.shards import Bytes, New, Place, in_file_order, places, rewrite
from pipeline.project.logs.run_log import in_units
from pipeline.weights.edits import AddLowRank, Edit, RescaleRows, blocks

Item = TypeVar("Item")
Result = TypeVar("Result")
CONFIG = "config.json"
SAMPLES = 2
Update = AddLowRank | RescaleRows
DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
# What is not carried over: weights in other forms, which would not be merged, and records of how the base was made.
WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.onnx", "*.msgpack", "*.h5")
RECORDS = (MANIFEST, "audit.json", "loss.csv", "certificate.json")


@dataclass(frozen=True)
class Merge:
    """A base's tensors, and by stored name what is done to them.

    `copies`: tensors that begin as another one, name → that one's, whether or not the base stores them. `unties`:
    embedding and head, which were one matrix, no longer are. `rounded`: tensors that were kept in few bits while the
    adapter trained, and become what they were then, by what does it to the whole tensor.
    """

    base: Path
    places: Mapping[str, Place]
    edits: Mapping[str, Edit]
    copies: Mapping[str, str]
    unties: bool
    rounded: Mapping[str, Callable[[Tensor], Tensor]]
    dtype: str | None = None  # that all weights are written in: F32, BF16 or F16; None: each in its own

    @property
    def size(self) -> int:
        """Bytes of the weights that will be written."""
        return sum(self._new(name).size for name in (*self.places, *self.added))

    @property
    def added(self) -> list[str]:
        """Tensors that the base does not store."""
        return [name for name in self.copies if name not in self.places]

    def source(self, name: str) -> Place:
        """Where a tensor of the merged checkpoint comes from."""
        return self.places[self.copies.get(name, name)]

    def write(self, out: Path) -> Iterator[str]:
        """Fill `out` with a whole checkpoint, naming each file as it is done. Raises UserError where disk is short."""
        self._refuse_little_space(out)
        fills = [
            [(file.name, fill) for fill in rewrite(file, out / file.name, self._tensors(file))] for file in self.files
        ]
        jobs = [
            job for turn in zip_longest(*fills) for job in turn if job
        ]  # in turns: a file takes one writer at a time
        left = Counter(name for name, _ in jobs)
        for (name, _), _none in zip(jobs, side_by_side(lambda job: job[1](), jobs), strict=True):
            left[name] -= 1
            if not left[name]:
                yield name
        carry_over(self.base, out)
        self._say_what_changed(out)

    @property
    def files(self) -> list[Path]:
        return sorted({place.file for place in self.places.values()})

    def _refuse_little_space(self, out: Path) -> None:
        free = shutil.disk_usage(out).free
        if free < self.size:
            raise UserError(
                f"{out.parent}: the merged model takes {in_units(self.size)}, {in_units(free)} are free. "
                "Free some space, or name a folder elsewhere with --out."
            )

    def _tensors(self, file: Path) -> list[New]:
        """Those of a file, in its order, and what is added to it."""
        added = [name for name in self.added if self.source(name).file == file]
        return [self._new(name) for name in (*in_file_order(file), *added)]

    def _new(self, name: str) -> New:
        info = self.source(name).info
        dtype = self.dtype if self.dtype and info.dtype in DTYPES else info.dtype
        changed = name in self.edits or name in self.copies or name in self.rounded or dtype != info.dtype
        return New(name, dtype, info.shape, (lambda: self._pieces(name, dtype)) if changed else None)

    def _pieces(self, name: str, dtype: str) -> Iterator[Bytes]:
        """Added to in the wider of the two precisions, and narrowed once."""
        edit, target = self.edits.get(name), DTYPES.get(dtype)
        if isinstance(edit, RescaleRows):
            edit = edit.measured(self.blocks(name))
        for rows, block in self.blocks(name):
            wide = block if target is None else block.to(torch.promote_types(block.dtype, target))
            new = edit(wide, rows) if edit else wide
            yield as_bytes(new if target is None else _narrowed(new, target, name))

    def blocks(self, name: str, most: int | None = None) -> Iterator[tuple[slice, Tensor]]:
        """A tensor as it is before it is edited, some rows at a time: all of them, or those of `edits.blocks`."""
        if name not in self.rounded:
            return read_blocks(self.source(name), most)
        whole = self.rounded[name](torch.cat([block for _, block in read_blocks(self.source(name))]).float())
        rows, columns = whole.shape
        return ((part, whole[part]) for part in blocks(rows, columns, most))

    def _say_what_changed(self, out: Path) -> None:
        """In config.json and in the index; both stay as they are where nothing did."""
        config = read_json(out / CONFIG, "Copy the base anew")
        said: dict[str, Any] = {"tie_word_embeddings": False} if self.unties else {}
        if self.dtype:
            key = "torch_dtype" if "torch_dtype" in config else "dtype"
            said[key] = str(DTYPES[self.dtype]).removeprefix("torch.")
        if said:
            write_json(out / CONFIG, {**config, **said})
        if (out / INDEX).exists() and (self.added or self.dtype):
            index = read_json(out / INDEX, "Copy the base anew")
            index["weight_map"] |= {name: self.source(name).file.name for name in self.added}
            if "total_size" in index.get("metadata", {}):
                index["metadata"]["total_size"] = self.size
            write_json(out / INDEX, index)


def carry_over(base: Path, out: Path) -> None:
    """Tokenizer, templates, code, licence, index: every file beside the weights, in folders too, but hidden ones and
    records of the base's making."""
    for path in sorted(base.rglob("*")):
        name = path.relative_to(base)
        weights = any(path.match(pattern) for pattern in WEIGHTS)
        hidden = any(part.startswith(".") for part in name.parts)
        if path.is_file() and not weights and not hidden and str(name) not in RECORDS:
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, out / name)


def read_blocks(place: Place, most: int | None = None) -> Iterator[tuple[slice, Tensor]]:
    """A stored tensor, as a matrix of its first dimension by the others, some rows at a time, as `edits.blocks`."""
    info = place.info
    if info.dtype not in DTYPES:
        raise UserError(f"{place.file}: a tensor of {info.dtype} cannot be merged into. Give the 16-bit model.")
    rows = info.shape[0] if info.shape else 1
    columns = prod(info.shape[1:])
    width = (info.stop - info.start) // max(1, rows)  # bytes
    with place.file.open("rb", buffering=0) as file:
        for part in blocks(rows, columns, most):
            block = torch.empty((part.stop - part.start) * width, dtype=torch.uint8)
            _read_into(file.fileno(), block.numpy().data, info.start + part.start * width, place.file)
            yield part, block.view(DTYPES[info.dtype]).view(-1, columns)


def _narrowed(values: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    found = values.to(dtype)
    if dtype == torch.float16 and not found.isfinite().all():
        raise UserError(f"{name} holds {float(values.abs().max()):.3g}, more than fp16 can. Write it in bf16.")
    return found


def read_rows(place: Place, ids: Iterable[int]) -> Tensor:
    """Some rows (n, m) of a stored matrix."""
    info, (_, columns) = place.info, place.info.shape
    rows = torch.empty(len(ids := list(ids)), columns, dtype=DTYPES[info.dtype])
    width = columns * rows.itemsize
    with place.file.open("rb", buffering=0) as file:
        for row, number in zip(rows.view(torch.uint8), ids, strict=True):
            _read_into(file.fileno(), row.numpy().data, info.start + number * width, place.file)
    return rows


def _read_into(descriptor: int, view: memoryview, start: int, file: Path) -> None:
    while view:
        count = os.preadv(descriptor, [view], start)
        if not count:
            raise UserError(f"{file} became shorter while it was read. Make it again or copy it anew.")
        view, start = view[count:], start + count


def as_bytes(tensor: Tensor) -> Bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data


class UpdateRatio(NamedTuple):
    """⟨W' − W, Δ⟩ / ⟨Δ, Δ⟩ for the update Δ, LoRA's s·BA: 1 if merged once, 0 if lost, 2 if twice; None where Δ is 0.

    `rounding`: how far from 1 rounding W' to its precision can bring it.
    """

    value: float | None
    rounding: float


@torch.no_grad()
def ratios(merge: Merge, out: Path) -> dict[str, UpdateRatio]:
    """Of every matrix that LoRA or DoRA changed, measured on the file that was written, by the module's stored name.

    What goes wrong with a merge goes wrong with a matrix, not with a row: of a large one `SAMPLES` blocks of rows or
    more are read again, spread over it. All of them would take as long as the merge itself.
    """
    written = places(out)
    edits = {name: edit for name, edit in merge.edits.items() if isinstance(edit, Update)}

    def ratio_of(name: str) -> UpdateRatio:
        return _ratio(merge.blocks(name, SAMPLES), written[name], edits[name].measured(merge.blocks(name)))

    found = side_by_side(ratio_of, edits)
    return {name.removesuffix(".weight"): ratio for name, ratio in zip(edits, found, strict=True)}


def side_by_side(work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Results in order, each item in a thread of its own."""
    with one_thread() as threads, ThreadPoolExecutor(threads) as pool:
        yield from pool.map(work, items)


@contextmanager
def one_thread() -> Iterator[int]:
    """One thread of torch's, where what it works on is too small to be shared; gives the number that there were."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield before
    finally:
        torch.set_num_threads(before)


def _ratio(before: Iterator[tuple[slice, Tensor]], after: Place, update: Update) -> UpdateRatio:
    along = weight = size = 0.0
    for (rows, old), (_, new) in zip(before, read_blocks(after, SAMPLES), strict=True):
        here, own = update.against(old.float(), new.float(), rows)
        along, size = along + here, size + own
        weight += float(torch.linalg.vector_norm(old, dtype=torch.float32)) ** 2
    eps = torch.finfo(DTYPES[after.info.dtype]).eps
    return UpdateRatio(along / size if size else None, eps * (weight / max(size, 1e-60)) ** 0.5)
