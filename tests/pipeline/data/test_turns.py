"""A row as its turns: the text that the model reads, and in it what the encoder trains on."""

from pathlib import Path
from typing import Any

import pytest

from pipeline.data.containers import Row
from pipeline.data.examples import Example
from pipeline.data.formats import example_of
from pipeline.data.masking import Encoder
from pipeline.data.tokenizers.word import Tokenizer, WordTokenizer
from pipeline.data.turns import MOST_TURNS, Turn, View, view
from pipeline.errors import UserError
from tests.helpers.tokenizers import (
    ASKS,
    HEADS,
    INSTRUCTS,
    MARKED,
    PLAIN,
    SMOLLM2,
    THINKS,
    tokenizer_with,
)

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
    return example_of(Row(1, record), "f.jsonl", templated=False)


def texts(shown: View, kind: str = "") -> str:
    return "".join(text for turn in shown.turns for each, text in turn.parts if kind in ("", each))


SIGNS = {"read": ("", ""), "template": ("‹", "›"), "trained": ("«", "»"), "cut": ("✂", "")}


def signed(shown: View) -> list[str]:
    """Each turn in one line: ‹what the template writes›, «what is trained on», ✂what is cut."""
    signs = [
        [f"{SIGNS[kind][0]}{text}{SIGNS[kind][1]}" for kind, text in turn.parts]
        for turn in shown.turns
    ]
    return [
        "".join(each).replace("<|im_start|>", "<S>").replace("<|im_end|>", "<E>") for each in signs
    ]


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("template", [SMOLLM2, MARKED, THINKS], ids=["smollm2", "marked", "thinks"])
def test_the_mask_is_the_encoders(tmp_path: Path, name: str, template: str) -> None:
    tokenizer: Tokenizer = tokenizer_with(tmp_path, template)
    encoded = Encoder(tokenizer)(example(ROWS[name]))
    shown = view(example(ROWS[name]), tokenizer)
    trained = [id_ for id_, on in zip(encoded.ids[1:], encoded.trained[1:], strict=True) if on]
    assert (shown.tokens, shown.trained, shown.cut) == (len(encoded.ids), encoded.labels, 0)
    marked = "".join(
        c if c.isascii() else "".join(f"<0x{b:02X}>" for b in c.encode())
        for c in texts(shown, "trained")
    )
    assert marked.replace(" ", "") == "".join(map(tokenizer.word, trained)).replace(" ", "")
    roles = {"text": ["text"], "prompt": ["prompt", "completion"]}.get(
        name, [turn["role"] for turn in TURNS]
    )
    assert [turn.role for turn in shown.turns] == roles
    if name in ("messages", "untrained", "chat prompt"):
        assert texts(shown).startswith(str(tokenizer.render(example(ROWS[name]).messages, False)))
        for turn, message in zip(shown.turns, TURNS, strict=True):
            assert message["content"] in "".join(text for _, text in turn.parts), (
                "each turn holds its own text"
            )


