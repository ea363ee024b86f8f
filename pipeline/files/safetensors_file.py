"""Safetensors files: their headers and fingerprints, and rewriting them tensor by tensor.

Headers are read by hand: the library's reader tells no byte offsets, which copying and hashing
tensors need, and its errors name no file.
"""

import ctypes
import hashlib
import json
import os
import re
import struct
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from math import prod
from pathlib import Path
from typing import Any

from pipeline.errors import UserError

BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}
OS_ERROR = re.compile(r"\(os error (\d+)\)")  # the end of an OS error's message in Rust
# An entry takes 60 to 200 bytes, and published files have up to about 100,000 tensors. The format
# allows headers five times as large, and parsing those takes more than a GB of memory.
MAX_HEADER = 20_000_000  # bytes
MAX_DIMENSIONS = 64  # PyTorch's; the product of a million sizes takes hours
PIECE = 8 * 2**20  # bytes per read, if the kernel cannot copy between the files

Bytes = bytes | bytearray | memoryview
Content = Callable[[], Iterable[Bytes]]  # a tensor's bytes, piece by piece


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a safetensors file; `start` and `stop` are byte offsets in that file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def size(self) -> int:
        """In bytes."""
        return self.stop - self.start


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


@contextmanager
def as_os_error(path: Path) -> Iterator[None]:
    """Turns a Rust library's error for a failed write into an OSError about `path`."""
    try:
        yield
    except Exception as error:
        match = OS_ERROR.search(str(error))
        if isinstance(error, OSError) or match is None:
            raise
        number = int(match[1])
        raise OSError(number, os.strerror(number), str(path)) from None


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Name → TensorInfo, sorted by name. Raises UserError for a damaged or missing file."""
    return _read_header(path)[0]


def in_file_order(file: Path) -> dict[str, TensorInfo]:
    """Name → TensorInfo, sorted by offset. Raises UserError as `read_header` does."""
    return dict(sorted(read_header(file).items(), key=_offsets))


def _offsets(item: tuple[str, TensorInfo]) -> tuple[int, int]:
    return item[1].start, item[1].stop


def _read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, Any] | None, bytes]:
    """`read_header`, the metadata, and the header's bytes with the length before them."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            raw = file.read(8)
            length = struct.unpack("<Q", raw)[0] if size >= 8 else 0
            if MAX_HEADER < length <= size - 8:
                raise UserError(
                    f"{path}: its header must have at most {MAX_HEADER:,} bytes, got {length:,}: "
                    "no model has so many tensors. Copy it again, or choose another model."
                )
            if not 2 <= length <= size - 8:
                raise _damaged(path, f"its header of {length} bytes does not fit in {size} bytes")
            raw += file.read(length)
            # decoded first: from bytes, `json` would also take half of a surrogate pair
            header = json.loads(raw[8:].decode())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}.") from None
    except (ValueError, RecursionError):
        raise _damaged(path, "its header is not JSON") from None
    if not isinstance(header, dict):
        raise _damaged(path, "its header is not a JSON object")
    metadata = header.pop("__metadata__", None)
    infos: dict[str, TensorInfo] = {}
    expected = base = 8 + length  # offsets in the header count from its end
    described = 0  # bytes
    for name, entry in sorted(header.items()):
        try:
            dtype, shape = str(entry["dtype"]), tuple(int(n) for n in entry["shape"])
            start, stop = (base + int(offset) for offset in entry["data_offsets"])
            name.encode()  # an escaped surrogate without its pair is no character
            # offsets are 64-bit numbers; no message can hold those of thousands of digits
            if len(shape) > MAX_DIMENSIONS or abs(start) + abs(stop) >= 2**64:
                raise ValueError
        except (KeyError, OverflowError, TypeError, ValueError):
            raise _damaged(
                path, f"{name[:200]!r} has no valid name, dtype, shape and offsets"
            ) from None
        if min(shape, default=0) < 0:
            raise _damaged(path, f"{name} has shape {shape}")
        if dtype not in BYTES:
            raise UserError(
                f"{path}: {name} has dtype {dtype}, which is not supported. Use the 16-bit model."
            )
        if stop - start != prod(shape) * BYTES[dtype] or start < base:
            raise _damaged(path, f"{name} of shape {shape} does not have {stop - start} bytes")
        infos[name] = TensorInfo(dtype, shape, start, stop)
        expected = max(expected, stop)
        described += stop - start
    # A truncated download still has its whole header: only the file's size tells.
    if expected != size:
        raise _damaged(path, f"the header describes {expected} bytes, the file has {size}")
    if described > size:  # else a small file could stand for any amount of work
        raise _damaged(path, "its tensors overlap")
    return infos, metadata, raw


def _damaged(path: Path, reason: str) -> UserError:
    return UserError(f"{path} is damaged or truncated: {reason}. Create or copy it again.")


def shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Name → shape."""
    return {name: info.shape for name, info in read_header(path).items()}


def fingerprint(paths: Sequence[Path]) -> str:
    """sha256 over every tensor's name, dtype, shape and bytes, sorted by name.

    Independent of how the tensors are split into files, their order, padding and metadata.
    """
    entries = sorted(
        (name, path, info) for path in paths for name, info in read_header(path).items()
    )
    digest = hashlib.sha256()
    with ExitStack() as stack:
        files = {path: stack.enter_context(path.open("rb")) for path in paths}
        for name, path, info in entries:
            digest.update(f"{name} {info.dtype} {list(info.shape)}\n".encode())
            files[path].seek(info.start)
            remaining = info.stop - info.start
            while remaining:
                block = files[path].read(min(remaining, 1 << 20))
                if not block:
                    raise UserError(
                        f"{path} was truncated while it was read. Create or copy it again."
                    )
                digest.update(block)
                remaining -= len(block)
    return digest.hexdigest()


def refuse_difference(
    expected: Mapping[str, tuple[int, ...]], actual: Mapping[str, tuple[int, ...]], source: str
) -> None:
    """Raises UserError unless `actual` has exactly the expected names and shapes."""
    missing = sorted(expected.keys() - actual.keys())
    extra = sorted(actual.keys() - expected.keys())
    wrong = sorted(
        name for name in expected.keys() & actual.keys() if expected[name] != actual[name]
    )
    reasons = [
        *([f"missing {_summarize(missing)}"] if missing else []),
        *([f"not expected {_summarize(extra)}"] if extra else []),
        *(f"{n} has shape {list(actual[n])}, expected {list(expected[n])}" for n in wrong[:1]),
    ]
    if reasons:
        raise UserError(f"{source} does not fit: {'; '.join(reasons)}.")


def _summarize(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def rewrite(
    source: Path, target: Path, tensors: Sequence[NewTensor]
) -> Iterator[Callable[[], None]]:
    """Create `target` with `tensors` in this order, by functions that each write a part.

    They may run in any order or in parallel. Tensors without content are copied from `source`.
    """
    infos, metadata, raw = _read_header(source)
    unchanged = [
        (name, info.dtype, info.shape) for name, info in sorted(infos.items(), key=_offsets)
    ]
    # Then the source's header is copied byte for byte: its padding may differ from ours.
    is_unchanged = [(t.name, t.dtype, t.shape) for t in tensors] == unchanged
    header = raw if is_unchanged else _build_header(tensors, metadata)
    offset = len(header)
    with target.open("wb", buffering=0) as file:
        write_at(file.fileno(), header, 0)
        # At its full size from the start, so that its parts can be written at their offsets in any
        # order.
        size = offset + sum(tensor.size for tensor in tensors)
        allocate(file.fileno(), size)
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


def allocate(target: int, size: int) -> None:
    """Give an open file its size, all zeros, and its blocks where possible.

    Writing into them takes 0.6 × the CPU time. Not by `os.posix_fallocate`, which writes to every
    block where the file system cannot.
    """
    fallocate = getattr(ctypes.CDLL(None), "fallocate", None) if sys.platform == "linux" else None
    if fallocate is not None:
        # a full disk is reported by the writes
        fallocate(target, 0, ctypes.c_int64(0), ctypes.c_int64(size))
    os.ftruncate(target, size)


def _fill(target: Path, offset: int, content: Content) -> None:
    with target.open("rb+", buffering=0) as file:
        for piece in content():
            offset = write_at(file.fileno(), piece, offset)


def _copy(source: Path, target: Path, start: int, offset: int, count: int) -> None:
    with source.open("rb") as reader, target.open("rb+", buffering=0) as writer:
        while count:
            copied = 0
            # not between all file systems, and not on macOS
            with suppress(OSError, AttributeError):
                copied = os.copy_file_range(reader.fileno(), writer.fileno(), count, start, offset)
            if not copied:
                piece = os.pread(reader.fileno(), min(PIECE, count), start)
                if not piece:
                    raise UserError(
                        "A file of the base was truncated while it was read. Create or copy it "
                        "again."
                    )
                copied = write_at(writer.fileno(), piece, offset) - offset
            start, offset, count = start + copied, offset + copied, count - copied


def write_at(target: int, data: Bytes, offset: int) -> int:
    """Write `data` at `offset`; returns the offset after it."""
    view = memoryview(data)
    while view:
        count = os.pwrite(target, view, offset)
        view, offset = view[count:], offset + count
    return offset


def _build_header(tensors: Sequence[NewTensor], metadata: Mapping[str, Any] | None) -> bytes:
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    start = 0
    for tensor in tensors:
        stop = start + tensor.size
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [start, stop],
        }
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
