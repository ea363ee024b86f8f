"""Label masks: against transformers' masks, and decoded as text."""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from pipeline.data import masking
from pipeline.data.examples import Example, Message, Role
from pipeline.data.masking import Encoded, Encoder, encode
from pipeline.data.tokenizers.chat_template import Answers
from pipeline.data.tokenizers.subword import SubwordTokenizer
from pipeline.data.tokenizers.template_process import Conversation
from pipeline.data.tokenizers.word import Tokenizer, WordTokenizer
from pipeline.errors import UserError
from tests.helpers.errors import user_error
from tests.helpers.tokenizers import (
    INSTRUCTS,
    MARKED,
    MARKED_WITHOUT_END,
    PLAIN,
    SMOLLM2,
    THINKS,
    UNLIKE,
    tokenizer_with,
)

Maker = Callable[..., SubwordTokenizer]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Maker:
    """Tokenizers by template, each loaded once."""
    folder, cache = tmp_path_factory.mktemp("made"), dict[str, SubwordTokenizer]()

    def make(template: str | None = None, **options: object) -> SubwordTokenizer:
        key = f"{template}{options}"
        if key not in cache:
            cache[key] = tokenizer_with(folder / str(len(cache)), template, **options)
        return cache[key]

    return make


def talk(*contents: str) -> Example:
    """Alternating turns, beginning with the user's."""
    messages = tuple(
        Message(role="assistant" if index % 2 else "user", content=content)
        for index, content in enumerate(contents)
    )
    return Example("\n".join(contents), "f.jsonl", 1, messages=messages)


def learned(encoded: Encoded, tokenizer: Tokenizer) -> list[str]:
    """Each run of tokens that are trained on, as text with special tokens."""
    runs, open_ = list[str](), False
    for id_, on in zip(encoded.ids, encoded.trained, strict=True):
        if on:
            runs += [] if open_ else [""]
            runs[-1] += tokenizer.word(id_)
        open_ = on
    return runs


def test_every_token_of_a_text_is_learned_and_what_ends_it(made: Maker) -> None:
    tokenizer = made()
    encoded = encode(Example("The euro.", "f", 1), tokenizer)
    assert encoded == Encoded(
        (*tokenizer.encode("The euro."), tokenizer.end_id), (True,) * len(encoded.ids)
    )
    assert encoded.labels == len(encoded.ids) - 1


@given(st.text(min_size=1, max_size=12), st.text(min_size=1, max_size=12))
def test_a_prompt_has_the_tokens_it_is_asked_with_and_its_completion_alone_is_learned(
    made: Maker, prompt: str, completion: str
) -> None:
    for tokenizer in (made(), made(bos="<s>", writes=("<s>",))):
        encoded = encode(Example(prompt + completion, "f", 1, prompt), tokenizer)
        prompt_ids = tokenizer.encode(prompt)
        assert encoded.ids[: len(prompt_ids)] == prompt_ids
        assert encoded.trained == (False,) * len(prompt_ids) + (True,) * (
            len(encoded.ids) - len(prompt_ids)
        )
        assert encoded.ids[-1] == tokenizer.end_id
        assert tokenizer.decode(encoded.ids) == tokenizer.decode(prompt_ids) + completion
        assert tokenizer.decode(prompt_ids) == prompt


def test_a_completion_is_no_beginning_of_a_text(made: Maker) -> None:
    tokenizer = made(bos="<s>", eos="</s>", writes=("<s>", "</s>"), sentencepiece=True)
    for completion in (" euro", "euro", "\neuro"):
        encoded = encode(Example(f"is the{completion}", "f", 1, "is the"), tokenizer)
        assert tokenizer.decode(encoded.ids) == f"is the{completion}"


CONVERSATION = talk("Which currency has Bulgaria?", "The lev.", "And Japan?", "The Yen, I think.")


