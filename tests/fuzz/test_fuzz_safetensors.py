"""Safetensors files of others: headers, bytes, and the index of shards."""

import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from pipeline.files.base_model import base_fingerprint, tensor_locations
from pipeline.files.safetensors_file import fingerprint
from pipeline.models.save import load_tensors
from tests.helpers.fuzz import NUMBERS, ODD, as_json, damaged, fuzz, json_files, read_or_refuse

pytestmark = pytest.mark.slow
HEADER = {
    "__metadata__": {"format": "pt"},
    "a.weight": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b.weight": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
    "c": {"dtype": "I64", "shape": [], "data_offsets": [32, 40]},
    "empty": {"dtype": "F16", "shape": [0, 7], "data_offsets": [40, 40]},
}
DTYPES = st.sampled_from(("F64", "F8_E4M3", "U8", "BOOL", "I4", "C64", "f32", ""))
VALUES = st.one_of(
    ODD, DTYPES, st.integers(-48, 48), st.sampled_from(NUMBERS), st.just([2**32, 2**32])
)
FILE = struct.pack("<Q", len(as_json(HEADER))) + as_json(HEADER) + bytes(40)


def read_all(path: Path) -> None:
    """All readers of such a file: of its header alone, of all bytes, of all tensors."""
    fingerprint([path])
    load_tensors(path)


LENGTHS = st.sampled_from((*[None] * 8, 0, 7, 2**63, 2**64 - 1, 20_000_001))  # None: the right one


@fuzz("safetensors headers", header=json_files(HEADER, VALUES), lie=LENGTHS)
def test_headers(folder: Path, header: bytes, lie: int | None) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header) if lie is None else lie) + header + bytes(40))
    read_or_refuse(lambda: read_all(path), folder)


@fuzz("safetensors bytes", data=damaged(FILE))
def test_bytes(folder: Path, data: bytes) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(data)
    read_or_refuse(lambda: read_all(path), folder)


INDEX: dict[str, Any] = {
    "metadata": {"total_size": 40},
    "weight_map": {
        "a.weight": "model-1.safetensors",
        "b.weight": "model-1.safetensors",
        "c": "model-2.safetensors",
    },
}
NAMES = st.sampled_from(
    (
        "../x.safetensors",
        "/etc/x.safetensors",
        "a/b.safetensors",
        ".safetensors",
        "x.bin",
        "\0.safetensors",
        "s" * 300,
    )
)


@fuzz("safetensors indexes", index=json_files(INDEX, st.one_of(ODD, NAMES)))
def test_indexes(folder: Path, index: bytes) -> None:
    for name in ("model-1", "model-2"):
        (folder / f"{name}.safetensors").write_bytes(FILE)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "model.safetensors.index.json").write_bytes(index)

    def look() -> None:
        tensor_locations(folder)
        base_fingerprint(folder)

    read_or_refuse(look, folder)
