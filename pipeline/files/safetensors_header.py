"""Safetensors headers and fingerprints, and OS errors from writing such files.

Headers are read by hand: the library's reader tells no byte offsets, which copying and hashing tensors need, and its
errors name no file.
"""

import hashlib
import json
import os
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path

from pipeline.errors import UserError

BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
OS_ERROR = re.compile(r"\(os error (\d+)\)")  # the end of an OS error's message in Rust
# An entry takes 60 to 200 bytes, and published files have up to about 100,000 tensors. The format allows headers five
# times as large, and parsing those takes more than a GB of memory.
MAX_HEADER = 20_000_000  # bytes


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


@contextmanager
def as_os_error(path: Path) -> Iterator[None]:
    """Turns a Rust library's own error for a failed write, such as a full disk, into an OSError about `path`."""
    try:
        yield
    except Exception as error:
        match = OS_ERROR.search(str(error))
        if isinstance(error, OSError) or match is None:
            raise
        number = int(match[1])
        raise OSError(number, os.strerror(number), str(path)) from None


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Name → TensorInfo, sorted by name. Raises UserError if the file is missing, truncated or malformed."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = struct.unpack("<Q", file.read(8))[0] if size >= 8 else 0
            if MAX_HEADER < length <= size - 8:
                raise UserError(
                    f"{path}: its header must have at most {MAX_HEADER:,} bytes, got {length:,}: no model has so many "
                    "tensors. Copy it again, or choose another model."
                )
            if not 2 <= length <= size - 8:
                raise _damaged(path, f"its header of {length} bytes does not fit in {size} bytes")
            header = json.loads(file.read(length))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}.") from None
    except (ValueError, RecursionError):
        raise _damaged(path, "its header is not JSON") from None
    if not isinstance(header, dict):
        raise _damaged(path, "its header is not a JSON object")
    header.pop("__metadata__", None)
    infos: dict[str, TensorInfo] = {}
    expected = base = 8 + length  # offsets in the header count from its end
    for name, entry in sorted(header.items()):
        try:
            dtype, shape = str(entry["dtype"]), tuple(int(n) for n in entry["shape"])
            start, stop = (base + int(offset) for offset in entry["data_offsets"])
        except (KeyError, OverflowError, TypeError, ValueError):
            raise _damaged(path, f"{name} has no valid dtype, shape and offsets") from None
        if min(shape, default=0) < 0:
            raise _damaged(path, f"{name} has shape {shape}")
        if dtype not in BYTES:
            raise UserError(f"{path}: {name} has dtype {dtype}, which is not supported. Use the 16-bit model.")
        if stop - start != prod(shape) * BYTES[dtype] or start < base:
            raise _damaged(path, f"{name} of shape {shape} does not have {stop - start} bytes")
        infos[name] = TensorInfo(dtype, shape, start, stop)
        expected = max(expected, stop)
    # A truncated download still has its whole header: only the file's size tells.
    if expected != size:
        raise _damaged(path, f"the header describes {expected} bytes, the file has {size}")
    return infos


def _damaged(path: Path, reason: str) -> UserError:
    return UserError(f"{path} is damaged or truncated: {reason}. Create or copy it again.")


def shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Name → shape."""
    return {name: info.shape for name, info in read_header(path).items()}


def fingerprint(paths: Sequence[Path]) -> str:
    """sha256 over every tensor's name, dtype, shape and bytes, sorted by name.

    Independent of how the tensors are split into files, their order, padding and metadata.
    """
    entries = sorted((name, path, info) for path in paths for name, info in read_header(path).items())
    digest = hashlib.sha256()
    with ExitStack() as stack:
        files = {path: stack.enter_context(path.open("rb")) for path in paths}
        for name, path, info in entries:
            digest.update(f"{name} {info.dtype} {list(info.shape)}\n".encode())
            files[path].seek(info.start)
            remaining = info.stop - info.start
            while remaining:
                block = files[path].read(min(remaining, 1 << 20))
                digest.update(block)
                remaining -= len(block)
    return digest.hexdigest()


def refuse_difference(
    expected: Mapping[str, tuple[int, ...]], actual: Mapping[str, tuple[int, ...]], source: str
) -> None:
    """Raises UserError unless `actual` has exactly the expected names and shapes."""
    missing, extra = sorted(expected.keys() - actual.keys()), sorted(actual.keys() - expected.keys())
    wrong = sorted(name for name in expected.keys() & actual.keys() if expected[name] != actual[name])
    reasons = [
        *([f"missing {_summarize(missing)}"] if missing else []),
        *([f"not expected {_summarize(extra)}"] if extra else []),
        *(f"{n} has shape {list(actual[n])}, expected {list(expected[n])}" for n in wrong[:1]),
    ]
    if reasons:
        raise UserError(f"{source} does not fit: {'; '.join(reasons)}.")


def _summarize(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
