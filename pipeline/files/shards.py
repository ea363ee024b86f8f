"""A checkpoint's safetensors rewritten tensor by tensor: what is not changed is copied by the system, unread."""

import json
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from math import prod
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.files.base_model import weight_files
from pipeline.files.safetensors_header import BYTES, TensorInfo, read_header

PIECE = 8 * 2**20  # bytes, where the system cannot copy by itself

Bytes = bytes | bytearray | memoryview
Content = Callable[[], Iterable[Bytes]]  # what a tensor is to hold, piece by piece


@dataclass(frozen=True)
class TensorLocation:
    """Where a tensor of a checkpoint is."""

    file: Path
    info: TensorInfo


@dataclass(frozen=True)
class NewTensor:
    """A tensor as it is to be written; without `content` it is copied."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    content: Content | None = None

    @property
    def size(self) -> int:
        """In bytes."""
        return prod(self.shape) * BYTES[self.dtype]


def tensor_locations(folder: Path) -> dict[str, TensorLocation]:
    """Every tensor of the checkpoint in `folder`, by name. Raises UserError as `weight_files` and `read_header`."""
    found: dict[str, TensorLocation] = {}
    for file in weight_files(folder):
        for name, info in read_header(file).items():
            if name in found:
                raise UserError(f"{folder}: {name} is in {found[name].file.name} and in {file.name}. Copy it anew.")
            found[name] = TensorLocation(file, info)
    return found


def rewrite(source: Path, target: Path, tensors: Sequence[NewTensor]) -> Iterator[Callable[[], None]]:
    """Begin `target`, which is to hold `tensors` in this order; what fills it, in whatever order or side by side.

    Tensors without content are copied from `source`.
    """
    infos, metadata, raw = _header(source)
    same = [(t.name, t.dtype, t.shape) for t in tensors] == [(n, i.dtype, i.shape) for n, i in infos.items()]
    header = raw if same else _composed(tensors, metadata)
    at = len(header)
    with target.open("wb", buffering=0) as file:
        _write(file.fileno(), header, 0)
        os.ftruncate(file.fileno(), at + sum(tensor.size for tensor in tensors))
    for copied, group in groupby(tensors, key=lambda tensor: tensor.content is None):
        if copied:
            for start, stop in _runs(infos[tensor.name] for tensor in group):
                yield partial(_copy_run, source, target, start, at, stop - start)
                at += stop - start
            continue
        for tensor in group:
            assert tensor.content is not None
            yield partial(_fill, target, at, tensor.content)
            at += tensor.size


def _fill(target: Path, at: int, content: Content) -> None:
    with target.open("rb+", buffering=0) as file:
        for piece in content():
            at = _write(file.fileno(), piece, at)


def _copy_run(source: Path, target: Path, start: int, at: int, count: int) -> None:
    with source.open("rb") as reader, target.open("rb+", buffering=0) as writer:
        _copy(reader.fileno(), writer.fileno(), start, at, count)


def in_file_order(file: Path) -> dict[str, TensorInfo]:
    """The tensors of a file as they lie in it."""
    return _header(file)[0]


def _header(file: Path) -> tuple[dict[str, TensorInfo], dict[str, Any] | None, bytes]:
    infos = dict(sorted(read_header(file).items(), key=lambda item: (item[1].start, item[1].stop)))
    with file.open("rb") as reader:
        head = reader.read(8)
        raw = head + reader.read(struct.unpack("<Q", head)[0])
    return infos, json.loads(raw[8:]).get("__metadata__"), raw


def _composed(tensors: Sequence[NewTensor], metadata: Mapping[str, Any] | None) -> bytes:
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    start = 0
    for tensor in tensors:
        stop = start + tensor.size
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _runs(infos: Iterable[TensorInfo]) -> Iterator[tuple[int, int]]:
    """Neighbours as one range."""
    run: tuple[int, int] | None = None
    for info in infos:
        if run and run[1] == info.start:
            run = run[0], info.stop
        else:
            if run:
                yield run
            run = info.start, info.stop
    if run:
        yield run


def _copy(source: int, target: int, start: int, at: int, count: int) -> None:
    done = 0
    while done < count:
        step = _copied_by_system(source, target, start + done, at + done, count - done)
        if not step:
            piece = os.pread(source, min(PIECE, count - done), start + done)
            if not piece:
                raise UserError("A file of the base became shorter while it was read. Make it again or copy it anew.")
            step = _write(target, piece, at + done) - at - done
        done += step


def _write(target: int, data: Bytes, at: int) -> int:
    """Where the next piece goes."""
    view = memoryview(data)
    while view:
        count = os.pwrite(target, view, at)
        view, at = view[count:], at + count
    return at


def _copied_by_system(source: int, target: int, start: int, at: int, count: int) -> int:
    """Bytes that were copied; 0 where the system or the file system cannot."""
    if not hasattr(os, "copy_file_range"):
        return 0
    try:
        return os.copy_file_range(source, target, count, offset_src=start, offset_dst=at)
    except OSError:
        return 0
