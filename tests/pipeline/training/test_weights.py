"""Weights of data files: how often each example is seen per epoch."""

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.examples import Example, Window
from pipeline.data.masking import Encoded
from pipeline.data.windows import Corpus, InMemoryDataset, Parts, dataset_from
from pipeline.training.batches import Batches

SIZES = st.lists(
    st.tuples(st.integers(0, 9), st.sampled_from([0.01, 0.3, 0.5, 1, 1.5, 2, 3.25])), min_size=1
)


def dataset(sizes: list[tuple[int, float]]) -> InMemoryDataset:
    parts: Parts = ()
    for size, weight in sizes:
        begin = parts[-1][0].stop if parts else 0
        parts += ((range(begin, begin + size), weight),)
    windows = [Window(0, (n,), (n,)) for n in range(parts[-1][0].stop)]
    return InMemoryDataset(windows, [str(window.ids[0]) for window in windows], parts)


def epoch(batches: Batches, number: int) -> list[int]:
    steps = range(number * len(batches), (number + 1) * len(batches))
    return [row for step in steps for rows in batches.rows(step) for row in rows]


@given(
    SIZES.filter(lambda sizes: any(size for size, _ in sizes)), st.integers(0, 3), st.integers(1, 4)
)
def test_each_example_is_seen_as_often_as_its_weight_says_and_epochs_are_of_one_size(
    sizes: list[tuple[int, float]], seed: int, batch_size: int
) -> None:
    windows = dataset(sizes)
    batches = Batches(windows, batch_size, seed)
    epochs = [epoch(batches, number) for number in range(4)]
    assert len({len(rows) for rows in epochs}) == 1
    for run, weight in windows.parts:
        for rows in epochs:
            seen = Counter(row for row in rows if row in run)
            assert all(int(weight) <= seen[row] <= int(weight) + 1 for row in run)
            extra = weight % 1 and run and max(1, round(weight % 1 * len(run)))
            assert seen.total() == int(weight) * len(run) + (extra or 0)
    again = Batches(windows, batch_size, seed)  # as a resumed run: it begins in the middle
    assert epoch(again, 2) == epochs[2] and epoch(again, 1) == epochs[1]


def test_a_half_is_another_half_in_each_epoch_and_weights_of_one_change_no_order() -> None:
    batches = Batches(dataset([(100, 0.5)]), 10, 0)
    halves = [frozenset(epoch(batches, number)) for number in range(5)]
    assert {len(half) for half in halves} == {50} and len(set(halves)) == 5
    assert len(frozenset.union(*halves)) > 90
    plain = InMemoryDataset(dataset([(9, 1)]).windows, ["x"] * 9)
    assert epoch(Batches(dataset([(4, 1), (5, 1)]), 2, 7), 1) == epoch(Batches(plain, 2, 7), 1)


@pytest.mark.parametrize("window", [0, 2])
def test_a_files_weight_reaches_its_sequences(tmp_path: Path, window: int) -> None:
    examples = [Example(file * (n + 3), file, n) for file in "abc" for n in range(3)]

    def encode(example: Example) -> Encoded:
        return Encoded((ord(example.file),) * len(example.text), (True,) * len(example.text))

    corpus = Corpus.of(((e, encode(e)) for e in examples), tmp_path, {"a": 2, "c": 0.5})
    windows = dataset_from(corpus, window)
    rows = epoch(Batches(windows, 4, 0), 0)
    sizes = {
        file: sum(windows.location(n).startswith(file) for n in range(len(windows)))
        for file in "abc"
    }
    seen = Counter(windows.location(row)[0] for row in rows)
    assert seen == {"a": 2 * sizes["a"], "b": sizes["b"], "c": round(sizes["c"] / 2)}
