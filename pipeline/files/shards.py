"""Rewrites safetensors files tensor by tensor; unchanged tensors are copied by the kernel without reading them."""

import json
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from math import prod
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.files.base_model import weight_files
from pipeline.files.safetensors_header import BYTES, TensorInfo, read_header

PIECE = 8 * 2**20  # bytes per read, if the kernel cannot copy between the files

Bytes = bytes | bytearray | memoryview
Content = Callable[[], Iterable[Bytes]]  # a tensor's bytes, piece by piece


@dataclass(frozen=True)
class TensorLocation:
    """The file that holds a tensor, and its dtype, shape and byte range there."""

    file: Path
    info: TensorInfo


@dataclass(frozen=True)
class NewTensor:
    """A tensor to write; without `content` it is copied from the source file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    content: Content | None = None

    @property
    def size(self) -> int:
        """In bytes."""
        return prod(self.shape) * BYTES[self.dtype]


def tensor_locations(folder: Path) -> dict[str, TensorLocation]:
    """Every tensor of the checkpoint in `folder`, by name. Raises UserError as `weight_files` and `read_header` do."""
    locations: dict[str, TensorLocation] = {}
    for file in weight_files(folder):
        for name, info in read_header(file).items():
            if name in locations:
                raise UserError(
                    f"{folder}: {name} is in {locations[name].file.name} and in {file.name}. Copy it again."
                )
            locations[name] = TensorLocation(file, info)
    return locations


def rewrite(source: Path, target: Path, tensors: Sequence[NewTensor]) -> Iterator[Callable[[], None]]:
    """Create `target` with the header of `tensors`, in this order; yields functions that each write a part of it.

    They may run in any order or in parallel. Tensors without content are copied from `source`.
    """
    infos, metadata, raw = _header(source)
    is_unchanged = [(t.name, t.dtype, t.shape) for t in tensors] == [(n, i.dtype, i.shape) for n, i in infos.items()]
    header = raw if is_unchanged else _build_header(tensors, metadata)
    offset = len(header)
    with target.open("wb", buffering=0) as file:
        _write(file.fileno(), header, 0)
        os.ftruncate(file.fileno(), offset + sum(tensor.size for tensor in tensors))
    for is_copy, group in groupby(tensors, key=lambda tensor: tensor.content is None):
        if is_copy:
            for start, stop in _merge_ranges(infos[tensor.name] for tensor in group):
                yield partial(_copy, source, target, start, offset, stop - start)
                offset += stop - start
            continue
        for tensor in group:
            assert tensor.content is not None
            yield partial(_fill, target, offset, tensor.content)
            offset += tensor.size


def _fill(target: Path, offset: int, content: Content) -> None:
    with target.open("rb+", buffering=0) as file:
        for piece in content():
            offset = _write(file.fileno(), piece, offset)


def _copy(source: Path, target: Path, start: int, offset: int, count: int) -> None:
    with source.open("rb") as reader, target.open("rb+", buffering=0) as writer:
        while count:
            copied = 0
            with suppress(OSError, AttributeError):  # not between all file systems, and not on macOS
                copied = os.copy_file_range(reader.fileno(), writer.fileno(), count, start, offset)
            if not copied:
                piece = os.pread(reader.fileno(), min(PIECE, count), start)
                if not piece:
                    raise UserError("A file of the base was truncated while it was read. Create or copy it again.")
                copied = _write(writer.fileno(), piece, offset) - offset
            start, offset, count = start + copied, offset + copied, count - copied


def _write(target: int, data: Bytes, offset: int) -> int:
    """Write `data` at `offset`; returns the offset after it."""
    view = memoryview(data)
    while view:
        count = os.pwrite(target, view, offset)
        view, offset = view[count:], offset + count
    return offset


def in_file_order(file: Path) -> dict[str, TensorInfo]:
    """Name → info of the tensors of a file, ordered by offset."""
    return _header(file)[0]


def _header(file: Path) -> tuple[dict[str, TensorInfo], dict[str, Any] | None, bytes]:
    infos = dict(sorted(read_header(file).items(), key=lambda item: (item[1].start, item[1].stop)))
    with file.open("rb") as reader:
        head = reader.read(8)
        raw = head + reader.read(struct.unpack("<Q", head)[0])
    return infos, json.loads(raw[8:]).get("__metadata__"), raw


def _build_header(tensors: Sequence[NewTensor], metadata: Mapping[str, Any] | None) -> bytes:
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    start = 0
    for tensor in tensors:
        stop = start + tensor.size
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _merge_ranges(infos: Iterable[TensorInfo]) -> Iterator[tuple[int, int]]:
    """Byte ranges of the tensors, adjacent ones merged."""
    current: tuple[int, int] | None = None
    for info in infos:
        if current and current[1] == info.start:
            current = current[0], info.stop
        else:
            if current:
                yield current
            current = info.start, info.stop
    if current:
        yield current
