"""GGUF files of others: their metadata and tensors' entries, which are read without a library."""

import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from pipeline.calc.sources.open_model import open_model
from pipeline.files.base_model import parse_source, resolve
from pipeline.models.load import refuse_implausible_gguf
from tests.helpers.fuzz import NUMBERS, ODD, changed, damaged, fuzz, read_or_refuse

pytestmark = pytest.mark.slow
U32, F32, BOOL, STRING, ARRAY, U64 = 4, 6, 7, 8, 9, 10
D, V, INNER, BLOCKS = 32, 100, 48, 2
TREE: dict[str, Any] = {
    "version": 3,
    "entries": None,  # None: as many as there are
    "tensors": None,
    "metadata": [
        ["general.architecture", STRING, "llama"],
        ["llama.embedding_length", U32, D],
        ["llama.block_count", U32, BLOCKS],
        ["llama.feed_forward_length", ARRAY, [U32, [INNER] * BLOCKS]],
        ["llama.attention.head_count", U32, 4],
        ["llama.attention.head_count_kv", U64, 2],
        ["llama.attention.layer_norm_rms_epsilon", F32, 1e-5],
        ["llama.context_length", U32, 64],
        ["tokenizer.ggml.tokens", ARRAY, [STRING, ["a", "b", "c"]]],
        ["tokenizer.ggml.add_bos_token", BOOL, True],
    ],
    "shapes": [
        ["token_embd.weight", [D, V]],
        ["output_norm.weight", [D]],
        ["output.weight", [D, V]],
        *(
            [f"blk.{n}.{name}.weight", shape]
            for n in range(BLOCKS)
            for name, shape in {
                **{"attn_norm": [D], "ffn_norm": [D], "attn_q": [D, D], "attn_output": [D, D]},
                **{"attn_k": [D, D // 2], "attn_v": [D, D // 2]},
                **{"ffn_gate": [D, INNER], "ffn_up": [D, INNER], "ffn_down": [INNER, D]},
            }.items()
        ),
    ],
}
FORMS = {U32: "<I", F32: "<f", BOOL: "<?", U64: "<Q", 0: "<B", 12: "<d"}


def whole(value: Any, bits: int = 64) -> int:
    return value % 2**bits if isinstance(value, int) else 0


def text(value: Any) -> bytes:
    raw = str(value).encode("utf-8", "surrogatepass") if not isinstance(value, int) else b""
    return (
        struct.pack("<Q", whole(value) if raw == b"" and isinstance(value, int) else len(raw)) + raw
    )


def value_of(kind: Any, value: Any) -> bytes:
    if kind == STRING:
        return text(value)
    if kind == ARRAY:
        inner, items = value if isinstance(value, list) and len(value) == 2 else (value, [])
        items = items if isinstance(items, list) else [items] * 3
        return struct.pack("<IQ", whole(inner, 32), len(items)) + b"".join(
            value_of(inner, item) for item in items
        )
    form = FORMS.get(kind if isinstance(kind, int) else -1, "<I")
    try:
        return struct.pack(form, value)
    except (struct.error, OverflowError, TypeError):
        return struct.pack("<Q", whole(value))[: struct.calcsize(form)]


def as_gguf(tree: Any) -> bytes:
    """The file that a changed tree describes, as far as it still does."""
    tree = tree if isinstance(tree, dict) else {}
    listed = [
        tree.get(key) if isinstance(tree.get(key), list) else [] for key in ("metadata", "shapes")
    ]
    metadata, shapes = ([row for row in rows if isinstance(row, list)] for rows in listed)
    counts = [tree.get(key) for key in ("tensors", "entries")]
    tensors, entries = (
        len(rows) if n is None else whole(n)
        for n, rows in zip(counts, (shapes, metadata), strict=True)
    )
    parts = [b"GGUF", struct.pack("<IQQ", whole(tree.get("version"), 32), tensors, entries)]
    for row in metadata:
        key, kind, value = (*row, "", 0, 0)[:3]
        parts += [text(key), struct.pack("<I", whole(kind, 32)), value_of(kind, value)]
    for row in shapes:
        name, shape = (*row, "", [])[:2]
        sizes = shape if isinstance(shape, list) else [shape]
        parts += [
            text(name),
            struct.pack("<I", len(sizes)),
            *(struct.pack("<Q", whole(size)) for size in sizes),
        ]
        parts += [struct.pack("<IQ", 0, 0)]
    return b"".join(parts) + bytes(200_000)


def read_all(path: Path) -> None:
    """What an import and the calculator read before anything else."""
    resolve(path.name, path.parent)
    parse_source(str(path), path.parent)
    refuse_implausible_gguf(path)
    open_model(str(path))


def test_the_tree_is_a_file_that_is_read(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(as_gguf(TREE))
    assert read_or_refuse(lambda: read_all(tmp_path / "m.gguf"), tmp_path) is None


@fuzz(
    "GGUF headers", tree=changed(TREE, st.one_of(ODD, st.integers(0, 13), st.sampled_from(NUMBERS)))
)
def test_headers(folder: Path, tree: Any) -> None:
    (folder / "m.gguf").write_bytes(as_gguf(tree))
    read_or_refuse(lambda: read_all(folder / "m.gguf"), folder)


@fuzz("GGUF bytes", data=damaged(as_gguf(TREE)[:3_000]))
def test_bytes(folder: Path, data: bytes) -> None:
    (folder / "m.gguf").write_bytes(data)
    read_or_refuse(lambda: read_all(folder / "m.gguf"), folder)
