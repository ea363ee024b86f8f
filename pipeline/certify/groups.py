"""The tensors of a file in groups, and copies of the file in which one group is changed.

A group holds the tensors of all blocks that have the same name but for their number, such as
`self_attn.q_proj.lora_B`. A copy is changed in place: a file is copied once for all groups.
"""

import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from pipeline.files.safetensors_file import TensorInfo, read_header
from pipeline.weights.blocks import DTYPES

NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
# Beside a group's own size: one that is all zeros, as an untrained B, must move too.
LEAST = 1e-2


def grouped(header: Mapping[str, TensorInfo]) -> dict[str, list[str]]:
    """Names of a file's tensors of real numbers by group.

    A group is called by its tensors' name from the block on.
    """
    groups = dict[str, list[str]]()
    for name, info in sorted(header.items()):
        if info.size and info.dtype in DTYPES:
            groups.setdefault(_group_of(name), []).append(name)
    return groups


def _group_of(name: str) -> str:
    """model.layers.3.self_attn.q_proj.lora_A.weight → self_attn.q_proj.lora_A."""
    return NUMBER.sub("*", name).rpartition("*.")[2].removesuffix(".weight")


def copy_of(folder: Path, copy: Path) -> None:
    """Copy the files of a folder, without subfolders."""
    copy.mkdir()
    for path in sorted(folder.iterdir()):
        if path.is_file():
            shutil.copyfile(path, copy / path.name)


@contextmanager
def changed(file: Path, names: Sequence[str], seed: int = 0) -> Iterator[None]:
    """The safetensors file with the tensors `names` changed; after it, as it was."""
    header = read_header(file)
    before = dict[str, bytes]()
    try:
        with file.open("r+b") as opened:
            for number, name in enumerate(names):
                info = header[name]
                opened.seek(info.start)
                before[name] = opened.read(info.size)
                opened.seek(info.start)
                opened.write(_other(before[name], info, seed + number))
        yield
    finally:
        with file.open("r+b") as opened:
            for name, data in before.items():
                opened.seek(header[name].start)
                opened.write(data)


def _other(data: bytes, info: TensorInfo, seed: int) -> bytes:
    """The bytes of a tensor with noise of its own size added."""
    dtype = DTYPES[info.dtype]
    values = torch.frombuffer(bytearray(data), dtype=dtype)
    noise = torch.randn(values.shape, generator=torch.Generator().manual_seed(seed))
    size = values.float().square().mean().sqrt().clamp_min(LEAST)
    return bytes((values.float() + size * noise).to(dtype).view(torch.uint8).numpy().data)
