"""Reads the tensors of a file of torch.save without running any code from it.

Such a file is a zip archive: data.pkl, a pickle that says which tensor is which part of which file
beside it. A pickle is a program, and `pickle` runs it: its opcodes can call any function.
`torch.load(weights_only=True)` calls a list of them, has had holes, and allocates what the file
says. Here the opcodes are only parsed, by `pickletools`, and a small machine below interprets those
that a dictionary of tensors needs. It calls nothing; names of functions are compared.
"""

import io
import pickletools
import struct
import zipfile
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline.errors import UserError

# Limits of the pickle, in bytes and instructions. The largest adapters have 40,000 tensors, each of
# 200 bytes and 40 instructions; more would take seconds.
MAX_PICKLE, MAX_OPCODES = 10_000_000, 3_000_000
# bytes of the archive's list of files; `zipfile` takes ten times as much memory
MAX_DIRECTORY = 20_000_000
MAX_DIMENSIONS = 8
# Tensors may have this many times the bytes of the file: two may share a storage, as embedding and
# head do.
SHARED = 2
DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
}


class Name(str):
    """A function or class that the pickle names, such as torch._utils._rebuild_tensor_v2.

    It is never looked up.
    """


class Storage(NamedTuple):
    key: str
    dtype: torch.dtype
    length: int


class View(NamedTuple):
    """A tensor: a part of a storage."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class _Refused(Exception):
    """Why the file is not read."""


def load(path: Path) -> dict[str, Tensor]:
    """Name → tensor, in a dictionary or in one inside it, as {"model": …}. Raises UserError."""
    try:
        _refuse_large_directory(path)
        with zipfile.ZipFile(path) as archive:
            return dict(_tensors(archive, path.stat().st_size))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}.") from None
    except zipfile.BadZipFile:
        reason = "it is not a zip archive as torch has written since version 1.6, or it is damaged"
    except _Refused as error:
        reason = str(error)
    # what a damaged or malicious file leads to in zipfile, pickletools and below
    except (
        LookupError,
        TypeError,
        ValueError,
        AttributeError,
        OverflowError,
        EOFError,
        RuntimeError,
        struct.error,
    ):
        reason = "its contents are damaged"
    raise UserError(
        f"{path} cannot be read without running code from it: {reason}. If you trust it, load it "
        "with torch and save the tensors with safetensors."
    ) from None


def _refuse_large_directory(path: Path) -> None:
    """Raises _Refused for a list of files, at the archive's end, that `zipfile` should not read."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 98))
        tail = file.read()
    end, locator, end64 = tail[-22:], tail[-42:-22], tail[-98:-42]
    if not end.startswith(b"PK\5\6"):
        raise zipfile.BadZipFile  # or it has a comment; torch writes none
    (size,) = struct.unpack("<I", end[12:16])
    # a large archive has a second record, whose size counts
    if locator.startswith(b"PK\6\7") and len(end64) == 56:
        size = max(size if size < 2**32 - 1 else 0, *struct.unpack("<Q", end64[40:48]))
    if size > MAX_DIRECTORY:
        raise _Refused(f"its list of files has {size:,} bytes")


def _tensors(archive: zipfile.ZipFile, size: int) -> Iterator[tuple[str, Tensor]]:
    entries = {entry.filename: entry for entry in archive.infolist()}
    (pickle,) = [
        name for name in entries if name.endswith("/data.pkl") and name.count("/") == 1
    ] or [""]
    if not pickle:
        raise _Refused("it has no data.pkl")
    folder = pickle.removesuffix("data.pkl")

    def read(name: str, most: int) -> bytes:
        entry = entries[name]
        if entry.compress_type != zipfile.ZIP_STORED:  # torch compresses nothing, a zip bomb does
            raise _Refused(f"{name[:80]!r} is compressed")
        if entry.file_size > min(most, size):
            raise _Refused(f"{name[:80]!r} has {entry.file_size:,} bytes")
        return archive.read(entry)

    if f"{folder}byteorder" in entries and read(f"{folder}byteorder", 10) != b"little":
        raise _Refused("its byte order is not little")
    views = dict(_flat(_interpreted(read(pickle, MAX_PICKLE))))
    total = sum(prod(view.size) * view.storage.dtype.itemsize for view in views.values())
    if total > SHARED * size:
        raise _Refused(f"its tensors are larger than the file's {size:,} bytes")
    keys = {view.storage.key for view in views.values()}
    if sum(entries[f"{folder}data/{key}"].file_size for key in keys) > size:  # entries may overlap
        raise _Refused("its storages overlap")
    storages = {key: bytearray(read(f"{folder}data/{key}", size)) for key in keys}
    for name, (storage, offset, shape, stride) in views.items():
        raw = storages[storage.key]
        last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
        empty = 0 in shape
        if min((offset, *shape, *stride)) < 0 or (not empty and last >= storage.length):
            raise _Refused(f"{name[:80]!r} lies outside its storage")
        if len(raw) != storage.length * storage.dtype.itemsize:
            raise _Refused(f"{name[:80]!r} has a storage of another size than its file")
        tensor = torch.empty(shape, dtype=storage.dtype)
        if not empty:
            numbers = torch.frombuffer(raw, dtype=storage.dtype)
            tensor = numbers.as_strided(shape, stride, offset).clone()
        yield name, tensor


