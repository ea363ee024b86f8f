"""Shapes from the headers of weight files: safetensors, and GGUF (versions 2 and 3).

GGUF names its architecture. Safetensors files do not: their tensors' names and sizes are enough for
parameter counts, and for models that no family builds.

They are read without a library: the libraries for these formats import numpy or torch, which would
make the calculator start ten times more slowly. A file may be damaged or made to do harm, so no
number in it is trusted: each count and length is limited before memory is taken for it, and a
GGUF's metadata must describe as many parameters as its tensors have.
"""

import re
import struct
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from msgspec.structs import replace

from pipeline.calc.architecture import Architecture, Block, BlockStyle, Linear
from pipeline.calc.families import MOST_LAYERS, Config, architecture
from pipeline.calc.target_modules import matches_target
from pipeline.errors import UserError
from pipeline.files.safetensors_file import read_header

# tensors

_LAYER = re.compile(r"^(.*?)\.(\d{1,5})\.(.+)$")
# masks and tables in old checkpoints
_BUFFER = re.compile(r"(\.attn\.(bias|masked_bias)|inv_freq)$")
_EXPERT = re.compile(r"experts\.(\d+)\.")
_EMBEDDING = re.compile(r"(embed_tokens|wte|embed_in|word_embeddings|tok_embeddings)\.weight$")
_HEAD = re.compile(r"(lm_head|embed_out|^output)\.(weight|bias)$")
_POSITIONS = re.compile(r"(wpe|embed_positions|position_embeddings)\.weight$")
_TRANSPOSED = re.compile(r"(c_attn|c_proj|c_fc)$")  # GPT-2 stores (inputs, outputs)
_PACKED = ("I32", "U8", "I8")


