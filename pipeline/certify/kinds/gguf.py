"""A GGUF file: a whole model, or an adapter for llama.cpp's --lora."""

from collections.abc import Iterator, Mapping
from math import isclose
from pathlib import Path
from typing import Any

from pipeline.certify.groups import Stored
from pipeline.certify.kinds import Checked, Found, Kind
from pipeline.errors import UserError, require
from pipeline.files.base_model import tensor_locations
from pipeline.weights.merge_plan import MergePlan

SUFFIX = ".gguf"


def file_of(path: Path) -> Path:
    """The GGUF file in a folder, or the file itself. Raises UserError if there are several."""
    if path.is_file():
        return path
    files = sorted(path.glob(f"*{SUFFIX}"))
    if len(files) != 1:
        names = ", ".join(file.name for file in files)
        raise UserError(f"{path} has several GGUF files ({names}). Name one.")
    return files[0]


def _recognizes(path: Path) -> bool:
    return path.suffix == SUFFIX if path.is_file() else any(path.glob(f"*{SUFFIX}"))


def _reader(path: Path) -> Any:
    """The gguf package's reader. Raises UserError for what is no whole GGUF file."""
    require("lora export --format gguf")
    import gguf

    file = file_of(path)
    try:
        return gguf.GGUFReader(file)
    except Exception as error:  # whatever it raises for a file that is none
        raise UserError(f"{file} is no whole GGUF file: {error}. Copy it again.") from None


def _tensors(checked: Checked) -> Mapping[str, Stored]:
    from gguf import GGMLQuantizationType as Type

    dtypes = {Type.F32: "F32", Type.F16: "F16", Type.BF16: "BF16"}
    file = file_of(checked.folder).name
    return {
        tensor.name: Stored(
            file,
            int(tensor.data_offset),
            int(tensor.n_bytes),
            dtypes.get(tensor.tensor_type),
            int(tensor.data.shape[0]),
        )
        for tensor in _reader(checked.folder).tensors
    }


def is_adapter(path: Path) -> bool:
    """Whether it is an adapter."""
    field = _reader(path).get_field("general.type")
    return field is not None and field.contents() == "adapter"


def rounding(path: Path) -> str:
    """The kind of most of a model's tensors, such as q4_k_m; of an adapter f16."""
    from gguf import LlamaFileType

    field = _reader(path).get_field("general.file_type")
    if is_adapter(path) or field is None:
        return "f16"
    name: str = LlamaFileType(field.contents()).name
    return name.removeprefix("MOSTLY_").removeprefix("ALL_").lower()


def _inspect(checked: Checked) -> Found:
    if is_adapter(checked.folder):
        return Found([], [])  # llama.cpp refuses what does not fit
    from pipeline.export.gguf.writer import describe_model

    unchanged = MergePlan(checked.base, tensor_locations(checked.base))
    try:
        settings = describe_model(unchanged, checked.trust_remote_code).metadata
    except UserError as error:
        return Found([], [f"its settings: {error}"])
    return Found([*_differences(settings, _reader(checked.folder))], [])


def _differences(settings: Mapping[str, Any], reader: Any) -> Iterator[str]:
    """Settings of the model's computation that are not the base's."""
    for key, ours in settings.items():
        field = reader.get_field(key)
        if field is None or isinstance(ours, list):
            continue
        theirs = field.contents()
        if isinstance(ours, float):
            is_same = isinstance(theirs, float) and isclose(ours, theirs, rel_tol=1e-5)
        else:
            is_same = ours == theirs
        if not is_same:
            yield f"it has {key} {str(theirs)[:60]}, the base {str(ours)[:60]}"


KIND = Kind(
    3,
    "a GGUF file",
    "llama.cpp",
    _recognizes,
    files=lambda path: [file_of(path)],
    tensors=_tensors,
    inspect=_inspect,
    rounding=rounding,
    is_adapter=is_adapter,
)
