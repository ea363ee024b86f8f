"""What a file from elsewhere can cost: each limit of the threat model is met by a file made to
exceed it.
"""

import gzip
import io
import json
import os
import struct
import time
import zipfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from pipeline.adapters.config import MOST_NAMES, MOST_PATTERNS, read_spec
from pipeline.calc.sources import headers
from pipeline.calc.sources.open_model import open_model
from pipeline.data import containers
from pipeline.data.containers import tables
from pipeline.data.formats import iter_examples
from pipeline.data.tokenizers.subword import SubwordTokenizer
from pipeline.errors import LONGEST_MESSAGE, UserError
from pipeline.evaluation.tasks import read_tasks
from pipeline.files import artifact, patterns, strict_yaml
from pipeline.files.safetensors_file import read_header
from pipeline.models.load import skeleton
from pipeline.project.foreign import read_config
from pipeline.stages.registry import GRAPH, open_project
from pipeline.weights import torch_file
from tests.helpers.bases import toy_checkpoint
from tests.helpers.fuzz import limits, read_or_refuse
from tests.helpers.json_files import edit_json, write_json
from tests.helpers.tokenizers import folder_with

MERGES = "a0: &a0 {x: 1, y: 2}\n" + "".join(  # 9**12 pairs in the last line
    f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}\n" for n in range(1, 13)
)
LISTS = "a0: &a0 [x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 13)
)


def message(reader: Any, folder: Path) -> str:
    """What the reader says, within the limits of time and memory."""
    refused = read_or_refuse(reader, folder)
    assert refused is not None
    return refused


def examples(path: Path) -> Any:
    return lambda: list(iter_examples(path, path.name))


def test_a_message_is_one_line_without_control_characters_and_of_limited_length() -> None:
    said = str(UserError("a\x1b[2J\nerror: b\u2028c\u202e" + "x" * 10_000 + " Copy it again."))
    assert said.startswith("a␛[2J␊error: b\ufffdc\ufffdxxx") and said.endswith("xxx Copy it again.")
    assert len(said) == LONGEST_MESSAGE
    assert str(UserError("one\n", "two")) == "one␊\ntwo"


@pytest.mark.parametrize(
    "bomb", [MERGES, LISTS, "a: &a [*a]\n", "a: &a {<<: *a}\n", "a: &a {b: *a}\n"]
)
@pytest.mark.parametrize("kind", ["params", "config", "tasks", "litgpt"])
def test_aliases_of_yaml_stand_for_at_most_a_million_values(
    tmp_path: Path, bomb: str, kind: str
) -> None:
    path = tmp_path / {"params": "params.yaml", "litgpt": "hyperparameters.yaml"}.get(
        kind, "x.yaml"
    )
    path.write_text(bomb, encoding="utf-8")
    readers: dict[str, Any] = {
        "params": lambda: open_project(path),
        "config": lambda: read_config(path, GRAPH.sections),
        "tasks": lambda: read_tasks(tmp_path, ["x.yaml"]),
        "litgpt": lambda: _litgpt(path),
    }
    said = message(readers[kind], tmp_path)
    assert "stand for more than 1,000,000 values" in said or kind == "litgpt"


def _litgpt(path: Path) -> None:
    from pipeline.weights.foreign.litgpt import _settings

    _settings(path)


def messages_of_yaml(folder: Path, value: str) -> list[str]:
    """What is said of a value in a params file and in a file of tasks."""
    (folder / "params.yaml").write_text(f"finetune_lora: {{rank: {value}}}\n", encoding="utf-8")
    (folder / "t.yaml").write_text(f"a: {value}\n", encoding="utf-8")
    return [
        message(lambda: open_project(folder / "params.yaml"), folder),
        message(lambda: read_tasks(folder, ["t.yaml"]), folder),
    ]


@pytest.mark.parametrize("number", ["0x" + "f" * 5_000, "9" * 5_000, "1" + ":59" * 2_000])
def test_a_number_of_yaml_that_is_too_long_to_write_is_one_message(
    tmp_path: Path, number: str
) -> None:
    for said in messages_of_yaml(tmp_path, number):
        assert "a number must have at most 1000 digits" in said


@pytest.mark.parametrize(
    "value",
    [
        "!!bool x",
        "!!int ''",
        "!!float ''",
        "!!timestamp x",
        "1" + ":59" * 200 + ".5",
        r'"\UFFFFFFFF"',
    ],
    ids=range(6),
)
def test_a_value_of_yaml_that_does_not_fit_its_tag_is_one_message(
    tmp_path: Path, value: str
) -> None:
    for said in messages_of_yaml(tmp_path, value):
        assert "yaml" in said


def test_a_mapping_of_yaml_that_merges_another_is_merged_before_it_is_read_itself() -> None:
    deep = "x: &x {k: 1, l: 1}\na:\n  deep: &b {<<: *x, k: 2}\nc: {<<: *b, l: 3}\n"
    merged = {"k": 2, "l": 1}
    expected = {"x": {"k": 1, "l": 1}, "a": {"deep": merged}, "c": {"k": 2, "l": 3}}
    assert strict_yaml.load(deep) == expected
    for twice in ("{<<: *x, k: 2, k: 3}", "{k: 2, k: 3}"):
        with pytest.raises(ValueError, match="key 'k' twice"):
            strict_yaml.load(f"x: &x {{k: 1}}\na:\n  deep: &b {twice}\nc: {{<<: *b}}\n")


def test_the_place_of_a_byte_that_is_not_utf_8_counts_from_the_beginning_of_the_file(
    tmp_path: Path,
) -> None:
    (tmp_path / "a.yaml").write_bytes(b"a: 1 #" + b"x" * 30_000 + "ä".encode() * 9 + b"\xff")
    with pytest.raises(UserError, match=r"^a.yaml: not UTF-8 \(byte 30024\)"):
        strict_yaml.read(tmp_path / "a.yaml", "a.yaml")


def test_aliases_in_params_are_read_as_what_they_stand_for(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text(
        "base: minigpt\nfinetune_lora: &lora {rank: 3, epochs: 2}\nfinetune_prefix: {epochs: 2}\n"
        "finetune_dpo: {<<: *lora}\n",
        encoding="utf-8",
    )
    assert open_project(tmp_path / "params.yaml").params.finetune_dpo.rank == 3


def test_params_have_at_most_a_million_bytes(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text("#" * 1_000_001, encoding="utf-8")
    assert "params.yaml must have at most 1,000,000 bytes" in message(
        lambda: open_project(tmp_path / "params.yaml"), tmp_path
    )


def test_a_json_file_has_at_most_fifty_million_bytes(tmp_path: Path) -> None:
    with (tmp_path / "manifest.json").open("wb") as file:
        file.truncate(artifact.LARGEST_JSON + 1)
    said = message(lambda: artifact.read_manifest(tmp_path), tmp_path)
    assert "manifest.json must have at most 50,000,000 bytes" in said


@pytest.mark.parametrize("depth", [100, 400, 900, 100_000])
def test_json_nested_at_any_depth_is_one_message(tmp_path: Path, depth: int) -> None:
    toy_checkpoint(tmp_path / "m")
    config = (tmp_path / "m/config.json").read_bytes().rstrip()[:-1]
    nested = b'{"text_config":' * depth + b'{"model_type": "llama"}' + b"}" * depth
    (tmp_path / "m/config.json").write_bytes(config + b', "text_config": ' + nested + b"}")
    for reader in (
        lambda: open_model(str(tmp_path / "m/config.json")),
        lambda: skeleton(tmp_path / "m"),
    ):
        read_or_refuse(reader, tmp_path)


def test_tensors_of_a_safetensors_file_do_not_overlap(tmp_path: Path) -> None:
    """A file of 1 MB could otherwise describe terabytes, and hashing them would take days."""
    entries = {
        f"t{n}": {"dtype": "U8", "shape": [2**16], "data_offsets": [0, 2**16]}
        for n in range(10_000)
    }
    header = json.dumps(entries).encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(2**16))
    assert "its tensors overlap" in message(
        lambda: read_header(tmp_path / "a.safetensors"), tmp_path
    )


def test_a_shape_of_a_safetensors_file_has_few_dimensions(tmp_path: Path) -> None:
    """Their product would take hours."""
    sizes = ",".join([str(2**63 - 1)] * 50_000)
    header = f'{{"a":{{"dtype":"F32","shape":[{sizes}],"data_offsets":[0,0]}}}}'.encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    assert "'a' has no valid name, dtype, shape and offsets" in message(
        lambda: read_header(tmp_path / "a.safetensors"), tmp_path
    )


def test_a_gguf_header_has_at_most_256_mib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def file(entries: int) -> Path:
        pair = struct.pack("<Q", 1) + b"k" + struct.pack("<IIQ", 9, 4, 10_000) + bytes(40_000)
        path = tmp_path / "a.gguf"
        path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, entries) + pair * entries)
        return path

    assert headers.MAX_HEADER == 2**28
    monkeypatch.setattr(headers, "MAX_HEADER", 2**18)
    headers.read_gguf(file(6))
    assert "must have a header of at most 262,144 bytes" in message(
        lambda: headers.read_gguf(file(7)), tmp_path
    )
    strings = (
        struct.pack("<Q", 1)
        + b"k"
        + struct.pack("<IIQ", 9, 8, 9)
        + (struct.pack("<Q", 40_000) + bytes(40_000)) * 9
    )
    (tmp_path / "b.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + strings * 2)
    assert "must have a header of at most" in message(
        lambda: headers.read_gguf(tmp_path / "b.gguf"), tmp_path
    )


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            {"target_modules": ["q"] * (MOST_NAMES + 1)},
            "target_modules must be at most 20,000 names",
        ),
        (
            {"exclude_modules": [f"q{n}" for n in range(MOST_NAMES + 1)]},
            "exclude_modules must be at most 20,000 names",
        ),
        (
            {"rank_pattern": {f"q{n}": 1 for n in range(MOST_PATTERNS + 1)}},
            "rank_pattern must be at most 5,000 patterns",
        ),
        ({"r": 10**9}, "r must be a whole number from 1 to 1000000, got 1000000000"),
        ({"r": 10**400}, "r must be a whole number from 1 to 1000000"),
    ],
)
def test_an_adapter_names_a_limited_number_of_modules(
    tmp_path: Path, config: Any, words: str
) -> None:
    whole = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["q"], **config}
    write_json(tmp_path / "adapter_config.json", whole)
    assert words in message(lambda: read_spec(tmp_path), tmp_path)


