"""The tensors of files in groups, and copies of the files in which one group is changed.

A group holds the tensors of all blocks that have the same name but for their number, such as
`self_attn.q_proj.lora_B`. A copy is changed in place: files are copied once for all groups.
"""

import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from pipeline.files.artifact import MANIFEST
from pipeline.files.safetensors_file import read_header
from pipeline.weights.blocks import DTYPES

NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
# Beside a group's own size: one that is all zeros, as an untrained B, must move too.
LEAST = 1e-2
MOST_NAMES = 3  # in a sentence


class Stored(NamedTuple):
    """A tensor in a file."""

    file: str  # its name in the folder
    start: int  # byte
    size: int  # bytes
    dtype: str | None  # a key of DTYPES; None for codes, which are changed by reversing their rows
    rows: int


def stored_in(file: Path) -> dict[str, Stored]:
    """The real numbers of a safetensors file by name. Raises UserError."""
    return {
        name: Stored(file.name, info.start, info.size, info.dtype, max(1, *info.shape[:1]))
        for name, info in read_header(file).items()
        if info.size and info.dtype in DTYPES
    }


def grouped(names: Iterable[str]) -> dict[str, list[str]]:
    """Names by group. A group is called by its tensors' name from the block on."""
    groups = dict[str, list[str]]()
    for name in sorted(names):
        groups.setdefault(_group_of(name), []).append(name)
    return groups


def _group_of(name: str) -> str:
    """model.layers.3.self_attn.q_proj.lora_A.weight → self_attn.q_proj.lora_A."""
    return NUMBER.sub("*", name).rpartition("*.")[2].removesuffix(".weight")


def listed(names: Iterable[str]) -> str:
    """The first of some names, and how many more there are."""
    known = list(names)
    more = len(known) - MOST_NAMES
    return ", ".join(known[:MOST_NAMES]) + (f" and {more} more" if more > 0 else "")


def copy_of(path: Path, copy: Path, files: Iterable[str]) -> None:
    """Copy a file, or those of a folder without subfolders, to a folder in which `files` change.

    The others are the same files where that is possible. A manifest, which would forbid the
    change, is left out.
    """
    copy.mkdir()
    changing = set(files)
    for source in [path] if path.is_file() else sorted(path.iterdir()):
        if not source.is_file() or source.name == MANIFEST:
            continue
        try:
            copy_file = shutil.copyfile if source.name in changing else os.link
            copy_file(source.resolve(), copy / source.name)
        except OSError:  # another file system
            shutil.copyfile(source, copy / source.name)


@contextmanager
def changed(folder: Path, tensors: Sequence[Stored], seed: int = 0) -> Iterator[None]:
    """A folder's files with these tensors changed; after it, as they were."""
    before = list[bytes]()
    try:
        for number, tensor in enumerate(tensors):
            with (folder / tensor.file).open("r+b") as file:
                file.seek(tensor.start)
                before.append(file.read(tensor.size))
                file.seek(tensor.start)
                file.write(_other(before[-1], tensor, seed + number))
        yield
    finally:
        for tensor, data in zip(tensors, before, strict=False):
            with (folder / tensor.file).open("r+b") as file:
                file.seek(tensor.start)
                file.write(data)


def _other(data: bytes, tensor: Stored, seed: int) -> bytes:
    """The bytes of a tensor with noise of its own size added, or of codes with their rows
    reversed.
    """
    if tensor.dtype is None:
        rows = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(tensor.rows, -1)
        return bytes(rows.flip(0).numpy().data)
    dtype = DTYPES[tensor.dtype]
    values = torch.frombuffer(bytearray(data), dtype=dtype)
    noise = torch.randn(values.shape, generator=torch.Generator().manual_seed(seed))
    size = values.float().square().mean().sqrt().clamp_min(LEAST)
    return bytes((values.float() + size * noise).to(dtype).view(torch.uint8).numpy().data)