@pytest.mark.parametrize("template", [SMOLLM2, MARKED, MARKED_WITHOUT_END])
def test_answers_and_their_end_are_learned_and_nothing_else(made: Maker, template: str) -> None:
    tokenizer = made(template)
    encoded = encode(CONVERSATION, tokenizer)
    assert (
        encoded.ids
        == tokenizer.spans(tokenizer.render(CONVERSATION.messages, add_generation_prompt=False))[0]
    )
    assert learned(encoded, tokenizer) == ["The lev.<|im_end|>", "The Yen, I think.<|im_end|>"]


@pytest.mark.parametrize("template", [SMOLLM2, MARKED, PLAIN])
@pytest.mark.parametrize("turn", [0, 1, 2, 3])
@pytest.mark.parametrize("token", ["<|im_start|>", "<|im_end|>", "<|endoftext|>"])
def test_a_special_token_in_a_turn_is_refused_with_its_place(
    made: Maker, template: str, turn: int, token: str
) -> None:
    contents = [message["content"] or "" for message in CONVERSATION.messages]
    contents[turn] += f"{token}assistant\nThe euro."
    said = user_error(encode, talk(*contents), made(template))
    assert said.startswith(f"f.jsonl:1: messages[{turn}] contains {token}, a special token of ")
    assert said.endswith("it could begin or end a turn. Remove it, or spell it differently.")


def test_special_tokens_that_users_write_around_texts_themselves_are_control_tokens(
    made: Maker,
) -> None:
    tokenizer = made(SMOLLM2)
    text = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    assert encode(Example(text, "f", 1), tokenizer).ids[:-1] == tokenizer.encode(text)
    encoded = encode(Example(f"{text}Hello!<|im_end|>", "f", 1, text), tokenizer)
    assert learned(encoded, tokenizer) == ["Hello!<|im_end|>"]


def test_a_turn_may_hold_added_tokens_that_are_not_special_and_what_only_resembles_one(
    made: Maker,
) -> None:
    tokenizer, _ = made(SMOLLM2).expanded(["<tool>"])
    encoded = encode(talk("Hello <tool> <|im_start |>", "Hello!<tool>"), tokenizer)
    assert learned(encoded, tokenizer) == ["Hello!<tool><|im_end|>"]


def test_a_template_may_use_special_tokens_itself_and_take_them_out_of_contents(
    made: Maker,
) -> None:
    strips = SMOLLM2.replace("message['content']", "message['content'].replace('<|im_end|>', '')")
    assert strips != SMOLLM2
    assert encode(CONVERSATION, made(strips)) == encode(CONVERSATION, made(SMOLLM2))
    tokenizer = made(INSTRUCTS, bos="<s>", eos="</s>", writes=("<s>",))
    assert learned(encode(CONVERSATION, tokenizer), tokenizer)[0].startswith(" The lev.")
    with pytest.raises(UserError, match=r"messages\[0\] contains </s>, a special token"):
        encode(talk("a</s>", "b"), tokenizer)


def test_a_conversation_of_many_turns_is_rendered_as_one_of_few(made: Maker) -> None:
    tokenizer = made(SMOLLM2)
    encoded = encode(talk(*("The euro.", "The lev.") * 40), tokenizer)
    assert learned(encoded, tokenizer) == ["The lev.<|im_end|>"] * 40


TEXTS = st.text(st.characters(codec="utf-8"), min_size=1, max_size=9)
SPECIAL = re.compile(r"<unk>|</?s>|<\|(?:endoftext|im_start|im_end)\|>")  # refused, see above
CONTENTS = st.lists(TEXTS.filter(lambda text: not SPECIAL.search(text)), min_size=2, max_size=6)


@given(CONTENTS)
def test_marks_give_the_mask_that_transformers_gives(
    made: Maker, tmp_path_factory: pytest.TempPathFactory, contents: list[str]
) -> None:
    tokenizer, example = made(MARKED), talk(*contents)
    encoded = encode(example, tokenizer)
    theirs = transformers_mask(tokenizer, example, tmp_path_factory)
    assert (list(encoded.ids), list(encoded.trained)) == theirs


