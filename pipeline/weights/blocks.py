"""Stored tensors of a checkpoint: found by a parameter's name, read a block of rows at a time."""

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from io import FileIO
from math import prod
from typing import TypeVar

import torch
from torch import Tensor

from pipeline.errors import UserError
from pipeline.files.base_model import TensorLocation
from pipeline.models.base import CausalLM

Item = TypeVar("Item")
Result = TypeVar("Result")
BLOCK = 2**18  # values of W in memory as fp32 at once: fits in a core's cache
# what files of Mixtral, and of a model that also reads pictures, call a part of transformers' names
ALIASES = ((".mlp.", ".block_sparse_moe."), ("model.", "model.language_model."))
Rows = tuple[slice, Tensor]
Read = Callable[[], Iterator[Rows]]  # each call reads a matrix once, first row to last
DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def tied_names(model: CausalLM) -> tuple[str, ...]:
    """Full names of the weights of embedding and head if they are tied, else ()."""
    if not model.shape.tied:
        return ()
    return f"{model.embedding_name}.weight", f"{model.head_name}.weight"


def stored_name(name: str, stored: Collection[str], tied: Collection[str] = ()) -> str | None:
    """The name of a parameter in the files, with or without the prefix of the model's body.

    None if it is missing. Of the parameters `tied`, one may be stored for both.
    """
    for parameter in (name, *tied) if name in tied else (name,):
        spellings = (parameter, *(parameter.replace(*alias) for alias in ALIASES))
        candidates = [spelling for spelling in spellings if spelling in stored][:1] or [
            other
            for other in stored
            if any(s.endswith(f".{other}") or other.endswith(f".{s}") for s in spellings)
        ]
        if len(candidates) == 1:  # of several none is sure, as two stacks of blocks may end alike
            return candidates[0]
    return None


def find_location(
    name: str, stored: Mapping[str, TensorLocation], tied: Collection[str] = ()
) -> TensorLocation | None:
    """Where the files store a parameter, as `stored_name` finds it."""
    stored_as = stored_name(name, stored, tied)
    return stored[stored_as] if stored_as else None


def blocks(rows: int, columns: int, samples: int | None = None) -> Iterator[slice]:
    """Slices of rows that cover a matrix; with `samples`, only some of them, evenly spread.

    These are `samples` to 2·`samples`, or all if there are fewer.
    """
    size = max(1, BLOCK // max(1, columns))
    count = -(-rows // size)  # rounded up
    step = max(1, count // samples) if samples else 1
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size * step))


def read_blocks(location: TensorLocation, samples: int | None = None) -> Iterator[Rows]:
    """A stored tensor as a matrix (first dimension, all others), a block of rows at a time.

    `samples` as in `blocks`. Raises UserError.
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
            start = info.start + span.start * width
            _read_into(file, block.numpy().data, start)
            yield span, block.view(DTYPES[info.dtype]).view(-1, columns)


def read_matrix(parts: Iterable[Rows]) -> Tensor:
    """All rows of a matrix that is read in blocks."""
    return torch.cat([block for _, block in parts])


def read_rows(location: TensorLocation, ids: Sequence[int]) -> Tensor:
    """Some rows (n, m) of a stored matrix."""
    info, (_, columns) = location.info, location.info.shape
    rows = torch.empty(len(ids), columns, dtype=DTYPES[info.dtype])
    width = columns * rows.itemsize
    with location.file.open("rb", buffering=0) as file:
        for row, number in zip(rows.view(torch.uint8), ids, strict=True):
            _read_into(file, row.numpy().data, info.start + number * width)
    return rows


def _read_into(file: FileIO, view: memoryview, start: int) -> None:
    while view:
        count = os.preadv(file.fileno(), [view], start)
        if not count:
            raise UserError(
                f"{file.name} was truncated while it was read. Create or copy it again."
            )
        view, start = view[count:], start + count


def map_in_threads(work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Results in order, computed in a pool of as many threads as torch has."""
    with single_torch_thread() as threads, ThreadPoolExecutor(threads) as pool:
        yield from pool.map(work, items)


@contextmanager
def single_torch_thread() -> Iterator[int]:
    """Limit torch to one thread, as tensors here are too small to split; yields the old number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield before
    finally:
        torch.set_num_threads(before)
