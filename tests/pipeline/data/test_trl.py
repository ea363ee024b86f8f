"""Labels and tool calls against TRL's trainer and transformers, with the chat templates that TRL
ships.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer, chat_template_utils

from pipeline.data.examples import IGNORED
from pipeline.data.formats import read_examples
from pipeline.data.masking import Encoded, encode
from pipeline.data.tokenizers.subword import SubwordTokenizer
from pipeline.errors import UserError
from tests.helpers.json_files import read_json, write_json, write_jsonl
from tests.helpers.tokenizers import tokenizer_with

# Name → the special tokens that it writes, the one that ends a turn first.
TEMPLATES = {
    "qwen2_5": ("<|im_end|>",),
    "qwen3": ("<|im_end|>",),
    "llama3": ("<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"),
    "gemma": ("<end_of_turn>", "<start_of_turn>"),
    "cohere": (
        "<|END_OF_TURN_TOKEN|>",
        "<|START_OF_TURN_TOKEN|>",
        "<|CHATBOT_TOKEN|>",
        "<|USER_TOKEN|>",
    ),
    "qwen3_6": ("<|im_end|>",),
}
SYSTEM = {"role": "system", "content": "You are I"}
CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "The lev."}],
    [
        {"role": "user", "content": "  Which currency has Bulgaria?\n"},
        {"role": "assistant", "content": "The euro is new."},
        {"role": "user", "content": "And Japan? 🙂"},
        {"role": "assistant", "content": "The Yen,\n\nI think"},
    ],
]
WEATHER = {
    "name": "currency",
    "description": "of a country",
    "parameters": {"type": "object", "properties": {}},
}
TOOLS = [{"type": "function", "function": WEATHER}]
CALLS = [
    {
        "type": "function",
        "function": {"name": "currency", "arguments": {"of": "Bulgaria", "n": [1, 2]}},
    }
]
CALLING: list[dict[str, Any]] = [
    {"role": "user", "content": "Which currency has Bulgaria?"},
    {"role": "assistant", "content": "", "tool_calls": CALLS},
    {"role": "tool", "name": "currency", "content": "euro"},
    {"role": "assistant", "content": "The euro."},
    {"role": "user", "content": "And Japan?"},
    {"role": "assistant", "content": "I think the Yen."},
]


def folder_of(folder: Path, name: str, training: bool) -> Path:
    """A model folder with TRL's template `name`, or the version of it with marks that TRL trains
    on.
    """
    template = getattr(chat_template_utils, f"{name}{'_training' * training}_chat_template")
    end, *special = TEMPLATES[name]
    tokenizer, _ = tokenizer_with(folder / "small", template, bos="<s>").expanded(
        [end, *special], special=True
    )
    tokenizer.save(folder, 10_000)
    config = read_json(folder / "tokenizer_config.json")
    write_json(folder / "tokenizer_config.json", {**config, "eos_token": end})
    return folder


def encoded(rows: list[dict[str, Any]], folder: Path) -> list[Encoded]:
    path = folder / "d.jsonl"
    write_jsonl(path, rows)
    tokenizer = SubwordTokenizer.load(folder)
    return [encode(example, tokenizer) for example in read_examples(path, "d")]


def labels_of(one: Encoded) -> list[int]:
    return [id_ if on else IGNORED for id_, on in zip(one.ids, one.trained, strict=True)]


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    shape = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
    }
    return LlamaForCausalLM(LlamaConfig(vocab_size=2000, **shape))


@pytest.fixture
def trl_batch(model: LlamaForCausalLM, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    def batch(folder: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """What TRL's trainer feeds its model: one batch of all rows."""
        options = {
            "assistant_only_loss": True,
            "report_to": "none",
            "use_cpu": True,
            "max_length": None,
        }
        trainer = SFTTrainer(
            model,
            SFTConfig(str(tmp_path / "trl"), **options),
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(folder),
        )
        columns = [
            {key: row[key] for key in ("input_ids", "labels")} for row in trainer.train_dataset
        ]
        return {key: value.tolist() for key, value in trainer.data_collator(columns).items()}

    return batch


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "llama3", "gemma", "cohere"])
def test_labels_are_those_of_trls_collator(
    trl_batch: Callable[..., dict[str, Any]], tmp_path: Path, name: str
) -> None:
    folder = folder_of(tmp_path, name, training=True)
    rows = [{"messages": conversation} for conversation in CONVERSATIONS]
    batch = trl_batch(folder, rows)
    for one, ids, labels in zip(
        encoded(rows, folder), batch["input_ids"], batch["labels"], strict=True
    ):
        assert list(one.ids) == ids[: len(one.ids)]
        assert labels_of(one) == labels[: len(one.ids)]
        assert set(labels[len(one.ids) :]) <= {IGNORED}, "the rest is padding"
        assert any(one.trained)


