"""The token file: examples come back as encoded, and memory stays small."""

import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.examples import Example
from pipeline.data.formats import iter_examples
from pipeline.data.masking import Encoded
from pipeline.data.windows import Corpus, as_window, refuse_empty
from pipeline.errors import UserError

TOKENS = st.lists(st.tuples(st.integers(0, 2**31 - 1), st.booleans()), max_size=9)


def encoded(tokens: list[tuple[int, bool]], cut: int = 0) -> Encoded:
    return Encoded(tuple(id_ for id_, _ in tokens), tuple(on for _, on in tokens), cut)


@given(st.lists(st.tuples(TOKENS, st.integers(0, 3), st.sampled_from("ab")), max_size=12))
def test_what_was_encoded_comes_back_with_its_place(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[list[tuple[int, bool]], int, str]]
) -> None:
    made = {
        Example("x", file, line): encoded(tokens, cut)
        for line, (tokens, cut, file) in enumerate(rows, 1)
    }
    corpus = Corpus.of(made.items(), tmp_path_factory.mktemp("c"))
    kept = {example: encoding for example, encoding in made.items() if any(encoding.trained[1:])}
    assert list(corpus) == [as_window(encoding) for encoding in kept.values()]
    for number, encoding in enumerate(kept.values()):
        stored = corpus.stored(number).tolist()
        assert tuple(id_ if id_ >= 0 else ~id_ for id_ in stored) == encoding.ids
        assert tuple(id_ >= 0 for id_ in stored) == encoding.trained
    assert [corpus.location(i) for i in range(len(corpus))] == [
        example.location for example in kept
    ]
    lengths = sorted(len(encoding.ids) for encoding in kept.values())
    assert sorted(1 + corpus.tokens(n) for n in range(len(corpus))) == lengths
    counts = corpus.statistics
    assert (counts.examples, counts.unlabelled) == (len(kept), len(made) - len(kept))
    assert counts.tokens == sum(lengths)
    assert counts.labels == sum(encoding.labels for encoding in kept.values())
    assert counts.truncated == sum(encoding.cut > 0 for encoding in made.values())
    if kept:
        assert (counts.shortest, counts.longest) == (lengths[0], lengths[-1])
        assert counts.median == lengths[len(lengths) // 2]
        assert 0 < counts.share <= 1
    with pytest.raises(IndexError):
        corpus[len(corpus)]


def test_examples_of_one_token_leave_nothing_to_learn(tmp_path: Path) -> None:
    corpus = Corpus.of([(Example("x", "f", 1), Encoded((1,), (True,)))], tmp_path)
    assert corpus.statistics.share == 0
    with pytest.raises(
        UserError, match=r"d.txt: nothing to train on: every example is shorter than two tokens"
    ):
        refuse_empty(corpus, "d.txt")


def test_examples_of_which_nothing_may_be_learned_are_not_called_short(tmp_path: Path) -> None:
    corpus = Corpus.of([(Example("x y", "f", 1), Encoded((1, 2), (False, False)))], tmp_path)
    with pytest.raises(UserError, match=r"labelled false, or marked with train: false") as caught:
        refuse_empty(corpus, "d.jsonl")
    assert "every example is shorter than two tokens, labelled" in str(caught.value)


@pytest.mark.slow
def test_a_file_larger_than_what_is_kept_of_it_streams_through(tmp_path: Path) -> None:
    path, examples = tmp_path / "large.txt", 20_000
    line = "wort " * 100
    with path.open("w", encoding="utf-8") as file:
        file.writelines(f"{number} {line}\n" for number in range(examples))

    def encode(example: Example) -> Encoded:
        size = len(example.text.split())
        return Encoded((7,) * size, (True,) * size)

    size = path.stat().st_size
    assert peak_of(iter_examples(path, "large.txt")) < 2**20 < size / 9
    tracemalloc.start()
    corpus = Corpus.of(((e, encode(e)) for e in iter_examples(path, "large.txt")), tmp_path)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(corpus) == examples
    assert held < 40 * examples and peak < size / 5
    assert corpus[examples - 1].labels == (7,) * 100


def peak_of(examples: Iterator[Example]) -> int:
    """Peak bytes while iterating over the examples."""
    tracemalloc.start()
    for _ in examples:
        pass
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak
