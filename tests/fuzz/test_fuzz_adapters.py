"""Adapter folders of others: adapter_config.json, tensors, the files of other tools, and
torch.save's.
"""

import io
import json
import shutil
import zipfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import strategies as st
from safetensors.torch import load_file, save

from pipeline.adapters.attach import targeted
from pipeline.adapters.config import AdapterSpec, read_spec
from pipeline.adapters.folder import base_of
from pipeline.models.load import skeleton
from pipeline.weights import torch_file
from pipeline.weights.import_adapter import import_adapter
from tests.conftest import Built
from tests.helpers.bases import toy_checkpoint
from tests.helpers.checkpoints import adapter
from tests.helpers.fuzz import (
    NUMBERS,
    ODD,
    PATTERNS,
    as_json,
    changed,
    damaged,
    fuzz,
    json_files,
    read_or_refuse,
)
from tests.helpers.json_files import read_json

GIT = ["subprocess.Popen"]  # asked for the commit, once
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
SPEC = AdapterSpec(2, 4.0, ("q_proj", "v_proj"), saved=("norm",), rows={"embed_tokens": (3, 5)})
CONFIG: dict[str, Any] = {
    **{
        "peft_type": "LORA",
        "bias": "none",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "base",
        "r": 2,
    },
    **{
        "lora_alpha": 4,
        "use_rslora": False,
        "use_dora": False,
        "rank_pattern": {"layers.0": 3},
        "alpha_pattern": {},
    },
    **{"lora_dropout": 0.0, "fan_in_fan_out": False, "init_lora_weights": True, "revision": None},
    **{
        "target_modules": ["q_proj", "v_proj"],
        "exclude_modules": "never",
        "layers_to_transform": [0, 1],
    },
    **{"layers_pattern": ["layers"], "modules_to_save": ["norm"], "target_parameters": None},
    **{
        "trainable_token_indices": {"embed_tokens": [3, 5]},
        "inference_mode": True,
        "ensure_weight_tying": False,
    },
}
VALUES = st.one_of(
    ODD, st.sampled_from((*PATTERNS, "all-linear", ".*", "q_proj")), st.sampled_from(NUMBERS)
)


@pytest.fixture(scope="module")
def folders(built: Built) -> Path:
    """A toy Llama, and adapters on it as PEFT and other tools write them. Read it; do not write to
    it.
    """

    def build(root: Path) -> None:
        toy_checkpoint(root / "base")
        adapter(root / "peft", root / "base", SPEC)
        for tool, files in FOREIGN.items():
            (root / tool).mkdir()
            for name, write in files.items():
                (root / tool / name).write_bytes(write())

    return built("fuzz-adapters", build)


@fuzz("adapter configs", config=json_files(CONFIG, VALUES))
def test_configs(folder: Path, folders: Path, config: bytes) -> None:
    (folder / "adapter_config.json").write_bytes(config)
    (folder / "base").mkdir()

    def look() -> None:
        spec = read_spec(folder)
        base_of(folder)
        targeted(skeleton(folders / "base"), spec)

    read_or_refuse(look, folder)


def tensor(*shape: int) -> torch.Tensor:
    return torch.ones(shape) / 8


