"""Known pitfalls of other tools with training data, numbered as in our list; none applies here."""

from pathlib import Path

import pytest

from pipeline.data.examples import Example, Message
from pipeline.data.masking import Encoder, encode
from pipeline.data.windows import Corpus, refuse_empty
from pipeline.errors import UserError
from tests.helpers.tokenizers import (
    INSTRUCTS,
    MARKED,
    MARKED_WITHOUT_END,
    SMOLLM2,
    THINKS,
    tokenizer_with,
)

ASKED = Example(
    "Hello\nHello!",
    "f.jsonl",
    7,
    messages=(Message(role="user", content="Hello"), Message(role="assistant", content="Hello!")),
)


def test_pitfall_11_the_end_is_learned_where_pad_is_the_same_token(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(tmp_path, SMOLLM2)  # its pad token is its EOS
    for example in (Example("The euro.", "f", 1), Example("The euro.", "f", 1, "The"), ASKED):
        encoded = encode(example, tokenizer)
        ends = [
            on
            for id_, on in zip(encoded.ids, encoded.trained, strict=True)
            if id_ == tokenizer.end_id
        ]
        assert ends[-1] is True
        assert encoded.ids.count(tokenizer.end_id) == (1 if not example.messages else 3), (
            "no second end token is added"
        )


@pytest.mark.parametrize("writes", [("<s>",), ("<s>", "</s>")])
@pytest.mark.parametrize("sentencepiece", [False, True])
def test_pitfall_12_bos_is_written_once(
    tmp_path: Path, writes: tuple[str, ...], sentencepiece: bool
) -> None:
    tokenizer = tokenizer_with(
        tmp_path, INSTRUCTS, bos="<s>", eos="</s>", writes=writes, sentencepiece=sentencepiece
    )
    assert tokenizer.bos_id is not None
    rendered = tokenizer.render(ASKED.messages[:1], add_generation_prompt=True)
    for ids in (
        tokenizer.encode("The euro."),
        tokenizer.encode("<s>The euro."),
        tokenizer.encode(rendered),
        tokenizer.encode(str(rendered)),
        encode(Example("The euro.", "f", 1), tokenizer).ids,
        encode(Example("<s>The euro.", "f", 1), tokenizer).ids,
        encode(Example("The euro.", "f", 1, "The"), tokenizer).ids,
        encode(Example("<s>The euro.", "f", 1, "<s>The"), tokenizer).ids,
        encode(ASKED, tokenizer).ids,
    ):
        assert ids[0] == tokenizer.bos_id
        assert ids.count(tokenizer.bos_id) == 1
    assert encode(Example("The euro.</s>", "f", 1), tokenizer).ids.count(tokenizer.end_id) == 1


def test_pitfall_12_a_template_without_bos_gets_none(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(tmp_path, SMOLLM2, bos="<s>", writes=("<s>",))
    rendered = tokenizer.encode(tokenizer.render(ASKED.messages[:1], add_generation_prompt=True))
    assert tokenizer.bos_id not in rendered
    assert encode(ASKED, tokenizer).ids[: len(rendered)] == rendered, (
        "trained with the prompt's tokens at inference"
    )


@pytest.mark.parametrize("template", [SMOLLM2, THINKS])
def test_pitfall_13_a_template_without_marks_gives_a_mask(tmp_path: Path, template: str) -> None:
    assert "generation %}" not in template
    tokenizer = tokenizer_with(tmp_path, template)
    encoded = encode(ASKED, tokenizer)
    rendered = tokenizer.encode(tokenizer.render(ASKED.messages[:1], add_generation_prompt=True))
    assert encoded.ids[: len(rendered)] == rendered
    assert not any(encoded.trained[: len(rendered)])
    assert all(encoded.trained[len(rendered) : -1])


def test_pitfall_13_marks_that_mark_nothing_are_not_believed(tmp_path: Path) -> None:
    template = SMOLLM2 + "{% if false %}{% generation %}{% endgeneration %}{% endif %}"
    assert any(encode(ASKED, tokenizer_with(tmp_path, template)).trained)


def test_pitfall_14_an_example_whose_labels_were_all_cut_off_is_counted_and_left_out(
    tmp_path: Path,
) -> None:
    tokenizer = tokenizer_with(tmp_path, SMOLLM2)
    long = Example(
        "The currency of Bulgaria is the euro", "f.jsonl", 1, "The currency of Bulgaria is the"
    )
    short = Example("is the euro", "f.jsonl", 2, "is")
    size = len(tokenizer.encode(long.prompt or ""))
    corpus = Corpus.of(Encoder(tokenizer, size).each([long, short]), tmp_path)
    counts = corpus.statistics
    assert (counts.examples, counts.unlabelled, counts.truncated) == (1, 1, 1)
    assert corpus.location(0) == short.location
    refuse_empty(corpus, "f.jsonl")


def test_pitfall_14_with_nothing_left_to_learn_the_run_is_refused(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(tmp_path, SMOLLM2)
    corpus = Corpus.of(Encoder(tokenizer, 4).each([ASKED] * 3), tmp_path)
    assert len(corpus) == 0
    with pytest.raises(
        UserError, match=r"f.jsonl: nothing to train on: 3 of 3 examples were cut before"
    ):
        refuse_empty(corpus, "f.jsonl")


@pytest.mark.parametrize("template", [SMOLLM2, MARKED, MARKED_WITHOUT_END, THINKS])
@pytest.mark.parametrize("eos", ["<|im_end|>", "<|endoftext|>"])
def test_pitfall_15_the_stop_token_is_learned(tmp_path: Path, template: str, eos: str) -> None:
    tokenizer = tokenizer_with(tmp_path, template, eos=eos)
    encoded = encode(ASKED, tokenizer)
    last = max(i for i, on in enumerate(encoded.trained) if on)
    assert tokenizer.word(encoded.ids[last]) == "<|im_end|>"
    assert encoded.ids[last] in tokenizer.end_ids, (
        "generation stops at the token that training ends with"
    )
