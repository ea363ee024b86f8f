"""The word-level tokenizer, against transformers."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from pipeline.data.examples import Example
from pipeline.data.formats import read_examples
from pipeline.data.masking import encode
from pipeline.data.tokenizers.word import SPECIAL, WordTokenizer, split
from pipeline.errors import UserError
from tests.helpers.projects import ROOT

TEXTS = [e.text for e in read_examples(ROOT / "data/pretrain.de.txt", "p")]
WORDS = list(dict.fromkeys(word for text in TEXTS for word in split(text)))
TOKENIZER = WordTokenizer.of_words(WORDS)


def test_transformers_opens_it_and_agrees(tmp_path: Path) -> None:
    TOKENIZER.save(tmp_path, 32)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in [*TEXTS, "Die KATZE  sitzt", "die unbekannte katze", ""]:
        assert tuple(theirs(text)["input_ids"]) == TOKENIZER.encode(text)
    assert (theirs.pad_token_id, theirs.unk_token_id, theirs.eos_token_id) == (0, 1, 2)
    assert theirs.model_max_length == 32
    assert theirs.decode(theirs("die katze sitzt")["input_ids"]) == "die katze sitzt"


def test_it_is_the_same_after_saving(tmp_path: Path) -> None:
    TOKENIZER.save(tmp_path, 32)
    assert WordTokenizer.load(tmp_path).words() == TOKENIZER.words()


def test_words_keep_the_order_in_which_they_first_appear() -> None:
    assert TOKENIZER.words() == [*SPECIAL, *WORDS]
    assert len(TOKENIZER) == 74


@given(st.lists(st.text(alphabet="abcdeäöüßABC \t\x1c\x85\u2028", max_size=12), max_size=8))
def test_expanding_keeps_every_old_id_and_knows_every_new_word(texts: list[str]) -> None:
    expanded, new = TOKENIZER.expanded(texts)
    assert expanded.words()[: len(TOKENIZER)] == TOKENIZER.words()
    assert expanded.words()[len(TOKENIZER) :] == new
    for text in texts:
        assert expanded.unknown_words(text) == []
        assert expanded.decode(expanded.encode(text)) == " ".join(split(text))


def test_white_space_between_words_changes_no_token(tmp_path: Path) -> None:
    path = tmp_path / "d.txt"
    path.write_bytes("\tdie  katze\rsitzt\u2028 \r\n".encode())
    (example,) = read_examples(path, "d")
    assert encode(example, TOKENIZER) == encode(Example("die katze sitzt", "d", 1), TOKENIZER)


def test_composed_and_decomposed_letters_are_one_word() -> None:
    assert (
        TOKENIZER.encode("frühling")
        == TOKENIZER.encode("fru\u0308hling")
        != (TOKENIZER.unknown_id,)
    )


def test_unknown_words_are_named_as_written() -> None:
    assert TOKENIZER.unknown_words("Die Möwe sitzt auf dem Mast") == ["Möwe", "Mast"]


def test_an_example_with_unknown_words_or_too_many_is_refused_with_its_place() -> None:
    with pytest.raises(
        UserError, match=r"f.txt:3: not in the vocabulary: möwe. Add f.txt to expand_vocab.data"
    ):
        encode(Example("die möwe sitzt", "f.txt", 3), TOKENIZER, 0, 32)
    with pytest.raises(
        UserError, match=r"f.txt:3: 4 tokens with the end token, more than the model's 3"
    ):
        encode(Example("die katze sitzt", "f.txt", 3), TOKENIZER, 0, 3)


def test_a_file_that_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="A model folder needs its tokenizer"):
        WordTokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match="is not a tokenizer file"):
        WordTokenizer.load(tmp_path)