D, R = 32, 2
MLX = {
    "model.layers.0.self_attn.q_proj.lora_a": tensor(D, R),
    "model.layers.0.self_attn.q_proj.lora_b": tensor(R, D),
}
MLX_CONFIG = {
    "model": "org/toy",
    "num_layers": 2,
    "lora_parameters": {"rank": R, "scale": 1.5},
    "fine_tune_type": "lora",
}
LITGPT = {
    "transformer.h.0.attn.qkv.lora_A": tensor(2 * R, D),
    "transformer.h.0.attn.qkv.lora_B": tensor(D + D // 2, R),
    "transformer.h.1.mlp.proj.lora_A": tensor(R, 48),
    "transformer.h.1.mlp.proj.lora_B": tensor(D, R),
}
LITGPT_CONFIG = {
    "lora_r": R,
    "lora_alpha": 4,
    "lora_query": True,
    "lora_key": False,
    "lora_value": True,
}
TORCHTUNE = {
    "layers.0.attn.q_proj.lora_a.weight": tensor(R, D),
    "layers.0.attn.q_proj.lora_b.weight": tensor(D, R),
}


def torch_saved(value: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


FOREIGN: dict[str, dict[str, Any]] = {
    "mlx": {
        "adapters.safetensors": lambda: save(MLX),
        "adapter_config.json": lambda: as_json(MLX_CONFIG),
    },
    "litgpt": {
        "lit_model.pth.lora": lambda: torch_saved(LITGPT),
        "hyperparameters.yaml": lambda: yaml.safe_dump(LITGPT_CONFIG).encode(),
    },
    "torchtune": {
        "adapter_model.pt": lambda: torch_saved(TORCHTUNE),
        "adapter_config.json": lambda: as_json(
            {"r": R, "lora_alpha": 4, "base_model_name_or_path": "org/toy"}
        ),
    },
}


@pytest.mark.parametrize("tool", ["peft", *FOREIGN])
def test_the_seeds_are_imported(folders: Path, tool: str, tmp_path: Path) -> None:
    assert (
        read_or_refuse(
            lambda: import_adapter(folders / tool, folders / "base", tmp_path / "out"),
            tmp_path,
            may=GIT,
        )
        is None
    )


@st.composite
def peft_tensors(draw: st.DrawFn) -> list[tuple[str, int, tuple[int, ...]]]:
    """Changes of the tensors: (how, which, a shape)."""
    how = st.sampled_from(("drop", "shape", "rename", "nan", "dtype", "twice"))
    shape = st.lists(st.sampled_from((0, 1, 2, 3, 31, 32, 320)), max_size=3).map(tuple)
    return draw(st.lists(st.tuples(how, st.integers(0, 50), shape), max_size=2))


NAMES = (
    "base_model.model." * 3,
    "\x1b[2J.lora_A.weight",
    "model.layers.99999.self_attn.q_proj.lora_A.weight",
    "a.b" * 900,
)


def with_changes(
    tensors: dict[str, torch.Tensor], changes: list[tuple[str, int, tuple[int, ...]]]
) -> bytes:
    tensors = dict(tensors)
    for how, which, shape in changes:
        name = sorted(tensors)[which % len(tensors)]
        match how:
            case "drop" if len(tensors) > 1:
                del tensors[name]
            case "shape":
                tensors[name] = torch.ones(shape)
            case "rename":
                tensors[NAMES[which % len(NAMES)]] = tensors.pop(name)
            case "nan":
                tensors[name] = torch.full(shape, float("nan"))
            case "dtype":
                tensors[name] = tensors[name].to(
                    (torch.int64, torch.float64, torch.bool, torch.bfloat16)[which % 4]
                )
            case _:
                tensors[name.replace("base_model.model.", "")] = tensors[name].clone()
    return save(tensors)


@fuzz("adapters of PEFT", config=st.none() | json_files(CONFIG, VALUES), changes=peft_tensors())
def test_adapters_of_peft(folder: Path, folders: Path, config: bytes | None, changes: Any) -> None:
    shutil.copytree(folders / "peft", folder / "theirs")
    if config is not None:
        (folder / "theirs/adapter_config.json").write_bytes(config)
    weights = folder / "theirs/adapter_model.safetensors"
    weights.write_bytes(with_changes(load_file(weights), changes))
    read_or_refuse(
        lambda: import_adapter(folder / "theirs", folders / "base", folder / "out"), folder, may=GIT
    )


SCALARS = st.one_of(ODD, st.sampled_from(NUMBERS))


@st.composite
def foreign_files(draw: st.DrawFn) -> tuple[str, str, bytes]:
    """(tool, file, its new bytes)."""
    tool = draw(st.sampled_from(sorted(FOREIGN)))
    name = draw(st.sampled_from(sorted(FOREIGN[tool])))
    match name.rpartition(".")[2]:
        case "json":
            return tool, name, draw(json_files(json.loads(FOREIGN[tool][name]()), SCALARS))
        case "yaml":
            new = draw(
                changed(LITGPT_CONFIG, SCALARS).map(lambda tree: as_json(tree))
                | damaged(FOREIGN[tool][name]())
            )
            return tool, name, new
        case "safetensors":
            return tool, name, with_changes(MLX, draw(peft_tensors()))
        case _:
            tensors = LITGPT if tool == "litgpt" else TORCHTUNE
            return (
                tool,
                name,
                draw(
                    st.one_of(
                        damaged(FOREIGN[tool][name]()),
                        peft_tensors().map(
                            lambda changes: torch_saved(_as_tensors(with_changes(tensors, changes)))
                        ),
                    )
                ),
            )


def _as_tensors(data: bytes) -> dict[str, torch.Tensor]:
    from safetensors.torch import load

    return load(data)


@fuzz("adapters of other tools", drawn=foreign_files())
def test_adapters_of_other_tools(
    folder: Path, folders: Path, drawn: tuple[str, str, bytes]
) -> None:
    tool, name, data = drawn
    shutil.copytree(folders / tool, folder / "theirs")
    (folder / "theirs" / name).write_bytes(data)
    read_or_refuse(
        lambda: import_adapter(folder / "theirs", folders / "base", folder / "out"), folder, may=GIT
    )


@cache
def saved() -> bytes:
    return torch_saved({"model": {"a": tensor(3, 4), "b": tensor(5)}})


@cache
def program() -> bytes:
    """Its pickle."""
    with zipfile.ZipFile(io.BytesIO(saved())) as archive:
        return archive.read("archive/data.pkl")


def _zipped(pickle: bytes) -> bytes:
    """The same file with another pickle."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(saved())) as source, zipfile.ZipFile(file, "w") as target:
        for entry in source.infolist():
            target.writestr(
                entry.filename,
                pickle if entry.filename.endswith("data.pkl") else source.read(entry),
            )
    return file.getvalue()


@st.composite
def programs(draw: st.DrawFn) -> bytes:
    """A pickle of drawn instructions: most are wrong, all are parsed."""
    parts = st.one_of(
        st.sampled_from(
            (
                b"(",
                b"}",
                b"]",
                b")",
                b"N",
                b"\x88",
                b"u",
                b"s",
                b"a",
                b"e",
                b"t",
                b"\x85",
                b"\x86",
                b"R",
                b"b",
            )
        ),
        st.sampled_from(
            (
                b"ctorch._utils\n_rebuild_tensor_v2\n",
                b"ccollections\nOrderedDict\n",
                b"cos\nsystem\n",
            )
        ),
        st.sampled_from(
            (
                b"ctorch\nFloatStorage\n",
                b"X\x07\0\0\0storage",
                b"X\x01\0\0\x000",
                b"X\x03\0\0\0cpu",
                b"Q",
            )
        ),
        st.integers(0, 255).map(lambda n: b"K" + bytes([n])),
        st.integers(0, 2**64).map(lambda n: b"\x8a\x09" + n.to_bytes(9, "little")),
        st.integers(0, 9).map(lambda n: b"q" + bytes([n])),
        st.integers(0, 9).map(lambda n: b"h" + bytes([n])),
        st.sampled_from(
            (
                b"\x8a\xff" + b"\x7f" * 255,
                b"I" + b"9" * 5_000 + b"\n",
                b"V" + b"x" * 10 + b"\n",
                b"2",
                b"0",
                b"1",
            )
        ),
    )
    return b"\x80\x02" + b"".join(draw(st.lists(parts, max_size=40))) + b"."


@fuzz(
    "torch files",
    data=st.deferred(
        lambda: st.one_of(
            damaged(saved()), damaged(program()).map(_zipped), programs().map(_zipped)
        )
    ),
)
def test_torch_files(folder: Path, data: bytes) -> None:
    (folder / "adapter_model.bin").write_bytes(data)
    read_or_refuse(lambda: torch_file.load(folder / "adapter_model.bin"), folder)


def test_the_torch_file_is_read(tmp_path: Path) -> None:
    for data in (saved(), _zipped(program())):
        (tmp_path / "a.pt").write_bytes(data)
        assert read_or_refuse(lambda: torch_file.load(tmp_path / "a.pt"), tmp_path) is None


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"base_model_name_or_path": "x" * 5_000}, "as its base, but there is no such folder"),
        ({"base_model_name_or_path": "org/name", "revision": 7}, ""),
    ],
)
def test_what_search_has_found_in_configs(
    folders: Path, values: Any, words: str, tmp_path: Path
) -> None:
    shutil.copytree(folders / "peft", tmp_path / "theirs")
    path = tmp_path / "theirs/adapter_config.json"
    path.write_bytes(as_json(read_json(path) | values))
    if words:
        assert words in (read_or_refuse(lambda: base_of(tmp_path / "theirs"), tmp_path) or "")
    said = read_or_refuse(
        lambda: import_adapter(tmp_path / "theirs", folders / "base", tmp_path / "out"),
        tmp_path,
        may=GIT,
    )
    assert said is None


def test_what_search_has_found_in_tensors(folders: Path, tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    whole = {
        name: value.to(torch.int64) if name.endswith("a") else value for name, value in MLX.items()
    }
    (tmp_path / "theirs/adapters.safetensors").write_bytes(save(whole))
    (tmp_path / "theirs/adapter_config.json").write_bytes(as_json(MLX_CONFIG))
    said = read_or_refuse(
        lambda: import_adapter(tmp_path / "theirs", folders / "base", tmp_path / "out"), tmp_path
    )
    assert said is not None and "must hold floating point numbers, got int64" in said
