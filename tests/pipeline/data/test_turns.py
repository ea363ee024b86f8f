"""A row as its turns: the text that the model reads, and in it what the encoder trains on."""

from pathlib import Path
from typing import Any

import pytest

from pipeline.data.containers import Row
from pipeline.data.examples import Example
from pipeline.data.formats import example_of
from pipeline.data.masking import Encoder
from pipeline.data.tokenizers.word import Tokenizer, WordTokenizer
from pipeline.data.turns import Turn, View, view
from tests.helpers.tokenizers import ASKS, HEADS, MARKED, PLAIN, SMOLLM2, THINKS, tokenizer_with

TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Where is Sofia?"},
    {"role": "assistant", "content": "In the west."},
    {"role": "user", "content": "And Varna?"},
    {"role": "assistant", "content": "By the sea äöü."},
]
ROWS: dict[str, Any] = {
    "text": {"text": "The euro. The lev."},
    "prompt": {"prompt": "The currency is", "completion": " the euro"},
    "messages": {"messages": TURNS},
    "untrained": {"messages": [*TURNS[:2], {**TURNS[2], "train": False}, *TURNS[3:]]},
    "chat prompt": {"prompt": TURNS[:4], "completion": TURNS[4:]},
}


def example(record: Any) -> Example:
    return example_of(Row(1, record), "f.jsonl")


def texts(shown: View, kind: str = "") -> str:
    return "".join(text for turn in shown.turns for each, text in turn.parts if kind in ("", each))


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("template", [SMOLLM2, MARKED, THINKS], ids=["smollm2", "marked", "thinks"])
def test_the_mask_is_the_encoders(tmp_path: Path, name: str, template: str) -> None:
    tokenizer: Tokenizer = tokenizer_with(tmp_path, template)
    encoded = Encoder(tokenizer)(example(ROWS[name]))
    shown = view(example(ROWS[name]), tokenizer)
    trained = [id_ for id_, on in zip(encoded.ids[1:], encoded.trained[1:], strict=True) if on]
    assert (shown.tokens, shown.trained, shown.cut) == (len(encoded.ids), encoded.labels, 0)
    marked = "".join(c if c.isascii() else "".join(f"<0x{b:02X}>" for b in c.encode()) for c in texts(shown, "trained"))
    assert marked.replace(" ", "") == "".join(map(tokenizer.word, trained)).replace(" ", "")
    if name in ("messages", "untrained", "chat prompt"):
        assert texts(shown).startswith(str(tokenizer.render(example(ROWS[name]).messages, False)))
        assert [turn.role for turn in shown.turns] == [turn["role"] for turn in TURNS]
        for turn, message in zip(shown.turns, TURNS, strict=True):
            assert message["content"] in "".join(text for _, text in turn.parts), "each turn holds its own text"