@pytest.mark.slow
def test_an_adapter_of_as_many_patterns_as_allowed_is_read_in_time(tmp_path: Path) -> None:
    ranks = {f"layers.{n}.self_attn.q_proj": 1 for n in range(MOST_PATTERNS)}
    config = {
        "peft_type": "LORA",
        "r": 1,
        "lora_alpha": 1,
        "target_modules": ["q"],
        "rank_pattern": ranks,
    }
    write_json(tmp_path / "adapter_config.json", config)
    with limits(tmp_path):
        assert len(read_spec(tmp_path).ranks) == MOST_PATTERNS


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_a_compressed_file_unpacks_to_at_most_200_times_its_size(
    tmp_path: Path, ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(containers, "MAX_UNPACKED", 2**20)
    path = tmp_path / f"d.jsonl{ending}"
    line = json.dumps({"text": "a" * 1000}) + "\n"
    with pa.CompressedOutputStream(str(path), {".gz": "gzip", ".zst": "zstd"}[ending]) as file:
        for _ in range(4_000):
            file.write(line.encode())
    assert path.stat().st_size < 40_000
    assert "unpacks to more than 200 times its size" in message(examples(path), tmp_path)
    # 2 MiB, of half its size
    (tmp_path / "e.jsonl.gz").write_bytes(gzip.compress(os.urandom(2**20).hex().encode()))
    assert "unpacks" not in message(examples(tmp_path / "e.jsonl.gz"), tmp_path)


def test_a_parquet_column_unpacks_to_at_most_a_thousand_times_its_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert tables.MAX_COLUMN == 2**26
    monkeypatch.setattr(tables, "MAX_COLUMN", 2**20)
    path = tmp_path / "d.parquet"
    parquet.write_table(
        pa.table({"text": ["a" * 2_000_000]}), path, compression="zstd", use_dictionary=False
    )
    assert path.stat().st_size < 2_000
    said = message(examples(path), tmp_path)
    assert "d.parquet: the column text unpacks" in said and said.endswith("pandas if you trust it.")


def test_a_parquet_dictionary_has_at_most_8_mib(tmp_path: Path) -> None:
    """64 rows that refer to one entry of 30 MB would be 2 GB, from a file of a kilobyte."""
    path = tmp_path / "d.parquet"
    rows = pa.DictionaryArray.from_arrays(
        pa.array([0] * 64, pa.int32()), pa.array(["a" * 30_000_000])
    )
    parquet.write_table(
        pa.table({"text": rows}), path, compression="zstd", dictionary_pagesize_limit=10**9
    )
    assert path.stat().st_size < 5_000
    assert "must have a dictionary of at most 8,388,608 bytes, got 30,000,004" in message(
        examples(path), tmp_path
    )
    for compression in ("none", "snappy", "gzip", "zstd"):
        parquet.write_table(
            pa.table({"text": ["one", "two", "one"] * 500}), path, compression=compression
        )
        assert len(examples(path)()) == 1_500


def test_a_page_header_in_a_longer_form_is_not_read_past_the_limit(tmp_path: Path) -> None:
    """Thrift may write a field's number out, which no writer does: the size stands elsewhere."""
    path = tmp_path / "d.parquet"
    parquet.write_table(pa.table({"text": ["one", "two", "one"] * 500}), path, compression="none")
    start = parquet.read_metadata(path).row_group(0).column(0).dictionary_page_offset
    data = bytearray(path.read_bytes())
    assert data[start] == 0x15
    data[start] = 0x05
    path.write_bytes(data)
    said = message(examples(path), tmp_path)
    assert "d.parquet: not a readable parquet file: the column text is damaged" in said


def test_the_list_of_files_of_a_torch_file_has_at_most_20_million_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", b".")
    whole = bytearray(file.getvalue())
    whole[-10:-6] = struct.pack("<I", 20_000_001)  # what the end says of the list
    path.write_bytes(whole)
    assert "its list of files has 20,000,001 bytes" in message(
        lambda: torch_file.load(path), tmp_path
    )
    end = bytes(file.getvalue()[-22:])
    end64 = struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, 1, 1, 2**40, 0)
    path.write_bytes(
        file.getvalue()[:-22] + end64 + struct.pack("<4sIQI", b"PK\6\7", 0, 0, 1) + end
    )
    assert "its list of files has 1,099,511,627,776 bytes" in message(
        lambda: torch_file.load(path), tmp_path
    )


