"""Checkpoints, GGUF files and MLX adapters are certified beside the adapter that they were made
from, and adapters in llama.cpp and mlx-lm.
"""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_workbench.api import ignore, play
from pipeline.adapters.config import AdapterSpec
from pipeline.certify.certify import FAILED, NOT_RUN, PASSED, Processes, certify
from pipeline.certify.engines import parse
from pipeline.certify.kinds import Checked, kind_of
from pipeline.export.formats import Export, write
from tests.conftest import Lora
from tests.helpers.bases import toy_checkpoint
from tests.helpers.checkpoints import adapter, edit_tensors
from tests.helpers.errors import user_error
from tests.helpers.json_files import read_json, write_json

SPEC = AdapterSpec(4, 8, ("q_proj", "v_proj", "down_proj"))
QUANTIZED = 0.3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, an adapter, and its merge by PEFT."""
    root = tmp_path_factory.mktemp("kinds")
    toy_checkpoint(root / "base", tie_word_embeddings=False)
    adapter(root / "adapter", root / "base", SPEC)
    base = AutoModelForCausalLM.from_pretrained(root / "base")
    merged = PeftModel.from_pretrained(base, root / "adapter").merge_and_unload()
    merged.save_pretrained(root / "merged")
    AutoTokenizer.from_pretrained(root / "base").save_pretrained(root / "merged")
    return root


@pytest.fixture(scope="module")
def processes() -> Iterator[Processes]:
    with Processes() as opened:
        yield opened


def certified(
    root: Path, path: Path, engines: str, processes: Processes, source: bool = True
) -> dict[str, Any]:
    adapter_ = root / "adapter" if source else None
    checked = Checked(path, root / "base", source=adapter_)
    return play(certify(checked, parse(engines), processes), ignore)


def test_an_adapter_in_llama_cpp_and_mlx(folder: Path, processes: Processes) -> None:
    engines = "llama.cpp,llama.cpp:q4_k_m,mlx"
    found = certified(folder, folder / "adapter", engines, processes, source=False)
    assert found["verdict"] == PASSED, found
    exact, four, mlx = found["engines"]
    assert exact["divergence"] < 1e-4 and mlx["divergence"] < 1e-6
    assert all(entry["groups_that_act"] == entry["groups"] == 6 for entry in found["engines"])
    assert exact["base_divergence"] < four["base_divergence"]
    assert abs(four["share"] - 1) < QUANTIZED and abs(exact["share"] - 1) < 1e-3
    assert "if_merged" not in exact and four["if_merged"]["codes_changed"] > 0.1


def test_a_merged_checkpoint(folder: Path, processes: Processes) -> None:
    found = certified(folder, folder / "merged", "transformers,llama.cpp,mlx", processes)
    assert found["verdict"] == PASSED and found["kind"] == "checkpoint", found
    for entry in found["engines"]:
        assert entry["groups_that_act"] == entry["groups"] == 3
        assert abs(entry["share"] - 1) < 1e-3


@pytest.mark.parametrize("form", ["gguf", "gguf-adapter", "mlx"])
def test_what_we_export(form: str, folder: Path, processes: Processes, tmp_path: Path) -> None:
    out = tmp_path / "out"
    play(write(form, Export(folder / "adapter", folder / "base"), out), ignore)
    engine = "mlx" if form == "mlx" else "llama.cpp"
    found = certified(folder, out, engine, processes)
    assert found["verdict"] == PASSED, found
    (entry,) = found["engines"]
    assert entry["groups_that_act"] == entry["groups"] >= 6
    assert abs(entry["share"] - 1) < 1e-3


Tensors = dict[str, torch.Tensor]


def _edited(change: Callable[[Tensors, Tensors], Tensors]) -> Callable[[Path, Path], None]:
    """`change` gets the merged tensors and the base's."""

    def edit(merged: Path, base: Path) -> None:
        file = merged / "model.safetensors"
        original = load_file(base / file.name)
        save_file(change(load_file(file), original), file, {"format": "pt"})

    return edit


def _half(merged: Tensors, base: Tensors) -> Tensors:
    return {name: base[name] if "layers.1." in name else merged[name] for name in merged}


def _twice(merged: Tensors, base: Tensors) -> Tensors:
    return {name: 2 * merged[name] - base[name] for name in merged}


def _without_head(merged: Tensors, _: Tensors) -> Tensors:
    return {name: value for name, value in merged.items() if name != "lm_head.weight"}


def _prefixed(merged: Tensors, _: Tensors) -> Tensors:
    return {f"base_model.{name}": value for name, value in merged.items()}


def _another_theta(merged: Path, _: Path) -> None:
    config = read_json(merged / "config.json")
    config["rope_parameters"] = {**config["rope_parameters"], "rope_theta": 123.0}
    write_json(merged / "config.json", config)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_edited(_half), "matrices have 0.00 to 0.00 times their update"),
        (_edited(_twice), "matrices have 2.00 to 2.00 times their update"),
        (_edited(lambda _, base: base), "nothing was merged"),
        (_edited(_without_head), "keys not in the files: lm_head.weight"),
        (_edited(_prefixed), "keys not in the files"),
        (_another_theta, "config.json has rope"),
    ],
    ids=["half", "twice", "nothing", "no head", "another prefix", "another base's positions"],
)
def test_a_broken_merge(
    change: Callable[[Path, Path], None],
    reason: str,
    folder: Path,
    processes: Processes,
    tmp_path: Path,
) -> None:
    broken = Path(shutil.copytree(folder / "merged", tmp_path / "broken"))
    change(broken, folder / "base")
    found = certified(folder, broken, "transformers", processes)
    assert found["verdict"] == FAILED
    said = [*found["problems"], *found["engines"][0]["problems"]]
    assert any(reason in problem for problem in said), found


def test_an_mlx_adapter_of_which_a_key_is_not_read(
    folder: Path, processes: Processes, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    play(write("mlx", Export(folder / "adapter", folder / "base"), out), ignore)
    edit_tensors(
        out,
        lambda t: {name.replace("layers.0.self_attn", "layers.0.attn"): v for name, v in t.items()},
        "adapters.safetensors",
    )
    found = certified(folder, out, "mlx", processes)
    assert found["verdict"] == FAILED
    assert any("not an adapter parameter" in problem for problem in found["problems"]), found


def test_an_engine_that_does_not_read_a_kind_is_not_run(
    folder: Path, processes: Processes, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    play(write("mlx", Export(folder / "adapter", folder / "base"), out), ignore)
    found = certified(folder, out, "peft", processes)
    assert found["engines"][0]["verdict"] == NOT_RUN and found["verdict"] == NOT_RUN


def test_the_command_needs_a_base_and_a_kind(cli: Lora, folder: Path, tmp_path: Path) -> None:
    code, _, said = cli("certify", str(folder / "merged"), cwd=tmp_path)
    assert code == 1 and "--base" in said
    assert "cannot be certified" in user_error(kind_of, tmp_path)
    assert "there is no" in user_error(kind_of, tmp_path / "none")
    assert "has no 'q4_k_m'" in user_error(parse, "peft:q4_k_m")