def from_safetensors(files: Sequence[Path], config: Mapping[str, Any], source: str) -> Architecture:
    """The architecture of these files; `config` may have head counts. Raises UserError."""
    tensors = dict(chain.from_iterable(read_header(file).items() for file in files))
    if packed := [
        name
        for name, tensor in tensors.items()
        if tensor.dtype in _PACKED and len(tensor.shape) == 2
    ]:
        raise UserError(
            f"{source}: {packed[0]} contains packed, quantized weights. Give the original model "
            "instead."
        )
    # tensors of the blocks by (stack, number); a stack is an encoder, decoder or vision tower
    blocks: dict[tuple[str, int], dict[str, tuple[int, ...]]] = defaultdict(dict)
    rest: dict[str, tuple[int, ...]] = {}
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    for name, shape in shapes.items():
        if _BUFFER.search(name) and (len(shape) != 1 or name.endswith("inv_freq")):
            continue
        if match := _LAYER.match(name):
            blocks[match[1], int(match[2])][match[3]] = shape
        else:
            rest[name] = shape
    embedding = next((name for name in shapes if _EMBEDDING.search(name)), "")
    table = shapes.get(embedding, ())
    if len(table) != 2 or 0 in table or not blocks:
        raise UserError(
            f"{source}: its tensors have no embedding and numbered layers. Is it a language model?"
        )
    vocabulary, width = table
    heads_of_rest = [name for name in rest if _HEAD.search(name)]
    head = next((name for name in heads_of_rest if rest[name] == table), None)
    head_biases = {name for name in heads_of_rest if len(rest[name]) == 1}
    positions = {name for name in rest if _POSITIONS.search(name)}
    others = rest.keys() - {embedding, head} - head_biases - positions
    largest = Counter(stack for stack, _ in blocks).most_common(1)[0][0]
    built = {key: _build_block(blocks[key]) for key in sorted(blocks)}
    first = next(block for (stack, _), block in built.items() if stack == largest)
    # head counts of the config; without one, heads of 128 are assumed, or of 64 in narrow models
    outputs = {linear.name.rsplit(".", 1)[-1]: linear.outputs for linear in first.attention}
    q = outputs.get("q_proj", width)
    sizes = Config(config, source)
    heads = sizes.size(
        "num_attention_heads", default=max(1, q // (128 if width >= 2048 else 64)), most=max(q, 1)
    )
    head_size = sizes.size("head_dim", default=max(1, q // heads))
    # equal blocks become one object: runs of them are recognized by identity
    unique: dict[Block, Block] = {}
    return Architecture(
        family="unknown",
        hidden=width,
        heads=max(1, q // head_size),
        kv_heads=max(1, outputs.get("k_proj", q) // head_size),
        head_size=head_size,
        vocabulary=vocabulary,
        context=sizes.size("max_position_embeddings", default=2**20),
        blocks=tuple(unique.setdefault(block, block) for block in built.values()),
        embedding_width=width,
        final_norm=sum(prod(rest[name]) for name in others),
        tied=head is None,
        positions=sum(prod(rest[name]) for name in positions),
        head_bias=sum(prod(rest[name]) for name in head_biases),
        style=BlockStyle(gated=len(first.feed_forward) != 2, unknown=True),
        layers=largest,
        source=source,
        notes=(
            "shapes from headers: parameters are exact, activations are estimated as Llama's of "
            "these widths",
        ),
    )


def _build_block(tensors: Mapping[str, tuple[int, ...]]) -> Block:
    """A block: matrices are linears, equal experts are one, all other tensors count as norms.

    A convolution in one dimension counts as a stack of linears.
    """
    counts: Counter[str] = Counter()
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in tensors.items():
        plain = _EXPERT.sub("experts.", name)
        counts[plain] += 1
        shapes[plain] = shape
    linears, in_linears = list[Linear](), set[str | None]()
    for name, shape in shapes.items():
        stem = name.removesuffix(".weight")
        if len(shape) not in (2, 3) or name.endswith((".bias", "_bias")):
            continue
        bias = next((b for b in (f"{stem}.bias", f"{stem}_bias") if b in shapes), None)
        outputs, inputs = shape[-2:]
        rows = shapes[bias][-1] if bias else 0
        if _TRANSPOSED.search(stem) and (rows == inputs or not bias):
            outputs, inputs = inputs, outputs
        experts = shape[0] if len(shape) == 3 else counts[name]
        # gpt-oss stacks its experts' weights as (E, inputs, outputs)
        if len(shape) == 3 and rows == inputs != outputs:
            outputs, inputs = inputs, outputs
        has_bias = bias is not None and prod(shapes[bias]) * counts[bias] == outputs * experts
        linears.append(Linear(stem, inputs, outputs, has_bias, experts))
        in_linears |= {name, bias} if has_bias else {name}
    others = shapes.keys() - in_linears
    norms = sum(prod(shapes[name]) * counts[name] for name in others)
    attention = tuple(linear for linear in linears if matches_target("attention", linear.name))
    return Block(attention, tuple(linear for linear in linears if linear not in attention), norms)


# GGUF

GGUF_FAMILIES = {  # architecture in GGUF → model_type in config.json
    **{name: name for name in ("gemma2", "llama", "olmo2", "phi3", "qwen2", "qwen3", "smollm3")},
    "gemma3": "gemma3_text",
    "qwen3moe": "qwen3_moe",
}
VERSIONS = (2, 3)
_SCALARS = ("<B", "<b", "<H", "<h", "<I", "<i", "<f", "<?", None, None, "<Q", "<q", "<d")
_STRING, _ARRAY = 8, 9
# Limits above which a file is taken as damaged. Published files have up to about 2,000 tensors, 100
# entries, 300,000 strings in an array and 100 KB per string.
MAX_COUNT = 2**17  # tensors or entries of a header
MAX_STRINGS = 2**21  # strings in an array
MAX_STRING_BYTES = 2**26  # of all strings outside arrays
MAX_HEADER = 2**28  # bytes before the tensors; a vocabulary of 260,000 tokens takes 16 MB


class _Reader:
    """Reads little-endian values. Raises UserError for an early end or an implausible count."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file, self._path = file, path
        self._string_bytes_left = MAX_STRING_BYTES
        self._left = MAX_HEADER

    def _read(self, size: int) -> bytes:
        data = self._file.read(size)
        self._left -= size
        if self._left < 0:
            raise UserError(
                f"{self._path} must have a header of at most {MAX_HEADER:,} bytes. Download it "
                "again."
            )
        if len(data) < size:
            raise UserError(
                f"{self._path} is truncated: its header ends too early. Download it again."
            )
        return data

    def _skip(self, size: int) -> None:
        self._file.seek(size, 1)
        self._left -= size  # checked by the next read

    def unpack(self, form: str) -> Any:
        return struct.unpack(form, self._read(struct.calcsize(form)))[0]

    def count(self, what: str, most: int = MAX_COUNT) -> int:
        number: int = self.unpack("<Q")
        if number > most:
            raise UserError(
                f"{self._path} is damaged: it claims {number:,} {what}. Download it again."
            )
        return number

    def string(self) -> str:
        length = self.count("bytes in strings", self._string_bytes_left)
        self._string_bytes_left -= length  # returned strings stay in memory
        return self._read(length).decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        """A value of GGUF type `kind`.

        Of an array, which has a number for each layer, the number if all are equal, else the
        different ones, sorted; [] for an array of strings and for a long one.
        """
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.unpack(self._form(kind, "value"))
        kind = self.unpack("<I")
        length = self.count("entries in an array", MAX_STRINGS if kind == _STRING else 2**26)
        if kind == _STRING:  # a vocabulary, whose length is known from the embedding
            for _ in range(length):
                self._skip(self.count("bytes in a string", MAX_STRING_BYTES))
            return []
        form = self._form(kind, "array")
        if length <= MOST_LAYERS:
            numbers = {self.unpack(form) for _ in range(length)}
            return numbers.pop() if len(numbers) == 1 else sorted(numbers)
        self._skip(length * struct.calcsize(form))
        return []

    def _form(self, kind: int, what: str) -> str:
        form = _SCALARS[kind] if kind < len(_SCALARS) else None
        if form is None:
            raise UserError(f"{self._path} is damaged: unknown {what} type {kind}.")
        return form


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """(metadata, name → shape). Raises UserError for another format, or a truncated file."""
    with path.open("rb") as file:
        reader = _Reader(file, path)
        if file.read(4) != b"GGUF":
            raise UserError(f"{path} is not a GGUF file.")
        version = reader.unpack("<I")
        if version not in VERSIONS:
            raise UserError(
                f"{path} has GGUF version {version}; supported versions: "
                f"{' and '.join(map(str, VERSIONS))}."
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
            reader.unpack("<I")  # type
            reader.unpack("<Q")  # offset
    return metadata, shapes


def from_gguf(path: Path) -> Architecture:
    """The architecture of a GGUF file, checked against its tensors' sizes. Raises UserError."""
    metadata, shapes = read_gguf(path)
    kind = str(metadata.get("general.architecture"))
    if kind not in GGUF_FAMILIES:
        raise UserError(
            f"{path}: the architecture {kind!r} is not known in GGUF. Known: "
            f"{', '.join(sorted(GGUF_FAMILIES))}."
        )
    config = gguf_config(metadata, shapes)
    family = "mixtral" if kind == "llama" and config.get("num_experts") else GGUF_FAMILIES[kind]
    built = architecture({**config, "model_type": family}, str(path))
    # llama.cpp stores the factors of long contexts as a tensor; transformers computes them
    stored = sum(prod(shape) for name, shape in shapes.items() if not name.startswith("rope_"))
    size = path.stat().st_size
    if stored != built.total:
        raise UserError(
            f"{path}: its tensors have {stored:,} parameters, its metadata describe "
            f"{built.total:,}: this variant "
            f"of {kind} is not supported. Give the config.json of the original model."
        )
    note = (
        f"the file holds its weights in {size / 2**30:.2f} GiB, {8 * size / stored:.2f} bits a "
        "parameter"
    )
    return replace(built, notes=(*built.notes, note))


def gguf_config(metadata: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """The shapes in the metadata, under the names of config.json."""
    kind = metadata.get("general.architecture")

    def get(key: str) -> Any:
        return metadata.get(f"{kind}.{key}")

    embedding = shapes.get("token_embd.weight") or (0,)  # dimensions in reverse: (D, V)
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