@given(CONTENTS.map(lambda contents: [content.strip() or "x" for content in contents]))
def test_comparing_prefixes_finds_what_marks_would(
    made: Maker, tmp_path_factory: pytest.TempPathFactory, contents: list[str]
) -> None:
    example = talk(*contents)
    encoded = encode(
        example, made(MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", ""))
    )
    assert (list(encoded.ids), list(encoded.trained)) == transformers_mask(
        made(MARKED), example, tmp_path_factory
    )


def transformers_mask(
    tokenizer: SubwordTokenizer, example: Example, folders: pytest.TempPathFactory
) -> tuple[list[int], list[bool]]:
    folder = folders.getbasetemp() / "marked"
    if not folder.exists():
        folder.mkdir()
        tokenizer.save(folder, 10_000)
        transformers_mask.theirs = AutoTokenizer.from_pretrained(folder)  # type: ignore[attr-defined]
    out = transformers_mask.theirs.apply_chat_template(  # type: ignore[attr-defined]
        list(example.messages), return_dict=True, return_assistant_tokens_mask=True
    )
    return out["input_ids"], list(map(bool, out["assistant_masks"]))


THOUGHTS = talk(
    "And Japan?",
    "<think>\nI think.\n</think>\n\nThe Yen.",
    "Hello",
    "<think>\nHello?\n</think>\n\nHello!",
)


def test_a_template_that_drops_thoughts_from_earlier_answers_is_understood(made: Maker) -> None:
    tokenizer = made(THINKS)
    assert learned(encode(THOUGHTS, tokenizer), tokenizer) == [
        "The Yen.<|im_end|>",
        "<think>\nHello?\n</think>\n\nHello!<|im_end|>",
    ]
    plain = encode(CONVERSATION, tokenizer)
    assert learned(plain, tokenizer) == [
        "The lev.<|im_end|>",
        "<think>\n\n</think>\n\nThe Yen, I think.<|im_end|>",
    ]


@pytest.mark.parametrize("template", [PLAIN, THINKS])
@pytest.mark.parametrize("example", [CONVERSATION, THOUGHTS, talk(*("The euro.", "The lev.") * 20)])
def test_tools_stand_before_the_turns_and_change_no_answer(
    made: Maker, template: str, example: Example
) -> None:
    tokenizer = made("{{ tools | tojson if tools else '' }}" + template)
    tools = ({"type": "function", "function": {"name": "convert", "parameters": {}}},)
    told = encode(replace(example, tools=tools), tokenizer)
    assert learned(told, tokenizer) == learned(encode(example, tokenizer), tokenizer)
    assert '"convert"' in tokenizer.decode(told.ids)


def test_a_template_that_writes_bos_itself_has_one(made: Maker) -> None:
    for sentencepiece in (False, True):
        tokenizer = made(
            INSTRUCTS, bos="<s>", eos="</s>", writes=("<s>",), sentencepiece=sentencepiece
        )
        encoded = encode(CONVERSATION, tokenizer)
        assert [run.strip() for run in learned(encoded, tokenizer)] == [
            "The lev. </s>",
            "The Yen, I think. </s>",
        ]
        assert encoded.ids.count(tokenizer.bos_id or 0) == 2, (
            "one per question, as the template writes it"
        )
        assert encoded.ids[0] == tokenizer.bos_id != encoded.ids[1]


def test_answers_that_no_token_ends_are_whole_and_the_last_gets_an_end(made: Maker) -> None:
    tokenizer = made(PLAIN)
    encoded = encode(CONVERSATION, tokenizer)
    assert learned(encoded, tokenizer) == [" The lev.\n", " The Yen, I think.\n<|im_end|>"]
    asks_last = encode(talk("Hello", "Hello!", "And Japan?"), tokenizer)
    assert [run.strip() for run in learned(asks_last, tokenizer)] == ["Hello!"]
    marked = PLAIN.replace(
        "message.content + '\n' }}",
        "'' }}{% generation %}{{ message.content }}{% endgeneration %}\n",
    )
    encoded = encode(talk("Hello", "Hello!"), made(marked))
    assert encoded.ids[-1] == tokenizer.end_id and encoded.trained[-1]


def test_a_system_turn_is_not_learned(made: Maker) -> None:
    messages = ({"role": "system", "content": "You are I"}, *talk("Hello", "Hello!").messages)
    encoded = encode(Example("", "f", 1, messages=messages), made(SMOLLM2))  # type: ignore[arg-type]
    assert learned(encoded, made(SMOLLM2)) == ["Hello!<|im_end|>"]


ENDS_LAST = SMOLLM2.replace(
    "'<|im_end|>'", "('.' if loop.last and message['role'] == 'assistant' else ' ')"
)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (UNLIKE, r"f.jsonl:1: cannot mask messages\[1\]: the chat template changes earlier text"),
        (
            SMOLLM2.replace("message['content']", "message['content'] | upper"),
            "does not write its content unchanged",
        ),
        (ENDS_LAST, "writes no end-of-turn token after it"),
        ("{{ raise_exception('no') }}", r"f.jsonl:1: .*its chat template fails: no"),
        (None, r"f.jsonl:1: .*has no chat template"),
    ],
)
def test_a_template_that_cannot_be_understood_is_refused(
    made: Maker, template: str | None, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        encode(CONVERSATION, made(template))


def test_an_example_longer_than_the_model_is_refused_unless_it_is_cut(made: Maker) -> None:
    example = Example("The currency of Bulgaria is the euro.", "f.txt", 3)
    full = encode(example, made())
    size = len(full.ids)
    assert encode(example, made(), positions=size) == full
    with pytest.raises(
        UserError,
        match=rf"f.txt:3: {size} tokens with the end token, more than the model's {size - 1}",
    ):
        encode(example, made(), positions=size - 1)
    assert encode(example, made(), 4, 4) == Encoded(full.ids[:4], full.trained[:4], size - 4)
    with pytest.raises(UserError, match="5 tokens with the end token, more than the model's 4"):
        encode(example, made(), 5, 4)


def test_words_are_encoded_as_minigpt_always_did() -> None:
    words = WordTokenizer.of_words(["die", "katze", "sitzt"])
    assert encode(Example("die katze sitzt", "f.txt", 3), words, positions=4).ids == (3, 4, 5, 2)
    with pytest.raises(
        UserError, match=r"f.txt:3: not in the vocabulary: möwe. Add f.txt to expand_vocab.data"
    ):
        encode(Example("die möwe sitzt", "f.txt", 3), words, positions=4)
    with pytest.raises(
        UserError, match=r"f.txt:3: 4 tokens with the end token, more than the model's 3"
    ):
        encode(Example("die katze sitzt", "f.txt", 3), words, positions=3)
    assert encode(Example("die katze sitzt", "f", 1, "die"), words).trained == (
        False,
        True,
        True,
        True,
    )


def test_a_prompt_alone_teaches_nothing(made: Maker) -> None:
    with pytest.raises(UserError, match='f:1: "prompt" needs a "completion"'):
        encode(Example("The euro", "f", 1, "The euro"), made())


def test_every_role_is_rendered(made: Maker) -> None:
    for role in get_args(Role):
        messages = (Message(role=role, content="Hello"), *talk("Hello", "Hello!").messages)
        if role != "assistant":
            assert learned(
                encode(Example("", "f", 1, messages=messages), made(SMOLLM2)), made(SMOLLM2)
            )


def test_conversations_are_rendered_in_groups_by_their_number_and_characters(
    made: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, sizes = made(SMOLLM2), list[int]()
    assert tokenizer.end_ids  # found once, by rendering
    render = tokenizer.render_each

    def counted(conversations: Sequence[Conversation]) -> Answers:
        sizes.append(len(conversations))
        return render(conversations)

    monkeypatch.setattr(tokenizer, "render_each", counted)
    monkeypatch.setattr(masking, "GROUP_EXAMPLES", 3)
    monkeypatch.setattr(masking, "GROUP_CHARACTERS", 100)
    # 100 characters with the line's end: as many as a group may have
    full = talk("u" * 49, "a" * 50)
    for examples, wanted in (
        ([talk("a", "b")] * 7, [3, 3, 1]),
        ([full] * 4, [2, 2]),
        ([talk("a", "b"), full], [2]),
    ):
        sizes.clear()
        assert [example for example, _ in Encoder(tokenizer).each(examples)] == examples
        assert sizes == wanted


def test_what_is_wrong_in_any_group_is_handed_over_and_left_out(
    made: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(masking, "GROUP_EXAMPLES", 2)
    right, wrong = talk("a", "b"), Example("no answer", "f.jsonl", 1, "no answer")
    refused: list[Example] = []
    examples = [right, wrong, wrong, right, right, wrong, wrong]
    encoded = Encoder(made(SMOLLM2)).each(examples, lambda example, _: refused.append(example))
    assert [example for example, _ in encoded] == [right] * 3
    assert refused == [wrong] * 4


def test_words_of_a_template_that_are_not_in_the_vocabulary_are_named(tmp_path: Path) -> None:
    WordTokenizer.of_words(["hallo", "du", ">"]).save(tmp_path, 64)
    (tmp_path / "chat_template.jinja").write_text(
        "{% for message in messages %}{{ message.role + ' > ' + message.content + '\n"
        "' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant > ' }}{% endif %}"
    )
    words, example = WordTokenizer.load(tmp_path), replace(talk("Hallo", "Du"), text="Hallo Du")
    with pytest.raises(
        UserError, match=r"f.jsonl:1: the chat template writes words .*: user, assistant\.$"
    ):
        encode(example, words)
    expanded, _ = words.expanded(["user assistant"])
    expanded.save(tmp_path, 64)
    known = WordTokenizer.load(tmp_path)
    assert (
        " ".join(map(known.word, encode(example, known).ids)) == "user > hallo assistant > du <eos>"
    )
    assert learned(encode(example, known), known) == ["du<eos>"]


def test_what_looks_like_the_beginning_of_an_answer_is_no_answer(made: Maker) -> None:
    tools = ({"type": "function", "function": {"name": "convert", "parameters": {}}},)
    tokenizer = made("{{ tools | tojson if tools else '' }}" + PLAIN)
    many = talk("### assistant: The euro.", "The lev.", *("The euro.", "The lev.") * 19)
    for example in (many, replace(many, tools=tools)):
        assert learned(encode(example, tokenizer), tokenizer)[:-1] == [" The lev.\n"] * 19


def test_thoughts_between_calls_are_dropped_once_another_question_follows(made: Maker) -> None:
    contents = (
        "In euro?",
        "<think>\nHm.\n</think>\n\nWait.",
        "0.51",
        "Half.",
        "And Japan?",
        "The Yen.",
    )
    roles: tuple[Role, ...] = ("user", "assistant", "tool", "assistant", "user", "assistant")

    def conversation(*contents: str) -> Example:
        messages = tuple(
            Message(role=role, content=text) for role, text in zip(roles, contents, strict=True)
        )
        return Example("\n".join(contents), "f.jsonl", 1, messages=messages)

    tokenizer = made(THINKS.replace("<|im_start|>", "### "))
    answers = ["Wait.<|im_end|>", "Half.<|im_end|>", "<think>\n\n</think>\n\nThe Yen.<|im_end|>"]
    assert learned(encode(conversation(*contents), tokenizer), tokenizer) == answers
    # What stands before each answer stands elsewhere too: where one begins cannot be told.
    with pytest.raises(
        UserError, match=r"cannot mask messages\[3\]: the chat template changes earlier text"
    ):
        encode(conversation(*contents[:2], "### assistant\nHalf.", *contents[3:]), tokenizer)


def test_an_answer_may_begin_with_a_word_that_ends_answers(made: Maker) -> None:
    hello = made(SMOLLM2).encode("Hello")
    assert len(hello) == 1
    tokenizer = made(SMOLLM2, ends=[made(SMOLLM2).end_id, *hello])
    assert set(hello) < tokenizer.end_ids
    assert learned(encode(talk("Hi", "Hello, you"), tokenizer), tokenizer) == [
        "Hello, you<|im_end|>"
    ]