def _flat(value: Any) -> Iterator[tuple[str, View]]:
    """Name → tensor of a dictionary, or of the only dictionaries in it."""
    if not isinstance(value, dict):
        raise _Refused("it holds no dictionary of tensors")
    inside = [entry for entry in value.values() if isinstance(entry, dict) and entry]
    entries = inside[0] if len(inside) == len(value) == 1 else value
    for name, entry in entries.items():
        if not isinstance(name, str) or not isinstance(entry, View):
            raise _Refused(f"its entry {str(name)[:80]!r} is not a tensor")
        yield name, entry


def _interpreted(pickle: bytes) -> Any:
    """The value that a pickle describes: a structure of texts, numbers and tensors."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def to_mark() -> list[Any]:
        start = marks.pop()
        items = stack[start:]
        del stack[start:]
        return items

    def last(count: int) -> tuple[Any, ...]:
        if count > len(stack):
            raise _Refused("its contents are damaged")
        items = tuple(stack[len(stack) - count :])
        del stack[len(stack) - count :]
        return items

    def set_items(items: list[Any]) -> None:
        target = stack[-1]
        if not isinstance(target, dict):
            raise _Refused("it fills what is not a dictionary")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, str | int):
                raise _Refused("it has a key that is not a text")
            target[key] = value

    argument: Any
    for number, (opcode, argument, _) in enumerate(pickletools.genops(io.BytesIO(pickle))):
        if number > MAX_OPCODES:
            raise _Refused(f"its pickle has more than {MAX_OPCODES:,} instructions")
        match opcode.name:
            case "PROTO":  # 2 is what torch.save writes, and the only one with these opcodes alone
                pass
            case "STOP":
                return stack.pop()
            case "MARK":
                marks.append(len(stack))
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_TUPLE":
                stack.append(())
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[opcode.name])
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE":
                stack.append(argument)
            case "TUPLE":
                stack.append(tuple(to_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(last(int(opcode.name[-1])))
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "GLOBAL":
                stack.append(Name(".".join(argument.split(" "))))
            case "BINPERSID":
                stack.append(_storage(*last(1)))
            case "REDUCE":
                stack.append(_called(*last(2)))
            case "BUILD":  # attributes, such as the _metadata of a state dict
                if not isinstance(stack[-2], dict):
                    raise _Refused("it sets attributes of what is not a dictionary")
                stack.pop()
            case "SETITEM":
                set_items(list(last(2)))
            case "SETITEMS":
                set_items(to_mark())
            case "APPEND" | "APPENDS":
                items = to_mark() if opcode.name == "APPENDS" else list(last(1))
                if not isinstance(stack[-1], list):
                    raise _Refused("it fills what is not a list")
                stack[-1].extend(items)
            case _:
                raise _Refused(f"its pickle has the instruction {opcode.name}")
    raise _Refused("its contents are damaged")


def _storage(reference: Any) -> Storage:
    kind, name, key, _, count = reference
    if (
        kind != "storage"
        or not isinstance(name, Name)
        or not isinstance(key, str)
        or not isinstance(count, int)
    ):
        raise _Refused("it refers to what is not a storage of torch")
    if (dtype := DTYPES.get(name.removeprefix("torch."))) is None:
        raise _Refused(f"it holds a {name[:80]}")
    return Storage(key, dtype, count)


def _dictionary(*items: Any) -> dict[str, Any]:
    if items:
        raise _Refused("it has an ordered dictionary of another form than torch's")
    return {}


def _view(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> View:
    numbers = (offset, *size, *stride)
    if (
        not isinstance(storage, Storage)
        or not all(type(n) is int for n in numbers)
        or len(size) != len(stride)
    ):
        raise _Refused("it has a tensor that is not a part of a storage")
    # one number repeated by strides of 0 would have any size
    if len(size) > MAX_DIMENSIONS or prod(size) > storage.length:
        raise _Refused("it has a tensor that is larger than its storage")
    return View(storage, offset, tuple(size), tuple(stride))


def _parameter(value: Any, *_: Any) -> View:
    if not isinstance(value, View):
        raise _Refused("it has a parameter that is not a tensor")
    return value


_CALLS: dict[str, Callable[..., Any]] = {  # what the functions that torch.save names mean
    "collections.OrderedDict": _dictionary,
    "torch._utils._rebuild_tensor_v2": _view,
    "torch._utils._rebuild_parameter": _parameter,
}


def _called(name: Any, arguments: Any) -> Any:
    if not isinstance(name, Name):
        raise _Refused("it calls what is not a function")
    if name not in _CALLS:
        raise _Refused(f"it calls {name[:80]}")
    return _CALLS[name](*arguments)