@pytest.mark.parametrize("name", ROWS)
def test_the_cut_is_where_the_encoder_cuts(tmp_path: Path, name: str) -> None:
    tokenizer = tokenizer_with(tmp_path, SMOLLM2)
    whole = view(example(ROWS[name]), tokenizer)
    assert whole.tokens is not None
    for most in (1, whole.tokens // 2, whole.tokens - 1, whole.tokens, whole.tokens + 1):
        shown, encoded = (
            view(example(ROWS[name]), tokenizer, most),
            Encoder(tokenizer, most)(example(ROWS[name])),
        )
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
    assert view(example(ROWS["text"])).turns == (
        Turn("text", (("trained", "The euro. The lev."),)),
    )


def test_a_turn_holds_thoughts_content_and_calls_a_line_each() -> None:
    call = {"type": "function", "function": {"name": "convert", "arguments": {"lev": 1}}}
    answer = {
        "role": "assistant",
        "content": "Wait.",
        "reasoning_content": "In euro?",
        "tool_calls": [call],
    }
    silent = {"role": "assistant", "content": None, "tool_calls": [call]}
    rows = [
        TURNS[1],
        answer,
        {"role": "tool", "content": "0.51"},
        silent,
        {"role": "tool", "content": "0.51"},
    ]
    _, first, _, second, _ = view(example({"messages": rows})).turns
    assert first.parts == (("trained", f"In euro?\nWait.\n{call['function']}"),)
    assert second.parts == (("trained", str(call["function"])),)


@pytest.mark.parametrize("sentencepiece", [False, True])
@pytest.mark.parametrize(
    ("prompt", "completion"), [("The currency is", " the euro"), ("is", "euro")]
)
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
    assert texts(text, "trained") == tokenizer.decode(
        Encoder(tokenizer, 4)(example(ROWS["text"])).ids
    )


def test_a_continuation_that_is_cut_within_is_cut_about_there(tmp_path: Path) -> None:
    writes = ("<s>", "</s>")
    tokenizer = tokenizer_with(tmp_path, bos="<s>", eos="</s>", writes=writes, sentencepiece=True)
    row = example({"prompt": "The currency is", "completion": " the euro"})
    whole = view(row, tokenizer).tokens or 0
    assert view(row, tokenizer, whole - 2).turns[1].parts == (
        ("trained", " the"),
        ("cut", " euro</s>"),
    )


def test_an_end_token_that_the_template_leaves_to_training_is_the_last_turns(
    tmp_path: Path,
) -> None:
    shown = view(example(ROWS["messages"]), tokenizer_with(tmp_path, PLAIN))
    assert shown.turns[-1].parts == (
        ("template", "### assistant: "),
        ("trained", "By the sea äöü.\n<|im_end|>"),
    )
    assert shown.turns[0].parts == (
        ("template", "### system: "),
        ("read", "Be brief."),
        ("template", "\n"),
    )


def test_words_keep_their_case_and_the_end_token_is_shown() -> None:
    tokenizer = WordTokenizer.of_words(["der", "wind", "weht"])
    shown = view(example({"prompt": "Der  WIND", "completion": " weht"}), tokenizer, 3)
    assert [turn.parts for turn in shown.turns] == [
        (("read", "Der  WIND"),),
        (("trained", " weht"), ("cut", "<eos>")),
    ]


def test_the_rejected_answer_of_a_pair_and_a_prompt_alone_are_shown(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(tmp_path, SMOLLM2)
    pair = view(example({"prompt": "Where?", "chosen": " Here.", "rejected": " There."}), tokenizer)
    assert [turn.role for turn in pair.turns] == ["prompt", "completion", "rejected"]
    assert pair.turns[2].parts == (("read", " There."),)
    talk = {"prompt": TURNS[1:2], "chosen": TURNS[2:3], "rejected": TURNS[4:]}
    assert view(example(talk), tokenizer).turns[-1] == Turn(
        "rejected assistant", (("read", "By the sea äöü."),)
    )
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
    assert spoken == [f"{turn['content']}<|im_end|>\n" for turn in TURNS[:4]] + [
        "By the sea äöü.<|im_end|>\n5"
    ]

    unlike = says.replace("message.content", "(message.content | upper)")
    shown = view(example(ROWS["messages"]), tokenizer_with(tmp_path / "unlike", unlike))
    assert [bool(turn.parts) for turn in shown.turns] == [False, False, False, False, True], (
        "no end is guessed"
    )
    assert "IN THE WEST.<|im_end|>" in texts(shown, "trained")


def without_head(content: str) -> str:
    return "{% for message in messages %}{{ " + content + " + '<|im_end|>\n' }}{% endfor %}"


CALL = {"type": "function", "function": {"name": "convert", "arguments": {"lev": 1}}}
CALLED = "[{'name': 'convert'}]"
SAYS_CALLS = SMOLLM2.replace(
    "message['content']",
    "(message['content'] or '') + (\"" + CALLED + "\" if message['tool_calls'] else '')",
)
CALLS: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "In euro?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "0.51"},
    {"role": "assistant", "content": "Half.", "tool_calls": [CALL]},
    {"role": "tool", "content": ""},
    {"role": "assistant", "content": "Done."},
]
# Ends each turn with what only the renderings of the conversations up to it can tell from the next
# one's beginning.
TAILED = MARKED.replace("{{ '\n' }}", "{{ '\n--\n' }}")
SHOWN: dict[str, tuple[str, list[dict[str, Any]], list[str]]] = {
    "turns that end in plain text": (
        TAILED,
        TURNS[1:],
        [
            "‹<S>user\n›Where is Sofia?‹<E>\n--\n›",
            "‹<S>assistant\n›«In the west.<E>»‹\n--\n›",
            "‹<S>user\n›And Varna?‹<E>\n--\n›",
            "‹<S>assistant\n›«By the sea äöü.<E>»‹\n--\n›",
        ],
    ),
    "contents without headers": (
        without_head("message.content"),
        TURNS[:3],
        ["Be brief.‹<E>\n›", "Where is Sofia?‹<E>\n›", "«In the west.<E>»‹\n›"],
    ),
    "contents that stand in the text otherwise": (
        MARKED.replace("{% else %}{{ message.content", "{% else %}{{ message.content | upper"),
        TURNS[1:3],
        ["<S>user\nWHERE IS SOFIA?<E>\n", "‹<S>assistant\n›«In the west.<E>»‹\n›"],
    ),
    "a system turn within the user's": (
        INSTRUCTS.replace(
            "+ message.content",
            "+ (messages[0].content + ' ' if loop.index0 == 1 else '') + message.content",
        )
        .replace("{% else %}", "{% elif message.role == 'assistant' %}")
        .replace("bos_token", "'<|im_start|>'")
        .replace("eos_token", "'<|im_end|>'"),
        TURNS[:3],
        ["‹<S>[INST] ›Be brief.‹ ›", "Where is Sofia?‹ [/INST]›", "« In the west. <E>»"],
    ),
    "a token that two turns share": (
        "{% for message in messages %}{{ message.content }}{% endfor %}",
        [{"role": "user", "content": "The eu"}, {"role": "assistant", "content": "ro."}],
        ["The eu", "«ro.<E>»"],
    ),
    "a token that three turns share": (
        "{% for message in messages %}{{ message.content }}{% endfor %}",
        [
            {"role": role, "content": text}
            for role, text in (("system", "The e"), ("user", "u"), ("assistant", "ro."))
        ],
        ["The e", "u", "«ro.<E>»"],
    ),
    "calls": (
        SAYS_CALLS,
        CALLS,
        [
            "‹<S>system\n›Be brief.‹<E>\n›",
            "‹<S>user\n›In euro?‹<E>\n›",
            f"<S>assistant\n«{CALLED}<E>»\n",
            "‹<S>tool\n›0.51‹<E>\n›",
            f"‹<S>assistant\n›«Half.{CALLED}<E>\n»",
            "<S>tool\n<E>\n",
            "‹<S>assistant\n›«Done.<E>»‹\n›",
        ],
    ),
    "calls that are not trained on": (
        SAYS_CALLS,
        [*CALLS[:4], {**CALLS[4], "train": False}, *CALLS[5:]],
        [
            "‹<S>system\n›Be brief.‹<E>\n›",
            "‹<S>user\n›In euro?‹<E>\n›",
            f"<S>assistant\n«{CALLED}<E>»\n",
            "‹<S>tool\n›0.51‹<E>\n›",
            f"‹<S>assistant\n›Half.‹{CALLED}<E>\n›",
            "<S>tool\n<E>\n",
            "‹<S>assistant\n›«Done.<E>»‹\n›",
        ],
    ),
    "a template that renders no conversation up to a question": (
        "{% if messages[-1].role == 'user' and not add_generation_prompt %}{{ "
        "raise_exception('no') }}{% endif %}" + MARKED,
        TURNS[1:],
        [
            "‹<S>user\n›Where is Sofia?‹<E>\n›",
            "‹<S>assistant\n›«In the west.<E>»‹\n›",
            "‹<S>user\n›And Varna?‹<E>\n›",
            "‹<S>assistant\n›«By the sea äöü.<E>»‹\n›",
        ],
    ),
    "thoughts that only the last answer keeps": (
        THINKS,
        [
            TURNS[1],
            {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nYes."},
            TURNS[3],
            TURNS[4],
        ],
        [
            "‹<S>user\n›Where is Sofia?‹<E>\n›",
            "<S>assistant\n«Yes.<E>»\n",
            "‹<S>user\n›And Varna?‹<E>\n›",
            "‹<S>assistant\n›«<think>\n\n</think>\n\nBy the sea äöü.<E>»‹\n›",
        ],
    ),
}


@pytest.mark.parametrize("name", SHOWN)
def test_turns_are_shown_as_the_template_writes_them(tmp_path: Path, name: str) -> None:
    template, turns, wanted = SHOWN[name]
    shown = view(example({"messages": turns}), tokenizer_with(tmp_path, template))
    assert signed(shown) == wanted
    assert [turn.role for turn in shown.turns] == [turn["role"] for turn in turns]


def test_tools_stand_before_the_first_turn(tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "convert"}}]
    tokenizer = tokenizer_with(tmp_path, "{{ tools[0].function.name if tools else '' }}" + TAILED)
    first, *others = SHOWN["turns that end in plain text"][2]
    assert signed(view(example({"messages": TURNS[1:], "tools": tools}), tokenizer)) == [
        first.replace("‹", "‹convert", 1),
        *others,
    ]


