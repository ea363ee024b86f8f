"""GGUF headers: metadata and tensor shapes, without reading the weights (format versions 2 and 3)."""

import struct
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from pipeline.calc.architecture import Architecture
from pipeline.calc.families.config import MOST_LAYERS
from pipeline.calc.families.registry import architecture
from pipeline.errors import UserError

FAMILIES = {  # architecture in GGUF → model_type in config.json
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
    "llama": "llama",
    "olmo2": "olmo2",
    "phi3": "phi3",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3moe": "qwen3_moe",
    "smollm3": "smollm3",
}
VERSIONS = (2, 3)
_SCALARS = ("<B", "<b", "<H", "<h", "<I", "<i", "<f", "<?", None, None, "<Q", "<q", "<d")
_STRING, _ARRAY = 8, 9
# Limits above which a file is taken as damaged. Published files have up to about 2,000 tensors, 100 entries, 300,000
# strings in an array and 100 KB per string.
MAX_COUNT = 2**17  # tensors or entries of a header
MAX_STRINGS = 2**21  # strings in an array
MAX_STRING_BYTES = 2**26  # of all strings outside arrays


class _Reader:
    """Reads little-endian values. Raises UserError if the file ends early or a count is implausible."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file, self._path = file, path
        self._string_bytes_left = MAX_STRING_BYTES

    def unpack(self, form: str) -> Any:
        size = struct.calcsize(form)
        data = self._file.read(size)
        if len(data) < size:
            raise UserError(f"{self._path} is truncated: its header ends too early. Download it again.")
        return struct.unpack(form, data)[0]

    def count(self, what: str, most: int = MAX_COUNT) -> int:
        number: int = self.unpack("<Q")
        if number > most:
            raise UserError(f"{self._path} is damaged: it claims {number:,} {what}. Download it again.")
        return number

    def string(self) -> str:
        length = self.count("bytes in strings", self._string_bytes_left)
        self._string_bytes_left -= length  # returned strings stay in memory
        data = self._file.read(length)
        if len(data) < length:
            raise UserError(f"{self._path} is truncated: its header ends too early. Download it again.")
        return data.decode("utf-8", errors="replace")

    def skip_string(self) -> None:
        self._file.seek(self.count("bytes in a string", MAX_STRING_BYTES), 1)

    def value(self, kind: int) -> Any:
        """A value of GGUF type `kind`; arrays as `_read_array` returns them."""
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self._read_array()
        form = _SCALARS[kind] if kind < len(_SCALARS) else None
        if form is None:
            raise UserError(f"{self._path} is damaged: unknown value type {kind}.")
        return self.unpack(form)

    def _read_array(self) -> Any:
        """The number itself if all are equal (one per layer), else the sorted set; [] for strings and long arrays."""
        kind = self.unpack("<I")
        length = self.count("entries in an array", MAX_STRINGS if kind == _STRING else 2**26)
        form = _SCALARS[kind] if kind < len(_SCALARS) else None
        if form is None and kind != _STRING:
            raise UserError(f"{self._path} is damaged: unknown array type {kind}.")
        if form is None:
            for _ in range(length):
                self.skip_string()
        elif length <= MOST_LAYERS:
            numbers = {self.unpack(form) for _ in range(length)}
            return numbers.pop() if len(numbers) == 1 else sorted(numbers)
        else:
            self._file.seek(length * struct.calcsize(form), 1)
        return []


def read_header(path: Path) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """(metadata, name → shape). Raises UserError for another format or version, or a truncated file."""
    with path.open("rb") as file:
        reader = _Reader(file, path)
        if file.read(4) != b"GGUF":
            raise UserError(f"{path} is not a GGUF file.")
        version = reader.unpack("<I")
        if version not in VERSIONS:
            raise UserError(
                f"{path} has GGUF version {version}; supported versions: {' and '.join(map(str, VERSIONS))}."
            )
        tensors, entries = reader.count("tensors"), reader.count("entries")
        metadata: dict[str, Any] = {}
        for _ in range(entries):
            key = reader.string()
            metadata[key] = reader.value(reader.unpack("<I"))
        shapes = {}
        for _ in range(tensors):
            name = reader.string()
            dimensions = reader.unpack("<I")
            if dimensions > 4:
                raise UserError(f"{path} is damaged: {name} has {dimensions} dimensions.")
            shapes[name] = tuple(reader.unpack("<Q") for _ in range(dimensions))
            reader.unpack("<I"), reader.unpack("<Q")  # type and offset
    return metadata, shapes


def read_shapes(path: Path) -> Architecture:
    """The architecture of a GGUF file, checked against the sizes of its tensors. Raises UserError."""
    metadata, shapes = read_header(path)
    kind = str(metadata.get("general.architecture"))
    if kind not in FAMILIES:
        raise UserError(
            f"{path}: the architecture {kind!r} is not known in GGUF. Known: {', '.join(sorted(FAMILIES))}."
        )
    built = architecture(_as_config(kind, metadata, shapes), str(path))
    stored = sum(prod(shape) for name, shape in shapes.items() if not name.startswith("rope_"))
    size = path.stat().st_size
    if stored != built.total:
        raise UserError(
            f"{path}: its tensors have {stored:,} parameters, its metadata describe {built.total:,}: this variant "
            f"of {kind} is not supported. Give the config.json of the original model."
        )
    note = f"the file holds its weights in {size / 2**30:.2f} GiB, {8 * size / stored:.2f} bits a parameter"
    return replace(built, notes=(*built.notes, note))


def _as_config(kind: str, metadata: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """The equivalent config.json."""
    config = sizes(metadata, shapes)
    mixture = kind == "llama" and config.get("num_experts")
    return {**config, "model_type": "mixtral" if mixture else FAMILIES[kind]}


def sizes(metadata: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """The shapes in the metadata, under the names of config.json."""
    kind = metadata.get("general.architecture")

    def get(key: str) -> Any:
        return metadata.get(f"{kind}.{key}")

    embedding = shapes.get("token_embd.weight") or (0,)
    config = {
        "hidden_size": get("embedding_length"),
        "num_hidden_layers": get("block_count"),
        "intermediate_size": get("feed_forward_length"),
        "num_attention_heads": get("attention.head_count"),
        "num_key_value_heads": get("attention.head_count_kv"),
        "head_dim": get("attention.key_length"),
        "max_position_embeddings": get("context_length"),
        "vocab_size": embedding[-1] or None,
        "tie_word_embeddings": "output.weight" not in shapes,
        "num_experts": get("expert_count"),
        "num_experts_per_tok": get("expert_used_count"),
        "moe_intermediate_size": get("expert_feed_forward_length"),
    }
    return {key: value for key, value in config.items() if value is not None}
