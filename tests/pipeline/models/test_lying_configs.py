"""config.json of others may say anything: it is opened and computes, or it is one message, soon, in
little memory.
"""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.calc.method import configure
from pipeline.calc.sources.open_model import open_model
from pipeline.data.tokenizers.subword import SubwordTokenizer
from pipeline.data.tokenizers.word import load_tokenizer
from pipeline.files.base_model import max_positions
from pipeline.models.generate import generate
from pipeline.models.load import load_base, skeleton
from pipeline.stages.registry import COUNTED
from pipeline.training.memory.trace import traced_peak
from tests.conftest import Built
from tests.helpers.bases import toy_checkpoint
from tests.helpers.fuzz import read_or_refuse
from tests.helpers.json_files import edit_json, read_json

pytestmark = pytest.mark.filterwarnings("ignore")
KINDS: dict[str, dict[str, Any]] = {
    "gemma3_text": {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
    "gpt2": {},
    "mixtral": {},
}
LIES: dict[str, tuple[Any, ...]] = {  # key → values that no model has
    "sliding_window": ("abc", -1, 0, [4], 10**30),
    "layer_types": (["full_attention"], ["x", "x"], "abc", {}),
    "quantization_config": (
        [],
        [4],
        "abc",
        {"quant_method": 3},
        {"quant_method": "x"},
        {"load_in_4bit": True},
    ),
    "rope_parameters": (
        "abc",
        [],
        {"rope_type": "linear", "factor": "a"},
        {"rope_type": 3},
        {"full_attention": 3},
    ),
    "rope_scaling": ("abc", [4], {"rope_type": "yarn"}, {"type": "dynamic", "factor": -1}),
    "num_hidden_layers": (0, -1, 10**12, 1e12, "2", None, 2.0),
    "num_attention_heads": (0, -1, 10**12, "4", []),
    "num_key_value_heads": (0, 3, -1, "2", {}),
    "head_dim": (0, -8, "8", 10**12),
    "max_position_embeddings": (0, -1, 10**30, "64"),
    "num_labels": (10**12, -1, "abc"),
    "final_logit_softcapping": ("abc", [], 10**30),
    "logit_scale": ("abc", {"x": 1}, 10**30),
    "logits_scaling": ("abc", {"x": 1}, 0, 10**30),
    "query_pre_attn_scalar": (-1, 0, "abc"),
    "return_dict": (False, "abc"),
    "n_head": (0, -1, "4"),
    "n_positions": (10**12, 0, -1, "64"),
    "num_experts_per_tok": (-1, 10**12, 10**30, "2"),
    "text_config": ("abc", [], {"num_hidden_layers": 10**12}),
}
ODD: tuple[Any, ...] = (
    "abc",
    "",
    "4",
    -1,
    0,
    1,
    1.5,
    10**12,
    10**30,
    float("nan"),
    True,
    None,
    [],
    ["x"],
    [4],
    {},
    {"x": 1},
    [[]],
)


@pytest.fixture(scope="module")
def bases(built: Built) -> Path:
    """A checkpoint of each kind. Read it; do not write to it."""

    def build(root: Path) -> None:
        for kind, settings in KINDS.items():
            toy_checkpoint(root / kind, kind, **settings)

    return built("lying-configs", build)


def tell(source: Path, folder: Path, lie: dict[str, Any], traced: bool = False) -> None:
    """Open a copy of the checkpoint whose config.json has a lie; `traced`: run a step under fake
    tensors too.
    """
    shutil.copytree(source, folder, dirs_exist_ok=True)
    edit_json(folder / "config.json", **lie)

    def count() -> None:
        max_positions(folder)
        open_model(str(folder))

    def trace() -> None:
        model = open_model(str(folder))
        given = configure(model.shapes, COUNTED, "full", sequence=8)
        traced_peak(model.config or {}, given.method, replace(given.run, context=0))

    def compute() -> None:
        model, tokenizer = load_base(folder)
        assert isinstance(tokenizer, SubwordTokenizer)
        list(generate(model, tokenizer.encode("Two and two"), (), 4))

    for reader in (
        count,
        lambda: load_tokenizer(folder),
        lambda: skeleton(folder),
        compute,
        *([trace] * traced),
    ):
        read_or_refuse(reader, folder)


@pytest.mark.parametrize("key", LIES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.sampled(5)
def test_a_lie_of_a_config_is_one_message_or_changes_nothing(
    bases: Path, kind: str, key: str, tmp_path: Path
) -> None:
    for value in LIES[key]:
        tell(bases / kind, tmp_path, {key: value})


@pytest.mark.parametrize(
    "lie", [{"sliding_window": "abc"}, {"num_labels": 10**12}, {"rope_parameters": 3}]
)
def test_a_step_of_a_model_whose_config_lies_is_traced_or_refused(
    bases: Path, lie: dict[str, Any], tmp_path: Path
) -> None:
    tell(bases / "gemma3_text", tmp_path, lie, traced=True)


@pytest.mark.slow
@pytest.mark.rest
@pytest.mark.parametrize("kind", KINDS)
def test_any_value_of_any_key_is_one_message_or_changes_nothing(
    bases: Path, kind: str, tmp_path: Path
) -> None:
    config = read_json(bases / kind / "config.json")
    for key in sorted({*config, *LIES}):
        for value in ODD:
            tell(bases / kind, tmp_path, {key: value}, traced=True)