def test_the_ends_of_many_turns_are_found_by_their_contents(tmp_path: Path) -> None:
    many = [{"role": role, "content": f"{n}!"} for n in range(40) for role in ("user", "assistant")]
    turns = signed(view(example({"messages": many}), tokenizer_with(tmp_path, TAILED)))
    exact = [
        each
        for n in range(40)
        for each in (f"‹<S>user\n›{n}!‹<E>\n--\n›", f"‹<S>assistant\n›«{n}!<E>»‹\n--\n›")
    ]
    assert turns[: MOST_TURNS - 1] == exact[: MOST_TURNS - 1]
    less = [each.replace("\n--\n›", "\n›") for each in exact[MOST_TURNS - 1 : -1]]
    assert turns[MOST_TURNS - 1] == less[0]
    assert turns[MOST_TURNS:] == [each.replace("‹", "‹--\n", 1) for each in [*less[1:], exact[-1]]]


def test_without_the_renderings_the_ends_are_found_by_contents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = tokenizer_with(tmp_path, TAILED)
    render = tokenizer.render_each

    def stopped(conversations: Any) -> Any:
        if conversations[0].prefixes[0][0] == 1:  # of turn by turn, not of the mask
            return iter([UserError("was stopped")])
        return render(conversations)

    monkeypatch.setattr(tokenizer, "render_each", stopped)
    assert signed(view(example({"messages": TURNS[1:3]}), tokenizer)) == [
        "‹<S>user\n›Where is Sofia?‹<E>\n›",
        "‹--\n<S>assistant\n›«In the west.<E>»‹\n--\n›",
    ]


