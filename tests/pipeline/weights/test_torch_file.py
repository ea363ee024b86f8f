"""Files of torch.save are read as torch reads them, and no code in them runs."""

import io
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.weights import torch_file
from tests.helpers.errors import user_error

WHOLE = torch.arange(24, dtype=torch.float32).view(4, 6)
SAVED: dict[str, Any] = {
    "plain": {"a": WHOLE, "b": torch.randn(3)},
    "views of one storage": {
        "rows": WHOLE[1:3],
        "columns": WHOLE[:, 2:5],
        "transposed": WHOLE.T,
        "same": WHOLE,
    },
    "dtypes": {str(kind): torch.tensor([1, -2, 3]).to(kind) for kind in torch_file.DTYPES.values()},
    "a state dict, which has attributes": nn.Sequential(
        nn.Linear(3, 2), nn.Embedding(4, 2)
    ).state_dict(),
    "parameters": OrderedDict(weight=nn.Parameter(WHOLE.clone())),
    "a scalar and nothing": {"scalar": torch.tensor(2.5), "none": torch.empty(0, 4)},
    "a dictionary inside": {"model": {"a": WHOLE}},
}


def saved(value: Any, path: Path, **how: Any) -> Path:
    torch.save(value, path, **how)
    return path


def refused(path: Path) -> str:
    said = user_error(torch_file.load, path)
    assert said.startswith(f"{path} cannot be read without running code from it: ")
    return said


@pytest.mark.parametrize("name", SAVED)
def test_it_reads_what_torch_reads(name: str, tmp_path: Path) -> None:
    path = saved(SAVED[name], tmp_path / "file.pt")
    there: dict[str, Tensor] = torch.load(path, weights_only=True)
    there = there.get("model", there)  # type: ignore[assignment]
    here = torch_file.load(path)
    assert here.keys() == there.keys()
    for key, tensor in there.items():
        assert here[key].dtype == tensor.dtype
        assert torch.equal(here[key], tensor.detach())


class Runs:
    """An object whose pickle calls a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


class Plain:
    """An object whose pickle names its class and its attributes."""

    def __init__(self) -> None:
        self.value = 1


@pytest.mark.parametrize("protocol", [0, 1, 2, 4])
@pytest.mark.parametrize("function", [os.system, eval, exec, __import__])
def test_no_code_of_a_malicious_file_runs(
    function: Callable[..., Any], protocol: int, tmp_path: Path
) -> None:
    marker = tmp_path / "ran"
    code = f"touch {marker}" if function is os.system else f"open({str(marker)!r}, 'w')"
    path = saved(
        {"a": WHOLE, "b": Runs(function, code)}, tmp_path / "bad.pt", pickle_protocol=protocol
    )
    refused(path)
    assert not marker.exists()
    with zipfile.ZipFile(path) as archive:  # it would, if it were loaded as pickles are
        (name,) = [each for each in archive.namelist() if each.endswith("data.pkl")]
        whole = pickle.dumps(Runs(function, code), protocol)
        assert whole and archive.read(name)
    if function is os.system:
        pickle.loads(whole)
        assert marker.exists()


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ({"a": Runs(os.getpid)}, "it calls posix.getpid"),
        ({"a": Plain()}, "its pickle has the instruction NEWOBJ"),
        ({"a": 1}, "its entry 'a' is not a tensor"),
        ([WHOLE], "it holds no dictionary of tensors"),
        ({1: WHOLE}, "its entry '1' is not a tensor"),
        ({(1, 2): WHOLE}, "a key that is not a text"),
        ({"a": torch.tensor([True])}, "it holds a torch.BoolStorage"),
        ({"a": torch.zeros(1).expand(10**12)}, "a tensor that is larger than its storage"),
        ({str(number): WHOLE for number in range(500)}, "its tensors are larger than the file"),
    ],
    # a name with an address would differ between processes
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_dictionary_of_tensors_is_refused(
    value: Any, reason: str, tmp_path: Path
) -> None:
    if reason.startswith("its tensors"):
        big = torch.zeros(10_000)
        value = {str(number): big for number in range(500)}
    assert reason in refused(saved(value, tmp_path / "file.pt"))


def rewritten(
    path: Path, change: Callable[[str, bytes], bytes], compression: int = zipfile.ZIP_STORED
) -> Path:
    """`path` with the contents of its files changed."""
    with zipfile.ZipFile(path) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in contents.items():
            archive.writestr(name, change(name, content))
    return path


def test_a_zip_bomb_is_not_unpacked(tmp_path: Path) -> None:
    path = saved({"a": torch.zeros(10_000_000)}, tmp_path / "file.pt")
    rewritten(path, lambda _, content: content, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 100_000
    assert "is compressed" in refused(path)


def test_a_pickle_of_absurd_length_is_not_interpreted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved({"a": WHOLE}, tmp_path / "file.pt")
    monkeypatch.setattr(torch_file, "MAX_OPCODES", 10)
    assert "more than 10 instructions" in refused(path)
    monkeypatch.setattr(torch_file, "MAX_PICKLE", 10)
    assert "data.pkl' has" in refused(path)


def longer(name: str, content: bytes) -> bytes:
    """Says of the storage that it has more numbers than its file."""
    return content.replace(b"K\x18", b"K\x7f") if name.endswith("data.pkl") else content


def big_endian(name: str, content: bytes) -> bytes:
    return b"big" if name.endswith("byteorder") else content


def of_another_size(name: str, content: bytes) -> bytes:
    return content[:-4] if name.endswith("data/0") else content


@pytest.mark.parametrize("change", [longer, big_endian, of_another_size])
def test_a_file_that_contradicts_itself_is_refused(
    change: Callable[[str, bytes], bytes], tmp_path: Path
) -> None:
    refused(rewritten(saved({"a": WHOLE}, tmp_path / "file.pt"), change))


def with_pickle(program: bytes, path: Path) -> Path:
    """A file of torch.save with this pickle."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + program + b".")
        archive.writestr("archive/data/0", struct.pack("<4f", *range(4)))
    return path