@pytest.mark.parametrize("name", ROWS)
def test_the_cut_is_where_the_encoder_cuts(tmp_path: Path, name: str) -> None:
    tokenizer = tokenizer_with(tmp_path, SMOLLM2)
    whole = view(example(ROWS[name]), tokenizer)
    assert whole.tokens is not None
    for most in (1, whole.tokens // 2, whole.tokens - 1, whole.tokens, whole.tokens + 1):
        shown, encoded = view(example(ROWS[name]), tokenizer, most), Encoder(tokenizer, most)(example(ROWS[name]))
        assert (shown.cut, shown.trained) == (encoded.cut, encoded.labels)
        assert texts(shown) == texts(whole), "the text stays, marked as cut"
        assert bool(texts(shown, "cut")) == bool(encoded.cut)
        kinds = [kind == "cut" for turn in shown.turns for kind, _ in turn.parts]
        assert kinds == sorted(kinds), "nothing behind the cut is read"


def test_without_a_tokenizer_the_roles_say_what_is_trained_on() -> None:
    shown = view(example(ROWS["untrained"]))
    assert [(turn.role, turn.parts[0][0]) for turn in shown.turns] == [
        ("system", "read"),
        ("user", "read"),
        ("assistant", "read"),
        ("user", "read"),
        ("assistant", "trained"),
    ]
    assert shown.tokens is None and texts(shown, "trained") == "By the sea äöü."
    assert view(example(ROWS["prompt"])).turns == (
        Turn("prompt", (("read", "The currency is"),)),
        Turn("completion", (("trained", " the euro"),)),
    )
    assert view(example(ROWS["text"])).turns == (Turn("text", (("trained", "The euro. The lev."),)),)


def test_a_turn_holds_thoughts_content_and_calls_a_line_each() -> None:
    call = {"type": "function", "function": {"name": "convert", "arguments": {"lev": 1}}}
    answer = {"role": "assistant", "content": "Wait.", "reasoning_content": "In euro?", "tool_calls": [call]}
    silent = {"role": "assistant", "content": None, "tool_calls": [call]}
    rows = [TURNS[1], answer, {"role": "tool", "content": "0.51"}, silent, {"role": "tool", "content": "0.51"}]
    _, first, _, second, _ = view(example({"messages": rows})).turns
    assert first.parts == (("trained", f"In euro?\nWait.\n{call['function']}"),)
    assert second.parts == (("trained", str(call["function"])),)


@pytest.mark.parametrize("sentencepiece", [False, True])
@pytest.mark.parametrize(("prompt", "completion"), [("The currency is", " the euro"), ("is", "euro")])
def test_what_a_tokenizer_writes_around_a_text_is_shown(
    tmp_path: Path, sentencepiece: bool, prompt: str, completion: str
) -> None:
    tokenizer = tokenizer_with(
        tmp_path,
        bos="<s>",
        eos="</s>",
        writes=("<s>",) if not sentencepiece else ("<s>", "</s>"),
        sentencepiece=sentencepiece,
    )
    end = tokenizer.word(tokenizer.end_id)
    assert view(example({"prompt": prompt, "completion": completion}), tokenizer).turns == (
        Turn("prompt", (("template", "<s>"), ("read", prompt))),
        Turn("completion", (("trained", completion + end),)),
    )
    text = view(example({"text": "The euro. The lev."}), tokenizer, 4)
    assert text.turns[0].parts[0] == ("template", "<s>")
    assert texts(text) == f"<s>The euro. The lev.{end}"
    assert texts(text, "trained") == tokenizer.decode(Encoder(tokenizer, 4)(example(ROWS["text"])).ids)


def test_a_continuation_that_is_cut_within_is_cut_about_there(tmp_path: Path) -> None:
    writes = ("<s>", "</s>")
    tokenizer = tokenizer_with(tmp_path, bos="<s>", eos="</s>", writes=writes, sentencepiece=True)
    row = example({"prompt": "The currency is", "completion": " the euro"})
    whole = view(row, tokenizer).tokens or 0
    assert view(row, tokenizer, whole - 2).turns[1].parts == (("trained", " the"), ("cut", " euro</s>"))


def test_an_end_token_that_the_template_leaves_to_training_is_the_last_turns(tmp_path: Path) -> None:
    shown = view(example(ROWS["messages"]), tokenizer_with(tmp_path, PLAIN))
    assert shown.turns[-1].parts == (("template", "### assistant: "), ("trained", "By the sea äöü.\n<|im_end|>"))
    assert shown.turns[0].parts == (("template", "### system: "), ("read", "Be brief."), ("template", "\n"))


def test_words_keep_their_case_and_the_end_token_is_shown() -> None:
    tokenizer = WordTokenizer.of_words(["der", "wind", "weht"])
    shown = view(example({"prompt": "Der  WIND", "completion": " weht"}), tokenizer, 3)
    assert [turn.parts for turn in shown.turns] == [(("read", "Der  WIND"),), (("trained", " weht"), ("cut", "<eos>"))]


def test_the_rejected_answer_of_a_pair_and_a_prompt_alone_are_shown(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(tmp_path, SMOLLM2)
    pair = view(example({"prompt": "Where?", "chosen": " Here.", "rejected": " There."}), tokenizer)
    assert [turn.role for turn in pair.turns] == ["prompt", "completion", "rejected"]
    assert pair.turns[2].parts == (("read", " There."),)
    talk = {"prompt": TURNS[1:2], "chosen": TURNS[2:3], "rejected": TURNS[4:]}
    assert view(example(talk), tokenizer).turns[-1] == Turn("rejected assistant", (("read", "By the sea äöü."),))
    alone = view(example({"prompt": "Where is"}), tokenizer)
    assert [turn.role for turn in alone.turns] == ["prompt"] and texts(alone, "trained") == ""


def test_turns_are_told_apart_though_the_template_changes_earlier_ones(tmp_path: Path) -> None:
    thought = {"role": "assistant", "content": "<think>\nHello?\n</think>\n\nHello"}
    rows = [{"role": "user", "content": "Hello"}, thought] * 2
    shown = view(example({"messages": rows}), tokenizer_with(tmp_path / "thinks", THINKS))
    spoken = ["".join(text for _, text in turn.parts) for turn in shown.turns]
    user, answer = "<|im_start|>user\nHello<|im_end|>\n", "<|im_start|>assistant\nHello<|im_end|>\n"
    assert spoken == [user, answer, user, answer.replace("Hello", thought["content"])]

    says = MARKED.replace(HEADS, "").replace(ASKS, "{{ messages | length }}")
    shown = view(example(ROWS["messages"]), tokenizer_with(tmp_path / "counts", says))
    spoken = ["".join(text for _, text in turn.parts) for turn in shown.turns]
    assert spoken == [f"{turn['content']}<|im_end|>\n" for turn in TURNS[:4]] + ["By the sea äöü.<|im_end|>\n5"]

    unlike = says.replace("message.content", "(message.content | upper)")
    shown = view(example(ROWS["messages"]), tokenizer_with(tmp_path / "unlike", unlike))
    assert [bool(turn.parts) for turn in shown.turns] == [False, False, False, False, True], "no end is guessed"
    assert "IN THE WEST.<|im_end|>" in texts(shown, "trained")
