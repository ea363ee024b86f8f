"""Any model's tokenizer, against transformers and the text itself."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from pipeline.data.tokenizers.subword import SubwordTokenizer
from pipeline.data.tokenizers.word import Tokenizer, WordTokenizer, load_tokenizer
from pipeline.errors import UserError
from tests.helpers.checkpoints import checkpoint
from tests.helpers.json_files import read_json, write_json
from tests.helpers.projects import folder_bytes
from tests.helpers.tokenizers import END, MARKED, SMOLLM2, START, folder_with, tokenizer_with

Kinds = tuple[SubwordTokenizer, SubwordTokenizer]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Kinds:
    """A byte-level tokenizer, and one like SentencePiece's, which puts BOS and a space before a
    text.
    """
    folder = tmp_path_factory.mktemp("both")
    spaces = tokenizer_with(
        folder / "b", bos="<s>", eos="</s>", writes=("<s>", "</s>"), sentencepiece=True
    )
    return tokenizer_with(folder / "a", SMOLLM2), spaces


def test_a_folder_says_which_tokenizer_it_holds(tmp_path: Path) -> None:
    kinds: list[Tokenizer] = [
        load_tokenizer(checkpoint(tmp_path / "words")),
        load_tokenizer(folder_with(tmp_path / "bytes")),
    ]
    assert [type(kind) for kind in kinds] == [WordTokenizer, SubwordTokenizer]


TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=20)


@given(
    st.one_of(
        TEXTS,
        st.sampled_from(["The currency of Bulgaria is the euro.", " 🤗🤗 Währung", f"{END}\n"]),
    )
)
def test_text_comes_back_whole_and_in_pieces(both: Kinds, text: str) -> None:
    for tokenizer in both[:1]:
        ids = tokenizer.encode_following(text)
        bare = text.replace(END, "")
        assert tokenizer.decode(ids) == bare
        stream = tokenizer.stream()
        assert "".join(map(stream, ids)) == bare


@given(st.lists(st.integers(0, 480), max_size=12))
def test_any_tokens_can_be_streamed_and_after_broken_bytes_text_goes_on(
    both: Kinds, ids: list[int]
) -> None:
    for tokenizer in both:
        stream = tokenizer.stream()
        for id_ in ids:
            stream(id_)
        stream = tokenizer.stream()
        half = tokenizer.encode_following("🤗")[:2]
        text = "".join(map(stream, (*half, *tokenizer.encode_following(" is the euro"))))
        assert text.strip("\ufffd") == " is the euro"


@given(
    st.lists(
        st.sampled_from(["the", "euro", "Währung", "🤗", "ist", "Yen"]), min_size=1, max_size=6
    ).map(" ".join)
)
def test_a_continuation_is_what_follows_in_the_text(both: Kinds, answer: str) -> None:
    for tokenizer in both:
        ids = tokenizer.encode("The currency") + tokenizer.continuation("The currency", answer)
        assert tokenizer.decode(ids) == f"The currency {answer}"
        stream = tokenizer.stream()
        assert "".join(map(stream, tokenizer.continuation("The currency", answer))) == f" {answer}"


def test_a_space_is_put_before_an_answer_only_where_there_is_no_white_space(both: Kinds) -> None:
    for tokenizer in both:
        spaced = tokenizer.continuation("The", "euro")
        assert tokenizer.continuation("The", " euro") == spaced
        assert (
            tokenizer.continuation("The\n", "euro") == tokenizer.encode_following("euro") != spaced
        )


def test_what_a_prompt_begins_with_is_what_transformers_writes(both: Kinds, tmp_path: Path) -> None:
    both[1].save(tmp_path, 100)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    ids = both[1].encode("the euro")
    assert (*ids, both[1].end_id) == tuple(theirs("the euro").input_ids)  # it would end a prompt
    assert ids[0] == both[1].bos_id == theirs.bos_token_id
    assert both[0].bos_id is None
    assert both[0].encode("the euro") == both[0].spans("the euro")[0]


def test_spans_are_the_characters_of_each_token(both: Kinds) -> None:
    text = f"The euro 🤗{END} Yen"
    ids, spans = both[0].spans(text)
    assert both[0].end_id in ids
    assert "".join(text[slice(*span)] for span in dict.fromkeys(spans)) == text


def test_a_token_reads_with_its_space_and_is_found_by_it(both: Kinds) -> None:
    for tokenizer in both:
        (id_,) = tokenizer.continuation("is the", "euro")
        assert tokenizer.word(id_) == " euro"
        words = tokenizer.words()
        assert len(words) == len(tokenizer)
        for id_, word in enumerate(words):
            assert tokenizer.word(id_) == word
            first = tokenizer.id_of_token(word)
            assert first is not None and first <= id_ and words[first] == word
        assert tokenizer.word(tokenizer.end_id) in (END, "</s>")
        assert tokenizer.id_of_token("no such token") is None
    assert tokenizer.word(len(tokenizer) + 3) == f"<{len(tokenizer) + 3}>"


def test_bytes_of_a_character_show_as_numbers_and_not_as_letters(both: Kinds) -> None:
    for tokenizer in both:
        assert [tokenizer.word(id_) for id_ in tokenizer.encode_following("🤗")] == [
            "<0xF0>",
            "<0x9F>",
            "<0xA4>",
            "<0x97>",
        ]
        ids = [tokenizer.id_of_token(f"<0x{byte:02X}>") for byte in range(0x80, 0x100)]
        assert None not in ids and len(set(ids)) == 128, "no byte is taken for a letter"


@pytest.mark.parametrize(("ends", "more"), [(None, ()), (0, (0,)), ([0, 4], (0, 4))])
def test_every_id_that_ends_is_known(tmp_path: Path, ends: object, more: tuple[int, ...]) -> None:
    tokenizer = tokenizer_with(tmp_path, ends=ends)
    assert tokenizer.end_ids == {tokenizer.end_id, *more}
    assert tokenizer.word(tokenizer.end_id) == END


def test_what_ends_a_turn_ends_generation_too(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(tmp_path, SMOLLM2, eos="<|endoftext|>")
    assert [tokenizer.word(id_) for id_ in sorted(tokenizer.end_ids)] == ["<|endoftext|>", END]
    assert tokenizer.word(tokenizer.end_id) == "<|endoftext|>"


def test_new_tokens_are_appended_and_old_ids_stay(both: Kinds, tmp_path: Path) -> None:
    for tokenizer in both:
        before = len(tokenizer)
        one, new = tokenizer.expanded(["Lewa", "Lewa", "<|tool|>", END], special=False)
        two, special = one.expanded(["<|x|>"], special=True)
        assert (new, special) == (["Lewa", "<|tool|>"], ["<|x|>"])
        assert two.words()[: len(tokenizer)] == tokenizer.words()
        assert two.words()[len(tokenizer) :] == ["Lewa", "<|tool|>", "<|x|>"]
        assert two.decode(two.encode("der Lewa<|x|>")) == "der Lewa"
        assert [id_ >= before for id_ in two.encode("Lewas Lewa")].count(True) == 1, (
            "whole words only"
        )
        assert len(tokenizer) == before, "the old tokenizer is unchanged"
        two.save(tmp_path, 64)
        assert load_tokenizer(tmp_path).words() == two.words()
    assert both[0].expanded([])[1] == []


def test_saved_files_tell_nothing_of_this_machine_and_are_the_same_each_time(
    tmp_path: Path,
) -> None:
    first = tokenizer_with(tmp_path / "one/a", MARKED)
    for name in ("b", "c"):
        (tmp_path / name).mkdir()
    first.save(tmp_path / "b", 32)
    load_tokenizer(tmp_path / "b").save(tmp_path / "c", 32)
    files = folder_bytes(tmp_path / "b")
    assert files == folder_bytes(tmp_path / "c")
    assert files["chat_template.jinja"].decode() == MARKED
    config = json.loads(files["tokenizer_config.json"])
    assert config["model_max_length"] == 32
    assert not {"name_or_path", "is_local", "local_files_only"} & config.keys()
    assert str(tmp_path) not in "".join(file.decode() for file in files.values())


def test_a_cut_that_the_file_asks_for_is_not_made(tmp_path: Path) -> None:
    folder = folder_with(tmp_path)
    tree = read_json(folder / "tokenizer.json")
    tree["truncation"] = {
        "direction": "Right",
        "max_length": 3,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    write_json(folder / "tokenizer.json", tree)
    assert len(load_tokenizer(folder).encode("The currency of Bulgaria is the euro.")) > 3


def no_end(folder: Path) -> None:
    path = folder_with(folder) / "tokenizer_config.json"
    write_json(path, {"tokenizer_class": "PreTrainedTokenizerFast"})


def broken(folder: Path) -> None:
    (folder_with(folder) / "tokenizer.json").write_text("{}", encoding="utf-8")


def odd_ends(folder: Path) -> None:
    folder_with(folder, ends="</s>")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Path.mkdir, "cannot open its tokenizer"),
        (str, "is not a folder"),
        (broken, "cannot open its tokenizer"),
        (no_end, "has no end-of-text token. Set eos_token in tokenizer_config.json"),
        (odd_ends, "eos_token_id must be a token id or a list of ids, got '</s>'"),
    ],
)
def test_a_folder_without_a_tokenizer_is_refused(
    tmp_path: Path, make: Callable[[Path], object], message: str
) -> None:
    make(tmp_path / "m")
    with pytest.raises(UserError, match=message):
        load_tokenizer(tmp_path / "m")


def test_a_slow_tokenizer_is_refused_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_with(tmp_path)
    monkeypatch.setattr(
        "transformers.tokenization_utils_tokenizers.TokenizersBackend.is_fast", False
    )
    with pytest.raises(UserError, match="is a slow tokenizer, which has no character offsets"):
        load_tokenizer(folder)


def test_a_conversation_is_rendered_as_transformers_does(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(tmp_path, SMOLLM2)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    turns = [{"role": "user", "content": "Hello"}]
    for reply in (True, False):
        text = tokenizer.render(turns, reply)
        assert text == theirs.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=reply
        )
        assert list(tokenizer.encode(text)) == theirs.apply_chat_template(
            turns, add_generation_prompt=reply, return_dict=False
        )
    assert text.startswith(START) and tokenizer.has_template


def test_without_a_template_nothing_is_rendered(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(tmp_path / "none")
    assert not tokenizer.has_template
    with pytest.raises(UserError, match="has no chat template"):
        tokenizer.render([{"role": "user", "content": "Hello"}], add_generation_prompt=True)
    broken = tokenizer_with(tmp_path / "broken", "{{ raise_exception('never') }}")
    with pytest.raises(UserError, match="its chat template fails: never"):
        broken.render([{"role": "user", "content": "Hello"}], add_generation_prompt=True)


def test_words_and_subwords_compare_as_they_are_seen() -> None:
    words = WordTokenizer.of_words(["die", "katze"])
    assert words.normalize(" Die  Katze\n") == "die katze"
    assert words.continuation("die", "Katze") == (4,)
    assert words.continuation("die", "Maus") == ()
    assert [words.stream()(id_) for id_ in (3, 4, 2)] == [" die", " katze", ""]
    assert (words.bos_id, set(words.end_ids), words.has_template) == (None, {2}, False)
    with pytest.raises(UserError, match="has no chat template"):
        words.render([{"role": "user", "content": "die"}], add_generation_prompt=True)


def test_subwords_keep_case(both: Kinds) -> None:
    assert both[0].normalize("  The\n Euro ") == "The Euro"
    assert both[0].unknown_words("nie gehört") == []
