"""Data files, prompts and windows."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data import read_examples, read_prompts, windows
from pipeline.errors import UserError
from tests.support import ROOT


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "d.txt: the file is empty"),
        (b" \n\n", "d.txt: the file is empty"),
        (b"eins\n\nzwei\n", "d.txt:2: blank line"),
        (b"eins\n  \nzwei\n", "d.txt:2: blank line"),
        (b"\neins\n", "d.txt:1: blank line"),
        (b"eins\nzw\xffei\n", "d.txt:2: not UTF-8"),
        ("größe".encode("latin-1"), "d.txt:1: not UTF-8"),
    ],
)
def test_a_broken_data_file_is_named_with_its_line(tmp_path: Path, raw: bytes, message: str) -> None:
    path = tmp_path / "d.txt"
    path.write_bytes(raw)
    with pytest.raises(UserError, match=message):
        read_examples(path, "d.txt")


@pytest.mark.parametrize("raw", [b"eins zwei\ndrei", b"eins zwei\ndrei\n\n", b"\xef\xbb\xbfeins  zwei\r\ndrei\r\n"])
def test_line_ends_and_a_byte_order_mark_do_not_matter(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "d.txt"
    path.write_bytes(raw)
    assert [(e.text, e.place) for e in read_examples(path, "d.txt")] == [("eins zwei", "d.txt:1"), ("drei", "d.txt:2")]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data/x.txt: No such file"):
        read_examples(tmp_path / "x.txt", "data/x.txt")


@given(st.lists(st.integers(0, 99), max_size=30).map(tuple), st.integers(1, 8))
def test_windows_keep_their_place_and_predict_every_token_but_the_first(ids: tuple[int, ...], size: int) -> None:
    cut = list(windows(ids, size))
    predicted: set[int] = set()
    for window in cut:
        stop = window.start + len(window.ids)
        assert window.ids == ids[window.start : stop]
        assert window.labels == ids[window.start + 1 : stop + 1]
        predicted.update(range(window.start + 1, stop + 1))
    assert predicted == set(range(1, len(ids)))
    assert all(len(window.ids) == min(size, len(ids) - 1) for window in cut)


def test_the_documents_words_are_in_the_vocabulary_where_its_tables_need_them() -> None:
    words = (ROOT / "data/pretrain.de.txt").read_text(encoding="utf-8").split()
    needed = "tisch spielplatz sofa bett boden garten park frühling bahnhof teller vom essen buch himmel spielen "
    assert set((needed + "wald flughafen lewa yen sofia").split()) <= set(words)


def test_there_are_22_sentences_to_learn_first_and_8_new_ones() -> None:
    assert len(read_examples(ROOT / "data/pretrain.de.txt", "p")) == 22
    assert len(read_examples(ROOT / "data/finetune.de.txt", "f")) == 8


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must hold groups of prompts"),
        ("a: {must_keep: []}", "holds no prompts"),
        ("a: [b]", "a must hold must_change, must_keep, must_learn"),
        ("a: {must_keep: x}", "a.must_keep must be a list of prompts"),
        ("a: {must_stay: [{prompt: p, answer: q}]}", "a.must_stay: unknown rule"),
        ("a: {must_keep: [{prompt: p}]}", "each prompt needs exactly answer, prompt"),
        ("a: {must_change: [{prompt: p, answer: q}]}", "each prompt needs exactly answer, corrected, prompt"),
        ("a: {must_keep: [{prompt: p, answer: no}]}", "every value must be a text"),
        ("a: {b", "is not valid YAML"),
    ],
)
def test_broken_prompts_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "prompts.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        read_prompts(path, "prompts.yaml")


def test_the_shipped_prompts_hold_the_documents_seven() -> None:
    prompts = [p for p in read_prompts(ROOT / "data/prompts.yaml", "p") if p.group == "fact_correction"]
    assert [(p.answer, p.corrected) for p in prompts] == [
        ("tisch", "sofa"),
        ("garten", "wald"),
        ("das", "die"),
        ("die", "das"),
        ("himmel", "himmel"),
        ("garten", "garten"),
        ("frühling", "frühling"),
    ]