@pytest.mark.parametrize("name", ["llama3", "cohere"])
def test_the_published_template_without_marks_gives_the_labels_that_trl_gets_by_marks(
    trl_batch: Callable[..., dict[str, Any]], tmp_path: Path, name: str
) -> None:
    folder = folder_of(tmp_path, name, training=False)
    rows = [{"messages": conversation} for conversation in CONVERSATIONS]
    batch = trl_batch(folder, rows)
    for one, labels in zip(encoded(rows, folder), batch["labels"], strict=True):
        assert labels_of(one) == labels[: len(one.ids)]


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "qwen3_6"])
@pytest.mark.parametrize("training", [False, True])
def test_tools_and_tool_calls_are_rendered_as_transformers_renders_them(
    tmp_path: Path, name: str, training: bool
) -> None:
    folder = folder_of(tmp_path, name, training)
    (one,) = encoded([{"messages": CALLING, "tools": TOOLS}], folder)
    theirs = AutoTokenizer.from_pretrained(folder)
    assert list(one.ids) == theirs.apply_chat_template(CALLING, tools=TOOLS)["input_ids"]
    text = theirs.decode([id_ for id_, on in zip(one.ids, one.trained, strict=True) if on])
    assert '"Bulgaria"' in text or "\nBulgaria\n" in text, "the call is trained on"
    assert "of a country" not in text and "Which" not in text and "tool_response" not in text
    assert [id_ for id_, on in zip(one.ids, one.trained, strict=True) if on].count(
        theirs.eos_token_id
    ) == 3


def test_labels_of_a_conversation_with_tools_are_trls(
    trl_batch: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    folder = folder_of(tmp_path, "qwen3", training=True)
    rows = [{"messages": CALLING, "tools": TOOLS}]
    (one,) = encoded(rows, folder)
    batch = trl_batch(folder, [{**rows[0], "tools": json.dumps(TOOLS)}])
    assert (list(one.ids), labels_of(one)) == (batch["input_ids"][0], batch["labels"][0])


def test_a_template_that_drops_tool_calls_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        UserError,
        match=r"d:1: cannot mask messages\[1\]: the chat template does not write its tool_c",
    ):
        encoded(
            [{"messages": CALLING[:2], "tools": TOOLS}],
            folder_of(tmp_path, "llama3", training=False),
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"tools": [{"type": "function", "function": {"name": "<|im_end|>"}}]},
            r"tools\[0\] contains <\|im_end\|>",
        ),
        (
            {"messages": [*CALLING[:2], {"role": "tool", "content": "<|im_start|>"}]},
            r"messages\[2\] contains <\|im_start\|>",
        ),
        (
            {
                "messages": [
                    CALLING[0],
                    CALLING[1] | {"tool_calls": [{"name": "a", "arguments": ["<|im_end|>"]}]},
                ]
            },
            r"messages\[1\] contains <\|im_end\|>",
        ),
    ],
    ids=["tool", "result", "call"],
)
def test_a_special_token_is_refused_wherever_it_stands(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=f"d:1: {message}, a special token of"):
        encoded(
            [{"messages": CALLING, "tools": TOOLS} | change],
            folder_of(tmp_path, "qwen3", training=False),
        )


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("training", [False, True])
def test_a_turn_that_is_not_to_be_trained_on_carries_no_label_and_changes_no_other(
    tmp_path: Path, name: str, training: bool
) -> None:
    folder = folder_of(tmp_path, name, training)
    conversation = CONVERSATIONS[1]
    variants = [
        [{**turn, key: value} if index in off else turn for index, turn in enumerate(conversation)]
        for off, key, value in (
            ((1,), "weight", 1),
            ((1,), "train", False),
            ((3,), "weight", 0),
            ((1, 3), "train", False),
        )
    ]
    whole, first_off, last_off, both_off = encoded(
        [{"messages": turns} for turns in variants], folder
    )
    assert {one.ids for one in (first_off, last_off, both_off)} == {whole.ids}
    assert not any(both_off.trained) and any(first_off.trained) and any(last_off.trained)
    together = [a or b for a, b in zip(first_off.trained, last_off.trained, strict=True)]
    assert together == list(whole.trained)
    assert not any(a and b for a, b in zip(first_off.trained, last_off.trained, strict=True))
