"""Safetensors headers and fingerprints, against the safetensors library."""

import struct
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from pipeline.errors import UserError
from pipeline.files import safetensors_file
from pipeline.files.safetensors_file import (
    NewTensor,
    fingerprint,
    refuse_difference,
    rewrite,
    shapes,
)

TENSORS = {
    "b": torch.arange(6.0).view(2, 3),
    "a": torch.tensor([1, 2]),
    "c": torch.zeros(0, 4, dtype=torch.bfloat16),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "t.safetensors")
    return tmp_path / "t.safetensors"


def test_shapes_are_those_that_were_saved(path: Path) -> None:
    assert shapes(path) == {"a": (2,), "b": (2, 3), "c": (0, 4)}


def test_a_fingerprint_ignores_order_and_metadata_but_no_bit(path: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    save_file(dict(reversed(TENSORS.items())), other, metadata={"format": "pt"})
    assert fingerprint([other]) == fingerprint([path])
    changed = TENSORS["b"].clone()
    changed[1, 2] = torch.nextafter(changed[1, 2], torch.tensor(9.0))
    for variant in (
        {**TENSORS, "b": changed},
        {**TENSORS, "b": TENSORS["b"].view(3, 2)},
        {"d": TENSORS["b"]},
    ):
        save_file(variant, other)
        assert fingerprint([other]) != fingerprint([path])


def test_a_file_that_is_cut_while_it_is_hashed_is_refused(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    header = safetensors_file.read_header(path)
    monkeypatch.setattr(safetensors_file, "read_header", lambda _: header)
    with path.open("rb+") as file:
        file.truncate(path.stat().st_size - 4)
    with pytest.raises(UserError, match="was truncated while it was read"):
        fingerprint([path])


@given(st.data())
def test_a_file_cut_anywhere_is_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.getbasetemp() / "cut.safetensors"
    save_file(TENSORS, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(UserError, match="damaged or truncated"):
        shapes(path)


@pytest.mark.parametrize(
    "header",
    [
        b"not json",
        b"[]",
        b'{"a":{}}',
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}',
        b'{"a":7}',
        # longer as a text than Python writes
        b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[%s,%s]}}' % (b"9" * 4300, b"9" * 4300),
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[-%s,%s]}}' % (b"9" * 4300, b"9" * 4300),
    ],
    ids=range(7),
)
def test_a_header_that_does_not_describe_its_file_is_refused(tmp_path: Path, header: bytes) -> None:
    path = tmp_path / "h.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    with pytest.raises(UserError, match="damaged or truncated"):
        shapes(path)


def test_a_header_of_more_tensors_than_any_model_has_is_not_parsed(tmp_path: Path) -> None:
    entry = ',"%06d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    header = ("{" + "".join(entry % number for number in range(400_000))[1:] + "}").encode()
    (tmp_path / "h.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(UserError, match="its header must have at most 20,000,000 bytes, got"):
        shapes(tmp_path / "h.safetensors")


def test_a_difference_is_told_by_name() -> None:
    with pytest.raises(
        UserError,
        match="missing a; not expected c and 1 more; b has shape \\[1\\], expected \\[2\\]",
    ):
        refuse_difference({"a": (1,), "b": (2,)}, {"b": (1,), "c": (1,), "d": (1,)}, "file")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux allocates")
def test_a_file_to_write_has_its_blocks_before_its_bytes(tmp_path: Path) -> None:
    source, target = tmp_path / "source.safetensors", tmp_path / "target.safetensors"
    save_file({"w": torch.ones(2**20)}, source)
    parts = list(rewrite(source, target, [NewTensor("w", "F32", (2**20,))]))
    assert target.stat().st_size == source.stat().st_size
    assert target.stat().st_blocks * 512 >= source.stat().st_size
    for write in parts:
        write()
    assert target.read_bytes() == source.read_bytes()