@pytest.mark.parametrize("writes", [(), ("<s>",)])
def test_special_tokens_that_a_text_has_itself_are_shown_once(
    tmp_path: Path, writes: tuple[str, ...]
) -> None:
    tokenizer = tokenizer_with(tmp_path, bos="<s>", writes=writes)
    for record in ({"text": "<s>The euro."}, {"text": "<s>The euro.<|im_end|>"}):
        assert signed(view(example(record), tokenizer)) == ["<s>«The euro.<E>»"]
    bos = "‹<s>›" if writes else ""
    for completion in (" euro.", " euro.<|im_end|>"):
        shown = view(example({"prompt": "The", "completion": completion}), tokenizer)
        assert signed(shown) == [f"{bos}The", "« euro.<E>»"]
        assert (shown.tokens, shown.trained) == (4 + len(writes), 3)


def test_white_space_between_tokens_is_the_next_ones_and_at_the_end_the_last_ones() -> None:
    words = WordTokenizer.of_words(["der", "wind", "weht"])
    row = example({"prompt": " Der ", "completion": "  wind weht "})
    assert [signed(view(row, words, most)) for most in (1, 2, 3, 4, 5, 0)] == [
        [" Der ", "✂  wind weht <eos>"],
        [" Der ", "«  wind»✂ weht <eos>"],
        [" Der ", "«  wind weht»✂ <eos>"],
        *[[" Der ", "«  wind weht <eos>»"]] * 3,
    ]
    assert signed(view(example({"text": " Der  wind "}), words)) == [" Der«  wind <eos>»"]


@pytest.mark.parametrize(
    "template", [SMOLLM2, MARKED, THINKS, PLAIN], ids=["smollm2", "marked", "thinks", "plain"]
)
def test_each_character_is_shown_as_its_token_is_used(tmp_path: Path, template: str) -> None:
    tokenizer, row = tokenizer_with(tmp_path, template), example(ROWS["untrained"])
    encoded = Encoder(tokenizer)(row)
    text = str(tokenizer.render(row.messages, False))
    spans = [*tokenizer.spans(text)[1], (len(text), len(text) + len("<|im_end|>"))][
        : len(encoded.ids)
    ]
    for most in (1, 2, len(spans) // 3, len(spans) - 2, len(spans)):
        shown = view(row, tokenizer, most)
        assert texts(shown).removesuffix(texts(shown, "cut")) == texts(shown)[: spans[most - 1][1]]
        kinds = [
            kind == "trained" for turn in shown.turns for kind, text in turn.parts for _ in text
        ]
        on = {
            place
            for span, on in zip(spans[:most], encoded.trained, strict=False)
            if on
            for place in range(*span)
        }
        assert kinds == [place in on for place in range(len(texts(shown)))]
        assert (shown.tokens, shown.cut) == (len(spans), len(spans) - most)


def test_an_answer_that_is_called_bad_is_read(tmp_path: Path) -> None:
    shown = view(
        example({"prompt": "Where?", "completion": " Here.", "label": False}),
        tokenizer_with(tmp_path),
    )
    assert signed(shown) == ["Where?", " Here.‹<E>›"]
    assert shown.trained == 0


def test_the_turns_of_a_rejected_answer_hold_their_thoughts_and_calls(tmp_path: Path) -> None:
    call = {"name": "convert", "arguments": {}}
    rejected = [
        {"role": "assistant", "content": None, "reasoning_content": "Hm.", "tool_calls": [call]}
    ]
    pair = example({"prompt": TURNS[1:2], "chosen": TURNS[2:3], "rejected": rejected})
    wanted = Turn("rejected assistant", (("read", f"Hm.\n{call}"),))
    assert view(pair).turns[-1] == view(pair, tokenizer_with(tmp_path, MARKED)).turns[-1] == wanted
    assert [turn.role for turn in view(pair).turns] == ["user", "assistant", "rejected assistant"]