def test_a_file_of_four_bytes_that_begins_as_an_archives_end_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "short.pt"
    path.write_bytes(b"PK\5\6")
    refused(path)


def test_an_encrypted_file_is_refused(tmp_path: Path) -> None:
    path = saved({"a": WHOLE}, tmp_path / "file.pt")
    raw, entry = bytearray(path.read_bytes()), b"PK\1\2"
    places = [start for start in range(len(raw)) if raw.startswith(entry, start)]
    for start in places:
        raw[start + 8] |= 1
    path.write_bytes(raw)
    refused(path)


def test_a_call_of_what_is_no_name_is_refused_and_not_written_out(tmp_path: Path) -> None:
    deep = b")" + 100_000 * b"\x85"
    doubled = b")" + 60 * b"q\x00h\x00\x86"  # written out, it has 2⁶⁰ parts
    for program in (deep, doubled):
        assert "it calls what is not a function" in refused(
            with_pickle(program + b")R", tmp_path / "file.pt")
        )


def test_a_tensor_of_nothing_with_absurd_dimensions_is_refused(tmp_path: Path) -> None:
    storage = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000NK\x04tQ"
    huge = b"\x8a\x08" + (2**62).to_bytes(8, "little")
    view = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\x00(K\x00" + 2 * huge + b"t"
    entry = b"X\x01\x00\x00\x00a" + view + b"K\x01K\x01K\x01\x87tR"
    refused(with_pickle(b"}" + entry + b"s", tmp_path / "file.pt"))


def test_the_format_before_torch_1_6_is_refused(tmp_path: Path) -> None:
    path = saved({"a": WHOLE}, tmp_path / "file.pt", _use_new_zipfile_serialization=False)
    assert "not a zip archive as torch has written since version 1.6" in refused(path)


def test_a_missing_file_is_one_message(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file or directory"):
        torch_file.load(tmp_path / "none.pt")


_FILE = io.BytesIO()
torch.save({"a": WHOLE, "b": torch.zeros(2, 2, dtype=torch.bfloat16)}, _FILE)
_BYTES = _FILE.getvalue()


@given(
    st.lists(
        st.tuples(st.integers(0, len(_BYTES) - 1), st.integers(0, 255)), min_size=1, max_size=4
    )
)
def test_a_damaged_file_is_read_or_refused_in_one_message(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, int]]
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.pt"
    raw = bytearray(_BYTES)
    for place, value in changes:
        raw[place] = value
    path.write_bytes(raw)
    try:
        tensors = torch_file.load(path)
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert sum(tensor.nbytes for tensor in tensors.values()) <= 2 * len(raw)


@given(st.binary(max_size=200))
def test_any_pickle_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, program: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + program + b".")
        archive.writestr("archive/data/0", struct.pack("<4f", *range(4)))
    try:
        torch_file.load(path)
    except UserError as error:
        assert "cannot be read without running code" in str(error)