def tokenizer(folder: Path, **parts: Any) -> Path:
    folder_with(folder)
    edit_json(folder / "tokenizer.json", **parts)
    return folder


DOUBLE = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
FILL = {"type": "Replace", "pattern": {"Regex": "x*"}, "content": "aaaaaaaaa"}


@pytest.mark.parametrize(
    "parts",
    [
        {"normalizer": {"type": "Sequence", "normalizers": [DOUBLE] * 40}},
        {"normalizer": {"type": "Sequence", "normalizers": [FILL] * 4}},
        {
            "normalizer": {
                "type": "Sequence",
                "normalizers": [{"type": "Sequence", "normalizers": [DOUBLE] * 5}] * 5,
            }
        },
        {"decoder": {"type": "Sequence", "decoders": [DOUBLE] * 40}},
    ],
)
def test_a_tokenizer_lengthens_a_text_at_most_a_thousand_times(tmp_path: Path, parts: Any) -> None:
    folder = tokenizer(tmp_path, **parts)
    said = message(lambda: SubwordTokenizer.load(folder).encode("aaaa"), tmp_path)
    assert f"its {next(iter(parts))} must lengthen a text at most 1,000 times" in said


def test_a_tokenizers_pattern_that_takes_too_many_steps_is_one_message(tmp_path: Path) -> None:
    split = {
        "type": "Split",
        "pattern": {"Regex": r"(\w|.|_)*\d\d\d\d"},
        "behavior": "Isolated",
        "invert": False,
    }
    folder = tokenizer(tmp_path, pre_tokenizer=split)
    assert "its tokenizer fails: Onig: Regex search error: retry-limit-in-match over" in message(
        lambda: SubwordTokenizer.load(folder).encode("a" * 40 + "!"), tmp_path
    )


def test_patterns_of_a_task_have_ten_seconds_in_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pattern that takes just less than the limit, for each of many answers, would take hours."""
    from pipeline.evaluation.kinds import regex

    for module in (patterns, regex):
        monkeypatch.setattr(module, "BUDGET", 0.5)
    row = {"prompt": "a", "pattern": r"(\w|.|_)*\d\d\d\d"}
    write_json(tmp_path / "t.yaml", [{"name": "t", "kind": "regex", "examples": [row] * 2_000}])
    (task,) = read_tasks(tmp_path, ["t.yaml"])
    start = time.perf_counter()
    with pytest.raises(UserError, match=r"must take at most 0\.5 s"):
        for example in task.examples:
            task.score("a" * 12, example)
    assert time.perf_counter() - start < 5
