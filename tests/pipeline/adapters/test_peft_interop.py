"""Adapters to and from PEFT: every family, every option of LoRA that ours has, both ways."""

import copy
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model

from pipeline.adapters.attach import tensors
from pipeline.adapters.config import AdapterSpec
from pipeline.adapters.peft import load_adapter, save_adapter
from pipeline.models.transformers_model import TransformersModel
from tests.helpers.checkpoints import token_ids
from tests.helpers.real import ROWS, stock, toy
from tests.helpers.side_by_side import randomized

NAMES = {
    "llama": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "qwen3": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "gemma": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "gpt2": ("c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"),
    "opt": ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
    "mixtral": ("q_proj", "k_proj", "v_proj", "o_proj"),
}
IDS = token_ids(ROWS, 3, 9)
RANKS, ALPHAS = st.integers(1, 5), st.sampled_from((1, 3.5, 8))


@st.composite
def options(draw: st.DrawFn, names: tuple[str, ...], model: TransformersModel) -> dict[str, Any]:
    """LoraConfig's arguments."""
    some = draw(st.lists(st.sampled_from(names), min_size=1, unique=True))
    pattern = rf".*\.({'|'.join(name.replace('.', '[.]') for name in some)})"
    # PEFT adapts experts too
    whole = () if "mixtral" in type(model._model[0]).__name__.lower() else ("all-linear",)
    # PEFT sorts patterns as it writes them, and reads another rank if two mean a module
    one = rf".*\.1\..*{some[0]}"
    chosen: dict[str, Any] = {
        "r": draw(RANKS),
        "lora_alpha": draw(ALPHAS),
        "use_rslora": draw(st.booleans()),
        "use_dora": draw(st.booleans()),
        "init_lora_weights": draw(st.sampled_from((True, False, "gaussian"))),
        "target_modules": draw(st.sampled_from((some, pattern, *whole))),
        "rank_pattern": draw(st.dictionaries(st.sampled_from((one, *some[1:])), RANKS, max_size=2)),
        "alpha_pattern": draw(st.dictionaries(st.sampled_from(some), ALPHAS, max_size=2)),
    }
    if isinstance(chosen["target_modules"], list) and draw(st.booleans()):
        chosen["layers_to_transform"] = draw(st.sampled_from((1, [0], [0, 1])))
    elif len(some) > 1 and draw(st.booleans()):
        chosen["exclude_modules"] = draw(st.sampled_from(([some[0]], rf".*\.{some[0]}")))
    embedding, head = model.embedding_and_head
    rows = draw(st.lists(st.integers(0, ROWS - 1), min_size=1, max_size=4, unique=True))
    ends: list[dict[str, Any]] = [
        {},
        {"trainable_token_indices": rows},
        {"trainable_token_indices": {embedding: rows}},
        {"trainable_token_indices": {embedding: rows, head: rows}},
        {"modules_to_save": [embedding, head]},
        {"modules_to_save": [head]},
    ]
    if not model.shape.tied:
        ends.append({"trainable_token_indices": {embedding: rows, head: rows[:1]}})
    # ours is of linears alone
    if isinstance(chosen["target_modules"], list) and not chosen["use_dora"]:
        ends += [
            {"target_modules": [*some, embedding]},
            {"target_modules": [*some, embedding, head]},
        ]
    return {**chosen, **draw(st.sampled_from(ends))}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", NAMES)
@pytest.mark.sampled(5)
def test_an_adapter_goes_from_peft_to_here_and_back_with_the_same_logits(
    family: str, tied: bool
) -> None:
    base = toy(family, std=0.1, tie_word_embeddings=tied)

    @settings(max_examples=6, deadline=None)
    @given(options(NAMES[family], base))
    def there_and_back(chosen: dict[str, Any]) -> None:
        torch.manual_seed(0)  # of PEFT's initialization: the same weights whatever test ran before
        with tempfile.TemporaryDirectory() as scratch:
            first, second = Path(scratch, "first"), Path(scratch, "second")
            theirs = randomized(
                get_peft_model(stock(base), LoraConfig(task_type="CAUSAL_LM", **chosen))
            )
            theirs.save_pretrained(first)
            ours = copy.deepcopy(base)
            spec = load_adapter(ours, Path("base"), first)
            assert isinstance(spec, AdapterSpec)
            assert_same(ours, theirs)
            second.mkdir()
            save_adapter(second, ours, spec, "base")
            assert tensors(ours, spec)
            assert_same(ours, PeftModel.from_pretrained(stock(base), second))

    there_and_back()


@torch.no_grad()
def assert_same(ours: TransformersModel, theirs: Any) -> None:
    torch.testing.assert_close(
        ours.eval()(IDS), theirs.eval()(input_ids=IDS).logits, atol=1e-4, rtol=1e-4
    )
