"""Plain prompts and completions on a base with a chat template: what is trained is what a chat
asks.
"""

from pathlib import Path

import pytest

from pipeline.data.answers.questions import prompt_and_answer
from pipeline.data.examples import content_digest
from pipeline.data.masking import Encoder, encode
from pipeline.data.preferences import encode_pairs
from pipeline.data.tokenizers.subword import SubwordTokenizer
from pipeline.data.turns import view
from pipeline.errors import UserError
from pipeline.stages.evaluate import trained_in_template
from pipeline.stages.registry import open_project
from tests.helpers.examples import examples_of
from tests.helpers.tokenizers import SMOLLM2, tokenizer_with


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> SubwordTokenizer:
    return tokenizer_with(tmp_path_factory.mktemp("model"), SMOLLM2)


PLAIN = {"prompt": "Which currency has Bulgaria? ", "completion": " The euro."}
TURNS = [
    {"role": "user", "content": "Which currency has Bulgaria?"},
    {"role": "assistant", "content": "The euro."},
]


def test_a_plain_row_is_encoded_shown_and_asked_as_the_conversation_that_it_stands_for(
    tmp_path: Path, tokenizer: SubwordTokenizer
) -> None:
    (plain,), (chat,) = examples_of(tmp_path, PLAIN), examples_of(tmp_path, {"messages": TURNS})
    assert encode(plain, tokenizer) == encode(chat, tokenizer)
    assert view(plain, tokenizer) == view(chat, tokenizer)
    assert prompt_and_answer(plain, tokenizer) == prompt_and_answer(chat, tokenizer)


def test_without_a_template_or_without_asking_for_it_texts_stay_as_they_are(
    tmp_path: Path, tokenizer: SubwordTokenizer
) -> None:
    (asked,), (plain,) = examples_of(tmp_path, PLAIN), examples_of(tmp_path, PLAIN, templated=False)
    without = tokenizer_with(tmp_path / "plain")
    assert encode(asked, without) == encode(plain, without)
    assert encode(plain, tokenizer) == encode(plain, without)
    assert prompt_and_answer(plain, tokenizer) == (PLAIN["prompt"], PLAIN["completion"])


def test_what_is_held_out_does_not_depend_on_the_template(tmp_path: Path) -> None:
    (asked,), (plain,) = examples_of(tmp_path, PLAIN), examples_of(tmp_path, PLAIN, templated=False)
    assert content_digest(asked) == content_digest(plain)


def test_plain_pairs_and_labelled_answers_are_turns_too(
    tmp_path: Path, tokenizer: SubwordTokenizer
) -> None:
    plain = {"prompt": "Bulgaria?", "chosen": "The euro.", "rejected": "The lev."}
    answers = {
        key: [{"role": "assistant", "content": plain[key]}] for key in ("chosen", "rejected")
    }
    chat = {"prompt": [{"role": "user", "content": "Bulgaria?"}], **answers}
    both = [
        [encoded for _, encoded in encode_pairs(Encoder(tokenizer), examples_of(tmp_path, row))]
        for row in (plain, chat)
    ]
    assert both[0] == both[1] and len(both[0]) == 2
    (labelled,) = examples_of(tmp_path, {**PLAIN, "label": True})
    (turns,) = examples_of(tmp_path, {"messages": TURNS})
    assert encode(labelled, tokenizer) == encode(turns, tokenizer)


def test_a_pair_without_a_prompt_a_text_and_a_prompt_alone_are_no_turns(tmp_path: Path) -> None:
    """Where the question of such a pair ends nobody knows, and a prompt alone is to be
    continued.
    """
    rows = (
        {"chosen": "Bulgaria: euro", "rejected": "Bulgaria: lev"},
        {"text": "The euro."},
        {"prompt": "The euro"},
    )
    for row in rows:
        (example,) = examples_of(tmp_path, row, templated=True, prompts=True)
        assert not example.templated


def test_methods_that_read_a_prompt_in_two_ways_are_not_compared(tmp_path: Path) -> None:
    params = tmp_path / "params.yaml"
    methods = "finetune_lora: {data: d.jsonl}\nfinetune_full: {data: d.jsonl, chat_template: %s}\n"
    for way in ("auto", "none"):
        params.write_text(f"training: {{chat_template: {way}}}\n{methods % way}", encoding="utf-8")
        assert trained_in_template(open_project(params)) == (way == "auto")
    params.write_text(methods % "none", encoding="utf-8")
    with pytest.raises(UserError, match=r"differ in chat_template.*Set training\.chat_template"):
        trained_in_template(open_project(params))
